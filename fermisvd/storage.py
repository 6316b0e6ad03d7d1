"""From factors to what a checkpoint stores: a group's entry in the config, and its tensors."""

import torch

from fermisvd.budget import Form
from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, PERMUTATION, SKELETON, Group
from fermisvd.groups import LinearGroup
from fermisvd.pivga import fix_gauge


def config_group(group: LinearGroup, rank: int, form: Form) -> Group:
    """The config's entry of a compressed group."""
    return Group(members=group.members, form=form, side=group.side if form == "pivga" else None, rank=rank)


def compressed_tensors(
    group: LinearGroup, a: torch.Tensor, b: torch.Tensor, form: Form, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of one group as stored, by name. a: A (m x r); b: B (r x n)."""
    if form == "svd":
        a, b = balanced(a, b)
        parts = a.to(dtype).split(list(group.member_rows))
        tensors = {f"{name}.{LOWRANK_A}": part for name, part in zip(group.members, parts, strict=True)}
        return tensors | {f"{group.name}.{LOWRANK_B}": b.to(dtype)}
    gauge = fix_gauge(a, b, group.side, dtype)
    tensors = {f"{group.name}.{INTERPOLATION}": gauge.interpolation, f"{group.name}.{PERMUTATION}": gauge.permutation}
    skeletons = [gauge.skeleton] if group.side == "rows" else gauge.skeleton.split(list(group.member_rows))
    return tensors | {f"{name}.{SKELETON}": part for name, part in zip(group.members, skeletons, strict=True)}


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of A and rows of B equally long, so that neither leaves a narrow type's range."""
    a, b = a.double(), b.double()
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return a * scale, b / scale[:, None]
