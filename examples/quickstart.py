"""Compress a model in memory: python examples/quickstart.py MODEL TEXT OUT (folder or hub id, text file, folder)."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fermisvd

MODEL, TEXT, OUT = sys.argv[1:]
tokenizer, model = (kind.from_pretrained(MODEL) for kind in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer(Path(TEXT).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
windows = ids[: len(ids) // 128 * 128].view(-1, 128)[:64]  # token ids, (samples, length)
small = fermisvd.compress(model, windows, remove=0.2)
small.save_pretrained(OUT)
tokenizer.save_pretrained(OUT)
print(f"{model.num_parameters():,} parameters before, {small.num_parameters():,} after")
