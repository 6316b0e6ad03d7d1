"""From factors to what a checkpoint stores: a group's entry in the config, and its tensors."""

import math
from collections.abc import Callable, Sequence

import torch

from fermisvd.budget import Form, RankedGroup
from fermisvd.decomposition import Decomposition
from fermisvd.format import (
    INTERPOLATION,
    LOWRANK_A,
    LOWRANK_B,
    MATRIX,
    PERMUTATION,
    SKELETON,
    Group,
    expected_tensors,
    factor_of,
)
from fermisvd.grids import GRID_TENSORS, balanced, dense_on_grid, grids_of
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair
from fermisvd.pivga import fix_gauge

ORDER = (LOWRANK_A, LOWRANK_B, INTERPOLATION, PERMUTATION, SKELETON, MATRIX)  # in which a group's tensors are written


def config_group(ranked: RankedGroup) -> Group:
    """The config's entry of a compressed group."""
    group, form = ranked.group, "dense" if ranked.stays_dense else ranked.form
    side = group.side if form == "pivga" else None
    rank = group.full_rank if form == "dense" else ranked.rank
    return Group(members=group.members, form=form, side=side, rank=rank, schemes=grids_of(ranked))


def compressed_tensors(
    ranked: RankedGroup, parts: Sequence[torch.Tensor], dtype: torch.dtype, gram: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of one group as stored, by name.

    parts: A (m x r) and B (r x n), or W (m x n) alone of a group that stays dense, on a grid; dtype: of factors, or of
    a grid's scales; gram: C of the group's inputs, (n x n), which rounding to a grid asks for.
    """
    if ranked.weights == "auto":
        return STORED[ranked.form](ranked.group, *parts, dtype)
    assert gram is not None
    make = dense_on_grid if ranked.stays_dense else GRID_TENSORS[ranked.form]
    return make(ranked, [part.double() for part in parts], gram.double(), dtype)


def parts_of(
    ranked: RankedGroup, factors_of: Callable[[LinearGroup], Pair], decomposition: Decomposition | None
) -> tuple[torch.Tensor, ...]:
    """What a group is stored from: A (m x r) and B (r x n), or W (m x n) alone where it stays dense."""
    if not ranked.stays_dense:
        return factors_of(ranked.group)
    assert decomposition is not None
    return (decomposition.weights(ranked.group),)


def group_tensors(
    ranked: RankedGroup,
    factors_of: Callable[[LinearGroup], Pair],
    decomposition: Decomposition | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    """`compressed_tensors` of a group, made on a device. factors_of: gives A and B of one that does not stay dense, at
    its rank; decomposition: None will do for factors on no grid."""
    gram = None
    if ranked.weights != "auto":
        assert decomposition is not None
        gram = decomposition.gram(ranked.group.source).to(device)
    parts = [part.to(device) for part in parts_of(ranked, factors_of, decomposition)]
    return compressed_tensors(ranked, parts, dtype, gram)


def stored_bytes(ranked: RankedGroup, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor of a group, by name in the order of writing: known before any value is."""
    group = config_group(ranked)
    shapes = expected_tensors(group, ranked.group.member_rows, ranked.group.columns)
    kind = {name: name.rpartition(".")[2] for name in shapes}

    def order(name: str) -> tuple[int, str]:
        return ORDER.index(factor_of(kind[name])), kind[name]

    return {
        name: math.prod(shapes[name]) * (group.type_of(kind[name]) or dtype).itemsize
        for name in sorted(shapes, key=order)
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
