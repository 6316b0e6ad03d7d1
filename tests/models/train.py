"""Recipe of the demo checkpoint: a small Llama trained on the Python standard library.

    python tests/models/train.py tests/models/stdlib-2m --minutes 55

On a CPU, glibc gives every large buffer back to the system and faults it in again at each step; with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment a step took 0.95 s
instead of 1.6 s on two cores.

Muon on the hidden matrices, AdamW on the rest; the learning rate falls linearly to zero over the last
half of the given time. The log and final loss are written beside the weights.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stdlib_text import training_documents, validation_text

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, LENGTH, BATCH = 2048, 512, 16


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one (tokens,) stream, each ended by the end-of-text token."""
    ids = []
    for encoded in tokenizer(documents)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: torch.Tensor, windows: int = 64) -> float:
    batch = tokens[: windows * LENGTH].view(-1, LENGTH)
    return sum(model(input_ids=b, labels=b).loss.item() for b in batch.split(BATCH)) / math.ceil(windows / BATCH)


def train(out: Path, minutes: float, seed: int) -> None:
    torch.manual_seed(seed)
    documents = training_documents()
    tokenizer = train_tokenizer(documents)
    tokens = token_stream(tokenizer, documents)
    held_back = torch.tensor(tokenizer(validation_text())["input_ids"])
    model = new_model(tokenizer)
    compiled = torch.compile(model)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    log = {"parameters": model.num_parameters(), "training_tokens": len(tokens), "seed": seed, "steps": []}
    log["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    begin, step, elapsed = time.time(), 0, 0.0
    while elapsed < 60 * minutes:
        rate = min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - elapsed / (60 * minutes)))
        for optimizer, base in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[s : s + LENGTH] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step, elapsed = step + 1, time.time() - begin
        if step % 100 == 0:
            log["steps"].append({"step": step, "seconds": round(elapsed), "train_loss": round(loss.item(), 4)})
            if step % 500 == 0:
                log["steps"][-1]["validation_loss"] = round(validation_loss(model, held_back), 4)
            print(log["steps"][-1], flush=True)
    log["tokens_seen"] = step * BATCH * LENGTH
    log["final_validation_loss"] = round(validation_loss(model, held_back, 256), 4)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print("final validation loss", log["final_validation_loss"], "tokens seen", log["tokens_seen"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.seed)
