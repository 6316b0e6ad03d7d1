"""Rounding a matrix to a floating-point type, or to a grid of few numbers and scales, with error feedback.

Rows are rounded one after the other, and what one is off by is carried into those that are not yet rounded, as far as
these can make up for it in a metric. For a weight whose columns meet correlated inputs that is GPTQ; for PivGa's D it
is what the skeleton's columns have in common. One algorithm serves both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fermisvd.schemes import Scheme, dequantised

BLOCK = 64  # rows that are rounded between two matrix products
SHRINKS = torch.linspace(1.0, 0.5, 26)  # parts of the largest value that a grid may end at
RIDGE = 1e-2  # of the median diagonal of a Gram matrix: what few tokens decide is not followed

Nearest = Callable[[int, torch.Tensor], torch.Tensor]  # a row's number and what it should be -> what it can be


def to_type(dtype: torch.dtype) -> Nearest:
    """Rounding to a floating-point type."""
    return lambda _, row: row.to(dtype).double()


def round_with_error_feedback(d: torch.Tensor, triangle: torch.Tensor, nearest: Nearest) -> torch.Tensor:
    """D rounded row by row, each row's error carried into the rows not yet rounded, float64.

    d: (r x q) float64; triangle: R (r x r), upper triangular. Greedily minimises |R (D_rounded - D)|_F: rounding rows
    from the last up, row i can still absorb what rows below it left behind. What a block of rows absorbs from those
    below it is one product; within it a row is three operations, which on a GPU are three launches that nobody waits
    for.
    """
    diagonal = triangle.diagonal()
    # a row whose metric the others span can absorb nothing
    scale = torch.where(diagonal.abs() > 1e-12 * diagonal.abs().max(), 1 / diagonal, 0.0)
    carries = triangle * scale[:, None]
    rounded, error = torch.empty_like(d), torch.zeros_like(d)
    for stop in range(len(d), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        wanted = d[start:stop] - carries[start:stop, stop:] @ error[stop:]
        for i in range(stop - 1, start - 1, -1):
            rounded[i] = nearest(i, wanted[i - start])
            torch.sub(rounded[i], d[i], out=error[i])
            wanted[: i - start].addr_(carries[start:i, i], error[i], alpha=-1)
    return rounded


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid. codes: numbers of the grid, (m x n) float64; scales: (m x groups), as stored."""

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """The matrix that is stored, float64."""
        return dequantised(self.scheme, self.codes, self.scales.double())


def best_scales(
    matrix: torch.Tensor, scheme: Scheme, dtype: torch.dtype, energies: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales (m x groups) in `dtype` with which the nearest numbers of the grid are least off.

    matrix: (m x n) float64; energies: (n,), what a squared error of each input counts. The largest value alone would
    decide with SHRINKS of 1 only; a grid that ends below it is finer for all others.
    """
    columns = matrix.shape[1]
    if not matrix.numel():
        return matrix.new_ones(len(matrix), scheme.groups(columns), dtype=dtype)
    size = scheme.group_size or columns
    padding = scheme.groups(columns) * size - columns
    parts = torch.nn.functional.pad(matrix, (0, padding)).unflatten(1, (-1, size))
    weights = matrix.new_ones(columns) if energies is None else energies
    weights = torch.nn.functional.pad(weights, (0, padding)).view(-1, size)
    most = parts.abs().amax(-1) / min(-scheme.least, scheme.largest)
    best, scales = torch.full_like(most, torch.inf), most.to(dtype)
    for shrink in SHRINKS.tolist():
        trial = torch.where(most > 0, (most * shrink).clamp(min=smallest(dtype)), 0.0).to(dtype)
        step = safe(trial)[..., None]
        error = ((scheme.nearest(parts / step) * step - parts).square() * weights).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, trial, scales)
    return safe(scales).to(dtype)


def smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a floating-point type."""
    of_type = torch.finfo(dtype)
    return of_type.smallest_normal * of_type.eps


def safe(scales: torch.Tensor) -> torch.Tensor:
    """The scales in float64, 1 where a row of zeros has none."""
    wide = scales.double()
    return torch.where(wide > 0, wide, 1.0)


def round_to_nearest(matrix: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Rounded:
    """Each entry by itself. matrix: (m x n) float64; dtype: of the scales."""
    scales = best_scales(matrix, scheme, dtype)
    return Rounded(scheme, scheme.nearest(matrix / scheme.spread(scales.double(), matrix.shape[1])), scales)


def round_for_inputs(matrix: torch.Tensor, gram: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Rounded:
    """A matrix (m x n) float64 on a grid, near to it for inputs with this Gram matrix (n x n), with error feedback.

    Inputs of most energy are rounded first, while all others can still make up for them (GPTQ, arXiv 2210.17323).
    """
    energies = gram.diagonal()
    scales = best_scales(matrix, scheme, dtype, energies)
    if not matrix.numel():
        return Rounded(scheme, matrix, scales)
    steps = scheme.spread(scales.double(), matrix.shape[1]).expand_as(matrix)
    order = energies.argsort()
    triangle = metric_root(gram[order][:, order])
    columns = steps.T[order]
    rounded = round_with_error_feedback(
        matrix.T[order], triangle, lambda i, row: scheme.nearest(row / columns[i]) * columns[i]
    )
    values = torch.empty_like(matrix)
    values[:, order] = rounded.T
    return Rounded(scheme, scheme.nearest(values / steps), scales)


def metric_root(gram: torch.Tensor) -> torch.Tensor:
    """R, upper triangular, with R^T R = C and a little on its diagonal, (n x n) float64."""
    damped = gram.to(torch.float64, copy=True)
    energies = damped.diagonal()
    seen = energies[energies > 0]
    damped.diagonal().add_(RIDGE * seen.median() if len(seen) else 1.0)
    return torch.linalg.cholesky(damped, upper=True)
