"""Recipes of the trained checkpoints: small Llamas that plain SVD hurts.

    python -m tests.support.train stdlib-2m tests/support/stdlib-2m --minutes 55    the demo model, committed
    python -m tests.support.train kinds-11m models/kinds-11m --minutes 40     five kinds of text, ../shared/data

On a CPU, glibc gives every large buffer back to the system and faults it in again at each step; with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment a step took 0.95 s
instead of 1.6 s on two cores.

Muon on the hidden matrices, AdamW on the rest; the learning rate falls linearly to zero over the last
half of the given time. The log and final loss are written beside the weights.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.kinds import KINDS, kind_texts
from tests.support.stdlib_text import training_documents, validation_text

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """texts: gives training documents and the held-back text; length: tokens a window; batch: windows a step."""

    texts: Callable[[], tuple[list[str], str]]
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    length: int
    batch: int
    rate: float


def _stdlib() -> tuple[list[str], str]:
    return training_documents(), validation_text()


def _five_kinds() -> tuple[list[str], str]:
    training, held_back = zip(*(kind_texts(kind) for kind in KINDS), strict=True)
    return list(training), "\n\n".join(text[:60_000] for text in held_back)


RECIPES = {
    "stdlib-2m": Recipe(_stdlib, 2048, 192, 512, layers=4, heads=6, kv_heads=2, length=512, batch=16, rate=0.02),
    "kinds-11m": Recipe(_five_kinds, 4096, 384, 1024, layers=6, heads=6, kv_heads=2, length=256, batch=24, rate=0.02),
}


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
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


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    end: Any = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=recipe.length,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, batches: Sequence[torch.Tensor]) -> float:
    return sum(model(input_ids=b, labels=b).loss.item() for b in batches) / len(batches)


def train(recipe: Recipe, out: Path, minutes: float, seed: int) -> None:
    torch.manual_seed(seed)
    documents, validation = recipe.texts()
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    tokens = token_stream(tokenizer, documents)
    held_back = torch.tensor(tokenizer(validation)["input_ids"])
    held_back = held_back[: len(held_back) // recipe.length * recipe.length].view(-1, recipe.length)
    # whole batches spread over the text, which may be several texts in a row
    held_back = held_back[torch.randperm(len(held_back))].split(recipe.batch)[:-1]
    model = new_model(recipe, tokenizer)
    compiled = torch.compile(model)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=recipe.rate, momentum=0.95, weight_decay=0.01),
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
        starts = torch.randint(len(tokens) - recipe.length, (recipe.batch,))
        batch = torch.stack([tokens[s : s + recipe.length] for s in starts])
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
                log["steps"][-1]["validation_loss"] = round(validation_loss(model, held_back[:4]), 4)
            print(log["steps"][-1], flush=True)
    log["tokens_seen"] = step * recipe.batch * recipe.length
    log["final_validation_loss"] = round(validation_loss(model, held_back[:16]), 4)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print("final validation loss", log["final_validation_loss"], "tokens seen", log["tokens_seen"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(RECIPES[arguments.recipe], arguments.out, arguments.minutes, arguments.seed)
