"""Where does a compressed model's loss come from: kind of layer, depth, place in the window, rarity of the next token?

    python -m benchmarks.quality.anatomy DENSE OUT --text FILE --calibration FILE

A part of the linear layers is all of a kind (q_proj, down_proj), or some blocks one after the other. `without` is the
KL to the dense model that is left once a part is dense again, `alone` the KL where only that part is compressed. By
place and by rarity it is the KL of the whole compressed model that is split, in groups of tokens: `share` is a group's
share of all KL, `tokens` its share of all tokens, and `rise` how far the log-likelihood of the next token falls below
the dense model's. Rarity is the next token's count in the calibration text; a quartile is a fourth of the measured
tokens. Kept parameters by kind and block are read from the checkpoint. Results: benchmarks/results/anatomy-MODEL.json.
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

from benchmarks.records import command_line, new_record, write_record
from fermisvd import load_model
from fermisvd.groups import find_groups
from fermisvd.linear import linear_layer
from fermisvd.modules import CompressedLinear
from fermisvd.running.halves import compared_tokens, few_tokens, halves_of
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import Taught, teach
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

PLACES = {"first": (0, 1), "2 to 8": (1, 8), "9 to 32": (8, 32), "33 on": (32, None)}  # tokens of a window
QUARTILES = ("rarest fourth", "second", "third", "most frequent fourth")
BLOCKS = 5  # of a part by depth

Parts = dict[str, list[str]]  # names of linear layers by part


def kind_of(name: str) -> str:
    """q_proj of model.layers.3.self_attn.q_proj."""
    return name.rpartition(".")[2]


def block_of(name: str) -> int:
    """3 of model.layers.3.self_attn.q_proj."""
    found = re.search(r"\.(\d+)\.", name)
    assert found is not None
    return int(found[1])


def parts_by_kind(names: Iterable[str]) -> Parts:
    parts: Parts = {}
    for name in names:
        parts.setdefault(kind_of(name), []).append(name)
    return parts


def parts_by_depth(names: Sequence[str], blocks: int = BLOCKS) -> Parts:
    last, parts = max(map(block_of, names)), {}
    for name in names:
        first = block_of(name) // blocks * blocks
        parts.setdefault(f"{first} to {min(first + blocks - 1, last)}", []).append(name)
    return parts


class Swapped:
    """One model whose linear layers are either the dense or the compressed ones, both of which stay in memory."""

    def __init__(self, dense: PreTrainedModel, compressed: PreTrainedModel):
        self.model = compressed
        self.layers = {
            name: (linear_layer(dense, name), layer)
            for name, layer in compressed.named_modules()
            if isinstance(layer, CompressedLinear)
        }

    def compress_only(self, names: Iterable[str]) -> None:
        """These layers compressed, all others dense. A member of a group reaches its first without the model."""
        chosen = set(names)
        for name, (dense, compressed) in self.layers.items():
            self.model.set_submodule(name, compressed if name in chosen else dense)


@torch.no_grad()
def losses(model: nn.Module, taught: Taught) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || model) of each token, (windows, length), and -log p of the next, (windows, length - 1), float64."""
    halves, device = halves_of(model), next(model.parameters()).device
    found, missed = [], []
    for numbers in torch.arange(len(taught)).split(BATCH_SIZE):
        batch, states = taught.batch(numbers, device)
        tokens = compared_tokens(device)
        following = batch.roll(-1, dims=1)  # what the last of a window predicts is dropped below
        few = (few_tokens(each, tokens) for each in (states, halves.body(batch), following))
        for theirs, own, targets in zip(*few, strict=True):
            log_p = halves.head(theirs).float().log_softmax(-1)
            log_q = halves.head(own).float().log_softmax(-1)
            found.append((log_p.exp() * (log_p - log_q)).sum(-1).double().flatten())
            missed.append(nll_loss(log_q.flatten(0, 1), targets.flatten(), reduction="none").double())
    kl, nll = (torch.cat(each).view(taught.windows.shape) for each in (found, missed))
    return kl, nll[:, :-1]


def split(kl: torch.Tensor, rise: torch.Tensor, groups: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """kl, rise: (tokens,); groups: of token numbers; empty ones are left out."""
    return {
        name: {
            "tokens": len(chosen) / len(kl),
            "kl": kl[chosen].mean().item(),
            "share": (kl[chosen].sum() / kl.sum()).item(),
            "rise": rise[chosen].mean().item(),
        }
        for name, chosen in groups.items()
        if len(chosen)
    }


def by_place(length: int, windows: int) -> dict[str, torch.Tensor]:
    """Numbers of the tokens that predict another, windows one after the other."""
    numbers = torch.arange(windows * (length - 1)).view(windows, length - 1)
    return {name: numbers[:, slice(*places)].flatten() for name, places in PLACES.items()}


def by_rarity(following: torch.Tensor, calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    """Numbers of the tokens by how often the next one, following (tokens,), is in the calibration's ids; those that are
    equally frequent stand in the order of the text."""
    size = int(max(following.max(), calibration.max())) + 1
    order = calibration.flatten().bincount(minlength=size)[following].argsort(stable=True)
    return dict(zip(QUARTILES, order.tensor_split(len(QUARTILES)), strict=True))


def kept_parameters(dense: PreTrainedModel, compressed: PreTrainedModel) -> dict[str, list[float]]:
    """By kind the fraction of the parameters that each block's layer keeps; members of a group have their group's."""
    stored, whole = {}, {}
    for name, layer in compressed.named_modules():
        if isinstance(layer, CompressedLinear):
            own = sum(p.numel() for key, p in layer.named_parameters(recurse=False) if key != "bias")
            stored[layer.first] = stored.get(layer.first, 0) + own
            whole[layer.first] = whole.get(layer.first, 0) + linear_layer(dense, name).weight.numel()
    kept: dict[str, list[float]] = {}
    for name in sorted((name for group in find_groups(dense, "separate") for name in group.members), key=block_of):
        layer = compressed.get_submodule(name)
        fraction = stored[layer.first] / whole[layer.first] if isinstance(layer, CompressedLinear) else 1.0
        kept.setdefault(kind_of(name), []).append(round(fraction, 4))
    return kept


def layer_sizes(dense: PreTrainedModel) -> dict[str, int]:
    """Parameters of a layer of each kind."""
    names = (name for group in find_groups(dense, "separate") for name in group.members)
    return {kind_of(name): linear_layer(dense, name).weight.numel() for name in names}


def anatomy(dense: PreTrainedModel, compressed: PreTrainedModel, windows: torch.Tensor, calibration: torch.Tensor):
    """Everything that the record says of two models, which are changed. windows, calibration: ids (windows, length)."""
    found: dict = {"kept": kept_parameters(dense, compressed), "sizes": layer_sizes(dense)}
    taught, swapped = teach(dense, windows, BATCH_SIZE), Swapped(dense, compressed)
    names = list(swapped.layers)
    kl, nll = losses(compressed, taught)
    rise = nll - losses(dense, taught)[1]
    found |= {"kl": kl.mean().item(), "rise": rise.mean().item()}
    kl, rise = kl[:, :-1].flatten(), rise.flatten()
    found["by place"] = split(kl, rise, by_place(windows.shape[1], len(windows)))
    found["by rarity"] = split(kl, rise, by_rarity(windows[:, 1:].flatten(), calibration))
    for title, parts in (("by kind", parts_by_kind(names)), ("by depth", parts_by_depth(names))):
        found[title] = {}
        for part, inside in parts.items():
            row = {}
            for key, chosen in (("without", set(names) - set(inside)), ("alone", inside)):
                swapped.compress_only(chosen)
                row[key] = losses(compressed, taught)[0].mean().item()
            found[title][part] = row
            print(title, part, row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dense", type=Path)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.dense)
    windows = windows_of(tokenizer, arguments.text, arguments.length, arguments.windows, bos=False)
    calibration = windows_of(tokenizer, arguments.calibration, arguments.length, bos=False)
    start = time.perf_counter()
    found = anatomy(load_model(arguments.dense), load_model(arguments.compressed), windows, calibration)
    protocol = {
        "model": arguments.dense.name,
        "text": Path(arguments.text).name,
        "calibration": Path(arguments.calibration).name,
        "windows": len(windows),
        "length": arguments.length,
        "conversion": json.loads((arguments.compressed / "fermisvd.json").read_text(encoding="utf-8"))["settings"],
    }
    record = new_record(command_line(), protocol) | {"seconds": round(time.perf_counter() - start, 1)}
    write_record(f"anatomy-{arguments.dense.name}", record | found)


if __name__ == "__main__":
    main()
