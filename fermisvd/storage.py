"""From factors to what a checkpoint stores: a group's entry in the config, and its tensors."""

import math
from collections.abc import Callable

import torch

from fermisvd.budget import Form, RankedGroup
from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, PERMUTATION, SKELETON, Group, expected_tensors
from fermisvd.groups import LinearGroup
from fermisvd.pivga import fix_gauge

ORDER = (LOWRANK_A, LOWRANK_B, INTERPOLATION, PERMUTATION, SKELETON)  # in which a group's tensors are written


def config_group(ranked: RankedGroup) -> Group:
    """The config's entry of a compressed group."""
    side = ranked.group.side if ranked.form == "pivga" else None
    return Group(members=ranked.group.members, form=ranked.form, side=side, rank=ranked.rank)


def compressed_tensors(
    ranked: RankedGroup, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of one group as stored, by name. a: A (m x r); b: B (r x n)."""
    return STORED[ranked.form](ranked.group, a, b, dtype)


def stored_bytes(ranked: RankedGroup, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor of a group, by name in the order of writing: known before any value is."""
    shapes = expected_tensors(config_group(ranked), ranked.group.member_rows, ranked.group.columns)
    kind = {name: name.rpartition(".")[2] for name in shapes}
    return {
        name: math.prod(shapes[name]) * (torch.int32 if kind[name] == PERMUTATION else dtype).itemsize
        for name in sorted(shapes, key=lambda name: ORDER.index(kind[name]))
    }


def svd_tensors(group: LinearGroup, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """B once, and every member's rows of A."""
    a, b = balanced(a, b)
    parts = a.to(dtype).split(list(group.member_rows))
    tensors = {f"{name}.{LOWRANK_A}": part for name, part in zip(group.members, parts, strict=True)}
    return tensors | {f"{group.name}.{LOWRANK_B}": b.to(dtype)}


def pivga_tensors(group: LinearGroup, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Skeleton, of every member its rows where the skeleton is of columns; interpolation matrix and permutation."""
    gauge = fix_gauge(a, b, group.side, dtype)
    tensors = {f"{group.name}.{INTERPOLATION}": gauge.interpolation, f"{group.name}.{PERMUTATION}": gauge.permutation}
    skeletons = [gauge.skeleton] if group.side == "rows" else gauge.skeleton.split(list(group.member_rows))
    return tensors | {f"{name}.{SKELETON}": part for name, part in zip(group.members, skeletons, strict=True)}


STORED: dict[Form, Callable[..., dict[str, torch.Tensor]]] = {"svd": svd_tensors, "pivga": pivga_tensors}


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of A and rows of B equally long, so that neither leaves a narrow type's range."""
    a, b = a.double(), b.double()
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return a * scale, b / scale[:, None]
