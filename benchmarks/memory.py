"""Peak memory of `fermisvd convert` on the demo model, or on a random Llama where weights outweigh activations.

    python benchmarks/memory.py tests/models/stdlib-2m
    python benchmarks/memory.py --random 100                  # a random model of about 100 M parameters

Two figures: live tensor bytes (torch's MemTracker), and growth of the resident set over what the imports alone take.
The bound is 3 times the model as loaded (float32 on a CPU) plus the factors of the largest group; what a forward pass
of --batch-size windows needs comes on top, so windows are short here.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from fermisvd import load_model
from fermisvd.groups import find_groups
from fermisvd_convert.convert import convert

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "models" / "stdlib-2m"


def random_model(folder: Path, millions: int) -> Path:
    """A random bfloat16 Llama of about so many parameters, 8 layers, with the demo's tokenizer."""
    hidden = round((millions * 1e6 / (8 * 11)) ** 0.5 / 64) * 64
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=8,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def resident() -> int:
    """Peak resident set of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(model: Path, scratch: Path) -> dict:
    """Convert at 20 % removed and compare the peaks with the bound."""
    loaded = load_model(model)
    size = sum(p.numel() * 4 for p in loaded.parameters())
    largest = max(4 * g.full_rank * (g.rows + g.columns) for g in find_groups(loaded))
    del loaded
    text = scratch / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    settings = {"samples": 16, "sequence_length": 64, "batch_size": 1, "steps": 4, "work": scratch / "work"}
    convert(str(model), scratch / "warm", 0.2, calibration=[str(text)], **{**settings, "work": scratch / "warm-work"})
    tracker = MemTracker()
    with tracker:
        convert(str(model), scratch / "out", 0.2, calibration=[str(text)], **settings)
    live = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    bound = 3 * size + largest
    return {
        "model": str(model.name),
        "float32_bytes": size,
        "largest_group_factor_bytes": largest,
        "bound_bytes": bound,
        "peak_live_tensor_bytes": live,
        "live_over_model": round(live / size, 2),
        "within_bound": live <= bound,
        "settings": {name: value for name, value in settings.items() if name != "work"},
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%F"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--random", type=int, metavar="MILLIONS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model(folder / "random", arguments.random) if arguments.random else arguments.model
        print(json.dumps(measure(model, folder), indent=1))
