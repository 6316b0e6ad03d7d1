"""The Fermi gate on a group's spectrum, and the linear layers that it opens and closes.

The student layer is A diag(F(mu)) B, where A B = W is the group's ordered decomposition (A = U, B = U^T W with the
paper's whitening); with the gate open it is the dense teacher.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from fermisvd.groups import LinearGroup, decoder_blocks
from fermisvd.linear import linear_layer
from fermisvd.running.streaming import fill_for_good

TAIL = 8.0  # gates below exp(-TAIL) are left out of the products
WIDTH = 64  # step of the products' widths: oneDNN compiles for each width, and a GPU likes them even


def fermi_gate(mu: torch.Tensor, full_rank: int, temperature: float) -> torch.Tensor:
    """F_j(mu) = 1 / (1 + exp((j - mu) / (N T))), j = 0..k-1, N = k. mu: scalar; returns (k,)."""
    j = torch.arange(full_rank, dtype=mu.dtype, device=mu.device)
    return torch.sigmoid((mu - j) / (full_rank * temperature))


class GatedGroup(nn.Module):
    """What the members of a gated group share: B of W = A B, (k x n), and the gate.

    `gate` is F (k,), or None for the dense teacher: A B = W. The student is two thin products, x B^T diag(F) A^T, and
    only as wide as the gate is open; nothing of the size of W is made, and B x is computed once for all members.
    """

    def __init__(self, b: torch.Tensor, readers: int = 1):
        super().__init__()
        self.b, self.readers = nn.Parameter(b, requires_grad=False), readers
        self.full_rank, self.dtype, self.device = len(b), b.dtype, b.device  # of B whole, should it be sharded
        self.set_gate(None, self.full_rank)

    def set_gate(self, gate: torch.Tensor | None, open_rank: int) -> None:
        """gate: F (k,) or None; open_rank: how many of its entries are not negligible."""
        self.gate, self.open_rank = gate, open_rank
        self._forget()

    def _forget(self) -> None:
        self._input: torch.Tensor | None = None
        self._projected: torch.Tensor | None = None
        self._reads = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """F B x, (..., open_rank), remembered until all members have read it."""
        if self._projected is None or self._input is not x:
            projected = functional.linear(x, self.b[: self.open_rank])
            self._projected = projected if self.gate is None else projected * self.gate[: self.open_rank]
            self._input, self._reads = x, 0
        projected = self._projected
        self._reads += 1
        if self._reads == self.readers:
            self._forget()
        return projected


class GatedLinear(nn.Module):
    """A member of a gated group. a: its rows of A, (m_i x k)."""

    def __init__(self, a: torch.Tensor, group: GatedGroup, bias: torch.Tensor | None):
        super().__init__()
        self.a, self.group, self.bias = nn.Parameter(a, requires_grad=False), group, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.group(x), self.a[:, : self.group.open_rank], self.bias)


def install_gates(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    factors_of: Callable[[LinearGroup], tuple[torch.Tensor, torch.Tensor]],
    shard: bool = False,
) -> list[GatedGroup]:
    """Replace the groups' linear layers by gated ones, one group at a time, and free the dense weights.

    factors_of: gives A (m x k) and B (k x n) of a group, W = A B. A streamed model's blocks are filled one after the
    other, so that dense weights and factors are never all in memory; shard: with each block's weights then divided
    among the processes (FSDP2), so that the model may be larger than a device. Returns the gated groups, in order.
    """
    gated, prefix = {}, decoder_blocks(model)
    for number, block in model.get_submodule(prefix).named_children():
        fill_for_good(block)
        for group in groups:
            if not group.name.startswith(f"{prefix}.{number}."):
                continue
            layers = [linear_layer(model, name) for name in group.members]
            a, b = (factor.to(layers[0].weight).contiguous() for factor in factors_of(group))
            gated[group.name] = shared = GatedGroup(b, len(layers))
            for name, layer, rows in zip(group.members, layers, a.split(list(group.member_rows)), strict=True):
                model.set_submodule(name, GatedLinear(rows, shared, layer.bias))
        if shard:
            fully_shard(block, reshard_after_forward=True)
    return [gated[group.name] for group in groups]


def set_gates(gated: Sequence[GatedGroup], mus: torch.Tensor, temperature: float, tail: float = TAIL) -> None:
    """The student with F(mu) on every group's spectrum, differentiable in mus (groups,); gates below exp(-tail) are
    left out."""
    for shared, mu in zip(gated, mus, strict=True):
        gate = fermi_gate(mu, shared.full_rank, temperature).to(shared.device, shared.dtype)
        width = int(mu.item() + tail * shared.full_rank * temperature) + 1
        shared.set_gate(gate, min(shared.full_rank, -(-width // WIDTH) * WIDTH))


def open_gates(gated: Sequence[GatedGroup]) -> None:
    """Make the student the teacher again."""
    for group in gated:
        group.set_gate(None, group.full_rank)


def cut(gated: Sequence[GatedGroup], ranks: Sequence[int]) -> None:
    """Every group at its whole rank: A_r B_r."""
    for shared, rank in zip(gated, ranks, strict=True):
        shared.set_gate(None, rank)
