"""From factors to what a checkpoint stores of them on a grid: int8, fp8 or int4 numbers and their scales.

The factor that sees the layer's input is rounded first, with error feedback in the Gram matrix of that input (B, D of
columns, R_skel). The other one (A, C_skel, D of rows) is fitted to what the first makes of the input as it was rounded,
W C B^T (B C B^T)^-1 with W = A B, and rounded with feedback in the Gram matrix of that, B C B^T. The order was
measured, and that a rotation of the svd form's ranks spreads what few of them would carry (docs/decisions.md).
"""

from collections.abc import Callable, Sequence

import torch

from fermisvd.budget import Form, RankedGroup
from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, MATRIX, PERMUTATION, SKELETON
from fermisvd.pivga import choose_skeleton, least_squares
from fermisvd.rounding import Rounded, round_for_inputs
from fermisvd.schemes import SCHEMES, scheme_for, stored

FIT_RIDGE = 1e-6  # of the median diagonal of B C B^T
Tensors = dict[str, torch.Tensor]
Parts = Sequence[torch.Tensor]  # A (m x r) and B (r x n), or W (m x n); float64


def inputs_of(ranked: RankedGroup) -> dict[str, int]:
    """How many inputs each factor of a group has, by its name."""
    group, rank = ranked.group, ranked.rank
    if ranked.stays_dense:
        return {MATRIX: group.columns}
    if ranked.form == "svd":
        return {LOWRANK_A: rank, LOWRANK_B: group.columns}
    if group.side == "columns":
        return {SKELETON: rank, INTERPOLATION: group.columns - rank}
    return {SKELETON: group.columns, INTERPOLATION: rank}


def grids_of(ranked: RankedGroup) -> dict[str, str] | None:
    """The scheme of each factor of a group, by its name; None where factors are of a floating-point type."""
    if ranked.weights == "auto":
        return None
    weights, inputs = dict(ranked.own), inputs_of(ranked)
    found = {factor: scheme_for(weights.get(factor, ranked.weights), count) for factor, count in inputs.items()}
    return {factor: scheme.name for factor, scheme in found.items() if scheme}


class _Rounding:
    """The grids of one group, and the type of their scales."""

    def __init__(self, ranked: RankedGroup, dtype: torch.dtype):
        self.ranked, self.dtype = ranked, dtype
        self.schemes = {factor: SCHEMES[name] for factor, name in (grids_of(ranked) or {}).items()}

    def __call__(self, factor: str, matrix: torch.Tensor, gram: torch.Tensor) -> Rounded:
        """matrix (m x n) on the factor's grid; gram: of its inputs, (n x n)."""
        return round_for_inputs(matrix, gram, self.schemes[factor], self.dtype)

    def of_members(self, factor: str, rounded: Rounded) -> Tensors:
        """Each member's rows of a factor."""
        rows, found = list(self.ranked.group.member_rows), {}
        parts = zip(rounded.codes.split(rows), rounded.scales.split(rows), strict=True)
        for member, (codes, scales) in zip(self.ranked.group.members, parts, strict=True):
            found |= named(member, stored(rounded.scheme, factor, codes, scales))
        return found

    def of_first(self, factor: str, rounded: Rounded) -> Tensors:
        """A factor that the members share."""
        return named(self.ranked.group.name, stored(rounded.scheme, factor, rounded.codes, rounded.scales))


def named(member: str, tensors: Tensors) -> Tensors:
    return {f"{member}.{name}": tensor for name, tensor in tensors.items()}


def fitted_outputs(
    a: torch.Tensor, product: torch.Tensor, b: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (m x r) with A B X nearest to W X, and the Gram matrix of B X, (r x r).

    a: what A is where X says nothing, since few tokens were seen (m x r); product: W, the product of the factors that
    are stored (m x n); b: B (r x n), as it is stored; gram: C = X X^T, (n x n).
    """
    response = b @ gram
    own = response @ b.T
    energies = own.diagonal()
    seen = energies[energies > 0]
    damped = own.clone()
    damped.diagonal().add_(FIT_RIDGE * seen.median() if len(seen) else 1.0)
    return a + torch.linalg.solve(damped, response @ (product - a @ b).T).T, own


def svd_on_grids(ranked: RankedGroup, parts: Parts, gram: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """B once, and every member's rows of A."""
    rounding = _Rounding(ranked, dtype)
    a, b = parts
    a, b = rotated(*balanced(a, b))
    shared = rounding(LOWRANK_B, b, gram)
    fitted, own = fitted_outputs(a, a @ b, shared.values, gram)
    outputs = rounding(LOWRANK_A, fitted, own)
    return rounding.of_members(LOWRANK_A, outputs) | rounding.of_first(LOWRANK_B, shared)


def pivga_on_grids(ranked: RankedGroup, parts: Parts, gram: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """Skeleton, of every member its rows where the skeleton is of columns; interpolation matrix and permutation."""
    (a, b), rounding, rank = parts, _Rounding(ranked, dtype), ranked.rank
    if ranked.group.side == "rows":
        permutation = choose_skeleton(b.T, a.T)
        first, rest = permutation[:rank].long(), permutation[rank:].long()
        kept, others = a[first] @ b, a[rest] @ b
        skeleton = rounding(SKELETON, kept, gram)
        exact = least_squares(kept.T, others.T)[0].T
        fitted, own = fitted_outputs(exact, others, skeleton.values, gram)
        tensors = rounding.of_first(SKELETON, skeleton) | rounding.of_first(
            INTERPOLATION, rounding(INTERPOLATION, fitted, own)
        )
    else:
        permutation = choose_skeleton(a, b)
        first, rest = permutation[:rank].long(), permutation[rank:].long()
        kept = a @ b[:, first]
        exact = least_squares(kept, a @ b[:, rest])[0]
        interpolation = rounding(INTERPOLATION, exact, gram[rest][:, rest])
        shared = torch.empty_like(b)
        shared[:, first], shared[:, rest] = torch.eye(rank).to(b), interpolation.values
        fitted, own = fitted_outputs(kept, a @ b, shared, gram)
        tensors = rounding.of_members(SKELETON, rounding(SKELETON, fitted, own))
        tensors |= rounding.of_first(INTERPOLATION, interpolation)
    return tensors | {f"{ranked.group.name}.{PERMUTATION}": permutation}


def dense_on_grid(ranked: RankedGroup, parts: Parts, gram: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """Every member's rows of W (m x n), as it is."""
    rounding = _Rounding(ranked, dtype)
    return rounding.of_members(MATRIX, rounding(MATRIX, parts[0], gram))


GRID_TENSORS: dict[Form, Callable[..., Tensors]] = {"svd": svd_on_grids, "pivga": pivga_on_grids}


def rotated(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, its ranks turned by an orthogonal matrix that looks random, the same for as many ranks.

    Columns of A and rows of B are then all of a size, and no few of their entries decide a scale.
    """
    noise = torch.randn(len(b), len(b), dtype=torch.float64, generator=torch.Generator().manual_seed(len(b)))
    turn = torch.linalg.qr(noise)[0].to(b)
    return a @ turn, turn.T @ b


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of A and rows of B equally long, so that neither leaves a narrow type's range."""
    a, b = a.double(), b.double()
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return a * scale, b / scale[:, None]
