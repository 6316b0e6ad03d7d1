"""PivGa: pivoted gauge fixing, which saves r^2 numbers of a rank-r factorisation without loss.

columns: A B = C_skel [I_r | D] P^T     C_skel = A B_0 (m x r),   D = B_0^{-1} B_1 (r x (n-r))
rows:    A B = P [I_r ; D] R_skel       R_skel = A_0 B (r x n),   D = A_1 A_0^{-1} ((m-r) x r)

Rows are the columns of the transpose, so one implementation serves both.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from fermisvd.errors import FermiSVDError
from fermisvd.groups import Side


@dataclass(frozen=True)
class PivGa:
    """skeleton: C_skel or R_skel; interpolation: D; permutation: skeleton indices, then the rest, each ascending."""

    skeleton: torch.Tensor
    interpolation: torch.Tensor
    permutation: torch.Tensor
    side: Side


class PivGaError(FermiSVDError):
    """The factors do not fit the storage type."""


LARGEST_INTERPOLATION = 1.01  # measured, docs/decisions.md
MOST_EXCHANGES = 1000


def choose_skeleton(a: torch.Tensor, b: torch.Tensor, largest: float = LARGEST_INTERPOLATION) -> torch.Tensor:
    """Permutation (n,) that puts r well-conditioned columns of A B first; both parts sorted, so gathers run forward.

    Pivoted QR of R B, A = Q R: same column geometry as A B at r rows instead of m. Then columns are exchanged until no
    entry of D, before rounding, exceeds `largest`: strong rank-revealing QR (Gu and Eisenstat, 1996). Each exchange
    multiplies the skeleton's volume by that entry, so it ends. A product of rank below r has no exchanges.
    """
    rank = len(b)
    reduced = (torch.linalg.qr(a.double(), mode="r")[1] @ b.double()).cpu().numpy()
    found = scipy.linalg.qr(reduced, mode="r", pivoting=True)
    triangle, pivots = found[0][:rank], found[-1]
    diagonal = np.abs(np.diag(triangle))
    if rank < len(pivots) and diagonal.min() > 1e-9 * diagonal.max():  # else D is not unique
        d = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:])
        for _ in range(MOST_EXCHANGES):
            i, j = np.unravel_index(abs(d).argmax(), d.shape)
            if abs(d[i, j]) <= largest:
                break
            exchange(d, i, j)
            pivots[[i, rank + j]] = pivots[[rank + j, i]]
    order = np.concatenate([np.sort(pivots[:rank]), np.sort(pivots[rank:])])
    return torch.from_numpy(order).to(torch.int32)


def exchange(d: np.ndarray, i: int, j: int) -> None:
    """D (r x q), in place, after skeleton column i and other column j have changed places: a Gauss-Jordan step."""
    pivot, column, row = d[i, j], d[:, j].copy(), d[i] / d[i, j]
    d -= np.outer(column, row)
    d[i], d[:, j] = row, -column / pivot
    d[i, j] = 1.0 / pivot


def round_with_error_feedback(d: torch.Tensor, skeleton: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """D rounded to `dtype` row by row, each row's error carried into the rows not yet rounded.

    d: (r x q) float64; skeleton: C (m x r). Greedily minimises |C (D_rounded - D)|_F: with C^T C = R^T R the error is
    |R (D_rounded - D)|_F, and rounding rows from the last up, row i can still absorb what rows below it left behind.
    """
    r_factor = torch.linalg.qr(skeleton.double(), mode="r")[1]
    diagonal = r_factor.diagonal()
    negligible = 1e-12 * diagonal.abs().max()  # a skeleton column that the others span can absorb nothing
    rounded, error = torch.empty_like(d), torch.zeros_like(d)
    for i in range(len(d) - 1, -1, -1):
        carried = (r_factor[i, i + 1 :] @ error[i + 1 :]) / diagonal[i] if diagonal[i].abs() > negligible else 0.0
        rounded[i] = (d[i] - carried).to(dtype).double()
        error[i] = rounded[i] - d[i]
    return rounded


def fix_gauge(
    a: torch.Tensor,
    b: torch.Tensor,
    side: Side,
    dtype: torch.dtype = torch.float64,
    largest: float = LARGEST_INTERPOLATION,
) -> PivGa:
    """PivGa form of A B, (m x r)(r x n), stored in `dtype`.

    In float64 the product is kept exactly. In a narrower type rounding is part of the method: the skeleton is rounded
    first, D is solved by least squares against the rounded skeleton in float64 and rounded with error feedback in the
    skeleton's metric. A B may have a rank below r. largest: as in choose_skeleton. Raises PivGaError if a value
    overflows `dtype`.
    """
    if side == "rows":
        columns = fix_gauge(b.T, a.T, "columns", dtype, largest)
        return PivGa(columns.skeleton.T.contiguous(), columns.interpolation.T.contiguous(), columns.permutation, "rows")
    a, b = a.double(), b.double()
    rank = b.shape[0]
    permutation = choose_skeleton(a, b, largest)
    skeleton_columns, rest = permutation[:rank].long(), permutation[rank:].long()
    skeleton = (a @ b[:, skeleton_columns]).to(dtype)
    refuse_overflow(skeleton, dtype)
    if dtype == torch.float64:
        interpolation = _solve(b[:, skeleton_columns], b[:, rest])
    else:
        interpolation = round_interpolation(skeleton, a @ b[:, rest], dtype)
    refuse_overflow(interpolation, dtype)
    return PivGa(skeleton, interpolation.contiguous(), permutation, "columns")


def round_interpolation(skeleton: torch.Tensor, rest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """D (r x q) in `dtype`, with C D near `rest`. skeleton: C (m x r), as stored; rest: (m x q) float64."""
    if dtype == torch.float64:
        return _solve(skeleton, rest)
    return round_with_error_feedback(_solve(skeleton.double(), rest), skeleton, dtype).to(dtype)


def refuse_overflow(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises PivGaError if the tensor, cast to `dtype`, is no longer finite."""
    if not tensor.isfinite().all():
        raise PivGaError(f"the factors overflow {dtype}; choose a wider storage type")


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Least-squares solution in float64, on the CPU: LAPACK's gelsy copes with dependent columns (dead channels)."""
    solution = torch.linalg.lstsq(matrix.cpu(), right.cpu(), driver="gelsy").solution
    return solution.to(matrix.device)


def dense_product(form: PivGa) -> torch.Tensor:
    """The matrix that the three tensors stand for, float64."""
    if form.side == "rows":
        transposed = PivGa(form.skeleton.T, form.interpolation.T, form.permutation, "columns")
        return dense_product(transposed).T
    skeleton, d = form.skeleton.double(), form.interpolation.double()
    product = torch.empty(len(skeleton), len(form.permutation), dtype=torch.float64, device=skeleton.device)
    product[:, form.permutation.long()] = torch.cat([skeleton, skeleton @ d], dim=1)
    return product
