"""PivGa: pivoted gauge fixing, which saves r^2 numbers of a rank-r factorisation without loss.

columns: A B = C_skel [I_r | D] P^T     C_skel = A B_0 (m x r),   D = B_0^{-1} B_1 (r x (n-r))
rows:    A B = P [I_r ; D] R_skel       R_skel = A_0 B (r x n),   D = A_1 A_0^{-1} ((m-r) x r)

Rows are the columns of the transpose, so one implementation serves both.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from fermisvd import lapack
from fermisvd.errors import NumericalError
from fermisvd.groups import Side
from fermisvd.rounding import round_with_error_feedback, to_type


@dataclass(frozen=True)
class PivGa:
    """skeleton: C_skel or R_skel; interpolation: D; permutation: skeleton indices, then the rest, each ascending."""

    skeleton: torch.Tensor
    interpolation: torch.Tensor
    permutation: torch.Tensor
    side: Side


LARGEST_INTERPOLATION = 1.01  # measured, docs/decisions.md
MOST_EXCHANGES = 1000
DEPENDENT = 1e-10  # part of the largest squared column that counts as nothing: below it squares are rounding


def choose_skeleton(a: torch.Tensor, b: torch.Tensor, largest: float = LARGEST_INTERPOLATION) -> torch.Tensor:
    """Permutation (n,) that puts r well-conditioned columns of A B first; both parts sorted, so gathers run forward.

    Pivoted QR of R B, A = Q R: same column geometry as A B at r rows instead of m. Then columns are exchanged until no
    entry of D, before rounding, exceeds `largest`: strong rank-revealing QR (Gu and Eisenstat, 1996). Each exchange
    multiplies the skeleton's volume by that entry, so it ends. A product of rank below r has no exchanges.
    """
    rank = len(b)
    reduced = torch.linalg.qr(a.double(), mode="r")[1] @ b.double()
    found = pivoted_cholesky(reduced.T @ reduced, rank)
    triangle, order = pivoted_qr(reduced) if found is None else found
    diagonal = triangle.diagonal().abs()
    if rank < len(order) and diagonal.min() > 1e-9 * diagonal.max():  # else D is not unique
        triangle = triangle.to(b.device)
        d = torch.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:], upper=True)
        for _ in range(MOST_EXCHANGES):
            i, j = divmod(int(d.abs().argmax()), d.shape[1])
            if abs(d[i, j]) <= largest:
                break
            exchange(d, i, j)
            order[[i, rank + j]] = order[[rank + j, i]]
    return torch.cat([order[:rank].sort().values, order[rank:].sort().values]).to(b.device, torch.int32)


def pivoted_cholesky(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """R (rank x n) and the order (n,) of M's columns in which M = Q R, from M^T M (n x n), which may be overwritten.

    They are those of pivoted QR: the next column is the one with most left outside the span of those before. QR reads
    all columns left at every step; LAPACK's dpstrf reads one, and does the rest by matrix products. It runs on the CPU
    whatever the device, as does `pivoted_qr`: on a GPU each column would be a few launches. But squares have half of
    the digits: None where a column has less than DEPENDENT of the largest left.
    """
    host = gram.cpu().numpy()
    order, found = lapack.pivoted_cholesky(host, DEPENDENT * host.diagonal().max())
    return None if found < rank else (torch.from_numpy(host[:rank]).triu(), torch.from_numpy(order))


def pivoted_qr(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R (r x n) and the order (n,) of M's columns in which M (r x n) = Q R, by LAPACK's geqp3 on the CPU."""
    found = scipy.linalg.qr(columns.cpu().numpy(), mode="r", pivoting=True)
    return torch.from_numpy(found[0]), torch.from_numpy(found[-1].astype(np.int64))


def exchange(d: torch.Tensor, i: int, j: int) -> None:
    """D (r x q), in place, after skeleton column i and other column j have changed places: a Gauss-Jordan step."""
    pivot, column, row = d[i, j].clone(), d[:, j].clone(), d[i] / d[i, j]
    d.addr_(column, row, alpha=-1)
    d[i], d[:, j] = row, -column / pivot
    d[i, j] = 1.0 / pivot


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
    skeleton's metric. A B may have a rank below r. largest: as in choose_skeleton. Raises NumericalError if a value
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
        interpolation = least_squares(b[:, skeleton_columns], b[:, rest])[0]
    else:
        interpolation = round_interpolation(skeleton, a @ b[:, rest], dtype)
    refuse_overflow(interpolation, dtype)
    return PivGa(skeleton, interpolation.contiguous(), permutation, "columns")


def round_interpolation(skeleton: torch.Tensor, rest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """D (r x q) in `dtype`, with C D near `rest`. skeleton: C (m x r), as stored; rest: (m x q) float64."""
    solution, triangle = least_squares(skeleton.double(), rest)
    if dtype == torch.float64:
        return solution
    return round_with_error_feedback(solution, triangle, to_type(dtype)).to(dtype)


def refuse_overflow(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises NumericalError if the tensor, cast to `dtype`, is no longer finite."""
    if not tensor.isfinite().all():
        raise NumericalError(f"the factors overflow {dtype}; choose a wider storage type")


def least_squares(matrix: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X with M X nearest to `right`, and R with R^T R = M^T M. matrix: M (m x r), m >= r; right: (m x q); float64.

    Householder QR where M lies. Dependent columns (dead channels) need LAPACK's gelsy; scipy's, since torch's is given
    uninitialised pivots and then stops at the first dependent column, or not (pytorch issue 187411).
    """
    reflectors, scales = torch.geqrf(matrix)
    triangle = reflectors[: matrix.shape[1]].triu()
    diagonal = triangle.diagonal().abs()
    if diagonal.min() > 1e-12 * diagonal.max():
        projected = torch.ormqr(reflectors, scales, right, transpose=True)[: len(triangle)]
        return torch.linalg.solve_triangular(triangle, projected, upper=True), triangle
    solution = scipy.linalg.lstsq(matrix.cpu().numpy(), right.cpu().numpy(), lapack_driver="gelsy")
    assert solution is not None
    return torch.from_numpy(solution[0]).to(matrix.device), triangle


def dense_product(form: PivGa) -> torch.Tensor:
    """The matrix that the three tensors stand for, float64."""
    if form.side == "rows":
        transposed = PivGa(form.skeleton.T, form.interpolation.T, form.permutation, "columns")
        return dense_product(transposed).T
    skeleton, d = form.skeleton.double(), form.interpolation.double()
    product = torch.empty(len(skeleton), len(form.permutation), dtype=torch.float64, device=skeleton.device)
    product[:, form.permutation.long()] = torch.cat([skeleton, skeleton @ d], dim=1)
    return product
