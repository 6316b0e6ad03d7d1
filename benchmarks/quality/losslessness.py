"""How lossless is PivGa, beside what rounding alone does?

    python -m benchmarks.quality.losslessness [MODEL ...]

KL(svd form || pivga form) of the same factors. Both forms are run as the reference modules, weights and activations in
the type named. `plain` rounds skeleton and interpolation matrix as they come; `solved` solves D by least squares
against the rounded skeleton; `feedback`, what the converter writes, rounds D with error feedback too (fermisvd.pivga);
`pivoted` is `feedback` with the skeleton of pivoted QR alone, `bound_1.1` and so on with columns exchanged until no
entry of D exceeds that.
Results: benchmarks/results/losslessness.json.
"""

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.quality.table import models
from benchmarks.records import command_line, new_record, write_record
from fermisvd import load_model
from fermisvd.budget import Budget, Form, RankedGroup
from fermisvd.calibration import gram_matrices
from fermisvd.decomposition import data_aware_svd
from fermisvd.format import INTERPOLATION, PERMUTATION, SKELETON
from fermisvd.groups import LinearGroup, find_groups, stacked_weight
from fermisvd.losses import StudentLoss
from fermisvd.modules import replace_group
from fermisvd.pivga import PivGa, dense_product, fix_gauge
from fermisvd.storage import config_group, pivga_tensors, svd_tensors
from fermisvd.teacher import teach
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

REMOVE, WINDOWS = 0.3, 32
BOUNDS = (2.0, 1.3, 1.1, 1.02, 1.0001)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tensors = Callable[[LinearGroup, torch.Tensor, torch.Tensor, torch.dtype], dict[str, torch.Tensor]]


def feedback(group, a, b, dtype):
    return pivga_tensors(group, a, b, dtype)


def plain(group, a, b, dtype):
    exact = fix_gauge(a, b, group.side)
    return _named(group, PivGa(exact.skeleton.to(dtype), exact.interpolation.to(dtype), exact.permutation, group.side))


def solved(group, a, b, dtype):
    exact = fix_gauge(a, b, group.side)
    product = dense_product(exact)
    if group.side == "rows":
        product = product.T
    skeleton = (exact.skeleton.T if group.side == "rows" else exact.skeleton).to(dtype)
    rest = product[:, exact.permutation[skeleton.shape[1] :].long()]
    d = torch.linalg.lstsq(skeleton.double(), rest, driver="gelsy").solution.to(dtype)
    if group.side == "rows":
        skeleton, d = skeleton.T, d.T
    return _named(group, PivGa(skeleton.contiguous(), d.contiguous(), exact.permutation, group.side))


def bounded(largest: float, name: str) -> Tensors:
    """feedback, its skeleton's columns exchanged down to another bound."""

    def tensors(group, a, b, dtype):
        return _named(group, fix_gauge(a, b, group.side, dtype, largest))

    tensors.__name__ = name
    return tensors


def _named(group: LinearGroup, gauge: PivGa) -> dict[str, torch.Tensor]:
    parts = [gauge.skeleton] if group.side == "rows" else gauge.skeleton.split(list(group.member_rows))
    tensors = {f"{name}.{SKELETON}": part for name, part in zip(group.members, parts, strict=True)}
    return tensors | {
        f"{group.name}.{INTERPOLATION}": gauge.interpolation,
        f"{group.name}.{PERMUTATION}": gauge.permutation,
    }


def build(path: Path, compressed: list, form: Form, tensors_of: Tensors, dtype: torch.dtype) -> nn.Module:
    """The model with every group in that form, all of it in `dtype`."""
    model, state = load_model(path), {}
    for group, rank, a, b in compressed:
        replace_group(model, config_group(RankedGroup(group, rank, form)))
        state |= tensors_of(group, a, b, dtype)
    torch.nn.Module.to(model, dtype)
    missing = model.load_state_dict(state, strict=False).unexpected_keys
    assert not missing, missing
    return model


def measure(path: Path, calibration: torch.Tensor, windows: torch.Tensor) -> dict:
    dense = load_model(path)
    groups = find_groups(dense)
    grams = gram_matrices(dense, [g.source for g in groups], calibration.split(8))
    compressed, budget = [], Budget.removing(REMOVE, "pivga", align=1)
    for group, rank in zip(groups, budget.ranks(groups, budget.uniform_ranks(groups)), strict=True):
        a, b = data_aware_svd(stacked_weight(dense, group), grams[group.source], 1e-6).truncated(rank)
        compressed.append((group, rank, a, b))

    def kl(reference: nn.Module, student: nn.Module) -> float:
        return StudentLoss(student, teach(reference, windows, 8), 8)()

    exact = build(path, compressed, "svd", svd_tensors, torch.float32)
    found = {"dense || svd form, float32": kl(dense, exact)}
    for name, dtype in DTYPES.items():
        rounded = build(path, compressed, "svd", svd_tensors, dtype)
        if dtype != torch.float32:
            found[f"svd form: float32 || {name}"] = kl(exact, rounded)
        skeletons = [bounded(math.inf, "pivoted"), *(bounded(bound, f"bound_{bound}") for bound in BOUNDS)]
        for rounding in (plain, solved, feedback, *(skeletons if dtype == torch.bfloat16 else ())):
            pivga = build(path, compressed, "pivga", rounding, dtype)
            found[f"{name}: svd form || pivga form, {rounding.__name__}"] = kl(rounded, pivga)
            if dtype != torch.float32:
                found[f"svd form, float32 || pivga form, {name}, {rounding.__name__}"] = kl(exact, pivga)
    return found


def main() -> None:
    protocol = {"remove": REMOVE, "windows": WINDOWS, "ranks": "uniform, pivga, joint"}
    results = new_record(command_line(), protocol) | {"kl": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models(Path(scratch)).items():
            if name not in (sys.argv[1:] or [name]):
                continue
            tokenizer = load_tokenizer(model["path"])
            calibration = torch.cat([windows_of(tokenizer, str(p), 256, 64, bos=False) for p in model["calibration"]])
            windows = windows_of(tokenizer, str(model["evaluation"]), 256, WINDOWS, bos=False)
            results["kl"][name] = measure(model["path"], calibration, windows)
            for key, value in results["kl"][name].items():
                print(f"{name}: {key}: {value:.2e}", flush=True)
            write_record("losslessness", results)


if __name__ == "__main__":
    main()
