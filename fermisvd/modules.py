"""Reference torch modules of the two forms: short and plain, the ground truth for the serving kernels."""

import torch
from torch import nn
from torch.nn import functional

from fermisvd.format import PERMUTATION, Group


class CompressedLinear(nn.Module):
    """Base of the three layers: y = (the group's shared part of x) seen through this member's rows.

    `first` is the group's first member, which holds the shared tensors; kept in a tuple, so that torch does not
    register them a second time.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, first: "CompressedLinear | None"):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._first = () if first is None else (first,)
        self.bias = _parameter(out_features) if bias else None

    @property
    def first(self) -> "CompressedLinear":
        return self._first[0] if self._first else self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """svd form: y = (x B^T) A^T. x: (..., n); B: (r, n), shared; A: (m, r)."""

    def __init__(self, in_features, out_features, rank, bias=False, first=None):
        super().__init__(in_features, out_features, rank, bias, first)
        self.lowrank_a = _parameter(out_features, rank)
        if first is None:
            self.lowrank_b = _parameter(rank, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.first.lowrank_b), self.lowrank_a, self.bias)


class PivGaColumnsLinear(CompressedLinear):
    """pivga form, columns: t = x[skel] + x[rest] D^T; y = t C_skel^T. D: (r, n-r) and P shared; C_skel: (m, r)."""

    def __init__(self, in_features, out_features, rank, bias=False, first=None):
        super().__init__(in_features, out_features, rank, bias, first)
        self.skeleton = _parameter(out_features, rank)
        if first is None:
            self.interpolation = _parameter(rank, in_features - rank)
            self.register_buffer(PERMUTATION, torch.arange(in_features, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        permuted = x[..., self.first.permutation]
        kept, rest = permuted[..., : self.rank], permuted[..., self.rank :]
        return functional.linear(kept + functional.linear(rest, self.first.interpolation), self.skeleton, self.bias)


class PivGaRowsLinear(CompressedLinear):
    """pivga form, rows: z = x R_skel^T; y = P [z ; z D^T]. R_skel: (r, n); D: (m-r, r)."""

    def __init__(self, in_features, out_features, rank, bias=False, first=None):
        super().__init__(in_features, out_features, rank, bias, first)
        self.skeleton = _parameter(rank, in_features)
        self.interpolation = _parameter(out_features - rank, rank)
        self.register_buffer(PERMUTATION, torch.arange(out_features, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = functional.linear(x, self.skeleton)
        y = torch.cat([z, functional.linear(z, self.interpolation)], dim=-1)
        y = y[..., torch.argsort(self.permutation)]
        return y if self.bias is None else y + self.bias


def module_class(group: Group) -> type[CompressedLinear]:
    """The layer class of a group's form and side."""
    if group.form == "svd":
        return LowRankLinear
    return PivGaRowsLinear if group.side == "rows" else PivGaColumnsLinear


def replace_group(model: nn.Module, group: Group) -> None:
    """Replace the members' nn.Linear by empty compressed layers, on their device and in their type.

    Raises KeyError naming a member that the model does not have as a linear layer.
    """
    first = None
    for name in group.members:
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            dense = None
        if not isinstance(dense, nn.Linear):
            raise KeyError(f"group {group.name}: the model has no linear layer {name}")
        with dense.weight.device:
            layer = module_class(group)(
                dense.in_features, dense.out_features, group.rank, dense.bias is not None, first
            )
        model.set_submodule(name, layer.to(dense.weight.dtype))
        first = first or layer


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)
