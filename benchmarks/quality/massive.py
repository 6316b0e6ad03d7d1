"""What do massive activations, and the first tokens that have them, do to calibration and damping?

    python -m benchmarks.quality.massive MODEL --calibration FILE [--options JSON]

By kind of layer the energy of the largest channel of an input over that of the median channel (the most of all layers),
and the share of the first token of each window in the energy, of 16 windows. Then perplexity after compression, ranks
uniform, separate groups, not healed: as the converter does it; with C damped by the mean of its diagonal instead of the
median; and with the first token of each window left out of C and G. Results: benchmarks/results/massive.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.records import command_line, new_record, write_record
from fermisvd import decomposition, load_model
from fermisvd.calibration import GramSums
from fermisvd.groups import find_groups
from fermisvd.linear import linear_layer
from fermisvd_convert.convert import convert
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.stages import decomposition as stage
from fermisvd_convert.text import windows_of

SEEN = 16  # windows whose energies are looked at
SETTINGS = {"ranks": "uniform", "groups": "separate", "heal_steps": 0, "refit": False}


@torch.no_grad()
def energies(folder: str, text: str, length: int) -> dict[str, dict[str, float]]:
    """By the layer's own name (q_proj, down_proj): largest over median channel, with and without the first token of
    each window, and the first tokens' share of the whole energy; the largest of all layers."""
    model = load_model(folder)
    found: dict[str, dict[str, float]] = {}

    def see(name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].double().square()  # (windows, tokens, channels)
        first, others = squares[:, 0].sum(0), squares[:, 1:].sum((0, 1))
        for key, energy in (("all tokens", first + others), ("without the first", others)):
            row[name][key] = (energy.max() / energy[energy > 0].median()).item()
        row[name]["share of the first"] = (first.sum() / (first + others).sum()).item()

    row: dict[str, dict[str, float]] = {}
    for group in find_groups(model, "separate"):
        row[group.source] = {}
        linear_layer(model, group.source).register_forward_pre_hook(partial(see, group.source))
    model(input_ids=windows_of(load_tokenizer(folder), text, length, SEEN), use_cache=False)
    for source, values in row.items():
        kept = found.setdefault(source.rpartition(".")[2], dict.fromkeys(values, 0.0))
        found[source.rpartition(".")[2]] = {key: max(kept[key], value) for key, value in values.items()}
    return found


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


@contextmanager
def damped_by_the_mean() -> Iterator[None]:
    def mean(gram: torch.Tensor, damping: float) -> float:
        return damping * gram.diagonal().double().mean().item()

    with patch.object(decomposition, "input_ridge", mean), patch.object(stage, "DAMPING", "mean"):
        yield


@contextmanager
def without_first_tokens() -> Iterator[None]:
    see_input, see_gradient = GramSums._see_input, GramSums._see_gradient

    def later_input(self: GramSums, name: str, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see_input(self, name, layer, (inputs[0][:, 1:],))

    def later_gradient(self: GramSums, name: str, gradient: torch.Tensor) -> None:
        see_gradient(self, name, gradient[:, 1:])

    with (
        patch.object(GramSums, "_see_input", later_input),
        patch.object(GramSums, "_see_gradient", later_gradient),
        patch.object(stage, "FAINT", "without first tokens"),
    ):
        yield


VARIANTS: dict[str, tuple[Callable, str]] = {
    "as it is": (as_it_is, "work"),
    "damped by the mean": (damped_by_the_mean, "work"),
    "without first tokens": (without_first_tokens, "another work"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.3])
    parser.add_argument("--scratch", type=Path, help="folder to keep")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of convert, as JSON")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"energies": energies(arguments.model, arguments.calibration, arguments.sequence_length)}
    print("| input of | largest / median channel | without first tokens | share of first tokens |\n|---|---|---|---|")
    for name, row in found["energies"].items():
        print(f"| {name} | " + " | ".join(f"{value:.2g}" for value in row.values()) + " |", flush=True)
    options = SETTINGS | {"sequence_length": arguments.sequence_length, "samples": arguments.samples}
    options |= {"gradient_samples": arguments.samples, "calibration": [arguments.calibration]} | arguments.options
    found["perplexity"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        for name, (variant, work) in VARIANTS.items():
            found["perplexity"][name] = {}
            for remove in arguments.remove:
                out = scratch / f"{name} {remove}"
                with variant():
                    record = convert(arguments.model, out, remove, work=scratch / work, **options)
                assert record.perplexity
                found["perplexity"][name][remove] = record.perplexity.after
                print(name, remove, record.perplexity, flush=True)
    protocol = {"model": Path(arguments.model).name, "options": SETTINGS | arguments.options}
    protocol |= {"samples": arguments.samples, "sequence_length": arguments.sequence_length}
    write_record("massive", new_record(command_line(), protocol) | found)


if __name__ == "__main__":
    main()
