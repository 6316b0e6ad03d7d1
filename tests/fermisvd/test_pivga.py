from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fermisvd.decomposition import data_aware_svd
from fermisvd.errors import NumericalError
from fermisvd.pivga import (
    choose_skeleton,
    dense_product,
    exchange,
    fix_gauge,
    least_squares,
    pivoted_cholesky,
)

SIDES = ["columns", "rows"]


def random_factors(m, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, r, dtype=torch.float64, generator=generator),
        torch.randn(r, n, dtype=torch.float64, generator=generator),
    )


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data(), st.sampled_from(SIDES))
def test_lossless_in_float64(m, n, data, side):
    r = data.draw(st.integers(1, min(m, n)))
    a, b = random_factors(m, n, r, seed=m * 41 + n)
    gauge = fix_gauge(a, b, side)
    product = a @ b
    assert (dense_product(gauge) - product).abs().max() <= 1e-10 * product.abs().max()
    stored = gauge.skeleton.numel() + gauge.interpolation.numel()
    assert stored == r * (m + n) - r * r


@pytest.mark.parametrize("side", SIDES)
def test_skeleton_is_a_part_of_the_product(side):
    a, b = random_factors(20, 30, 7)
    gauge = fix_gauge(a, b, side)
    skeleton = gauge.permutation[:7].long()
    product = a @ b
    torch.testing.assert_close(gauge.skeleton, product[:, skeleton] if side == "columns" else product[skeleton])


@pytest.mark.parametrize("side", SIDES)
def test_permutation_is_sorted_in_both_halves(side):
    a, b = random_factors(20, 30, 7)
    permutation = fix_gauge(a, b, side).permutation
    assert permutation.dtype == torch.int32
    assert sorted(permutation.tolist()) == list(range(30 if side == "columns" else 20))
    assert (permutation[:7].diff() > 0).all() and (permutation[7:].diff() > 0).all()


def test_skeleton_is_well_conditioned():
    """Pivoted QR keeps the interpolation small even where the first r columns are almost dependent."""
    a, b = random_factors(40, 60, 10)
    b[:, :10] = b[:, :1] + 1e-9 * b[:, :10]
    assert dense_product(fix_gauge(a, b, "columns")).sub(a @ b).abs().max() < 1e-9
    assert fix_gauge(a, b, "columns").interpolation.abs().max() < 20


@pytest.mark.parametrize("largest", [1.0001, 1.1])
def test_no_entry_of_the_interpolation_exceeds_the_bound(largest):
    """Reference: D by numpy's solver. Pivoted QR alone does not hold the bound on this product."""
    a, b = random_factors(40, 90, 30)
    b = b.cumsum(0)

    def interpolation(order):
        product, order = (a @ b).numpy(), order.long()
        return np.linalg.lstsq(product[:, order[:30]], product[:, order[30:]], rcond=None)[0]

    assert abs(interpolation(choose_skeleton(a, b, np.inf))).max() > 1.15
    assert abs(interpolation(choose_skeleton(a, b, largest))).max() <= largest + 1e-9


@pytest.mark.parametrize("shape", [(30, 90), (150, 300), (64, 200), (40, 40)])
def test_pivoted_cholesky_is_pivoted_qr(shape):
    """Reference: LAPACK's geqp3. More rows than one block, and just one."""
    rank, n = shape
    columns = torch.randn(rank, n, dtype=torch.float64) * torch.logspace(0, -2, rank, dtype=torch.float64)[:, None]
    found = pivoted_cholesky(columns.T @ columns, rank)
    assert found is not None
    result: Any = scipy.linalg.qr(columns.numpy(), mode="r", pivoting=True)  # its type depends on the arguments
    factor, pivots = result
    assert found[1][:rank].tolist() == pivots[:rank].tolist()
    expected = torch.from_numpy(factor)[:, torch.from_numpy(pivots.astype(np.int64)).argsort()].abs()
    torch.testing.assert_close(found[0][:, found[1].argsort()].abs(), expected, rtol=1e-6, atol=1e-9)


def test_pivoted_cholesky_stops_where_squares_say_nothing():
    columns = torch.randn(10, 20, dtype=torch.float64)
    columns[9] *= 1e-7
    assert pivoted_cholesky(columns.T @ columns, 9) is not None
    assert pivoted_cholesky(columns.T @ columns, 10) is None
    a = torch.randn(30, 10, dtype=torch.float64)
    assert (dense_product(fix_gauge(a, columns, "columns")) - a @ columns).abs().max() < 1e-9


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(2, 9), st.data())
def test_exchange_is_the_interpolation_of_the_exchanged_columns(r, q, data):
    """Reference: D solved anew."""
    i, j = data.draw(st.integers(0, r - 1)), data.draw(st.integers(0, q - 1))
    columns = np.random.default_rng(r * 10 + q).standard_normal((r, r + q))
    d = np.linalg.solve(columns[:, :r], columns[:, r:])
    exchange(torch.from_numpy(d), i, j)
    columns[:, [i, r + j]] = columns[:, [r + j, i]]
    np.testing.assert_allclose(d, np.linalg.solve(columns[:, :r], columns[:, r:]), rtol=1e-6, atol=1e-7)


def test_skeleton_does_not_depend_on_the_gauge_of_the_factors():
    a, b = random_factors(20, 30, 7)
    mixing = torch.randn(7, 7, dtype=torch.float64) + 3 * torch.eye(7)
    assert torch.equal(choose_skeleton(a, b), choose_skeleton(a @ mixing, torch.linalg.solve(mixing, b)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["repeated", "zero channels", "zero channels between", "all zero"])
def test_product_of_lower_rank_is_kept(side, dtype, case):
    """Dead channels and padded heads give products whose rank is below r."""
    a, b = random_factors(20, 30, 7)
    if case == "repeated":
        b[3], a[:, 5] = b[2], a[:, 4]
    elif case == "zero channels":
        b[:, 5:], a[5:] = 0, 0
    elif case == "zero channels between":
        b[:, :26:2], b[:, 1:20:2], a[:16:2], a[1:12:2] = 0, 0, 0, 0
    else:
        b.zero_()
    gauge, product = fix_gauge(a, b, side, dtype), a @ b
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    assert (dense_product(gauge) - product).abs().max() <= tolerance * product.abs().max()


def test_overflow_is_refused():
    a, b = random_factors(20, 30, 7)
    with pytest.raises(NumericalError, match="float16"):
        fix_gauge(1e6 * a, b, "columns", torch.float16)


def calibrated_factors(m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, dtype=torch.float64, generator=generator)
    x = torch.randn(n, n, dtype=torch.float64, generator=generator) @ torch.randn(
        n, 500, dtype=torch.float64, generator=generator
    )
    return data_aware_svd(w, x @ x.T).truncated(r)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 96, 32), (96, 48, 20), (64, 64, 60)])
def test_rounding_is_no_worse_than_plain_casting(side, dtype, shape):
    for seed in range(3):
        a, b = calibrated_factors(*shape, seed=seed)
        exact, product = fix_gauge(a, b, side), a @ b
        cast = type(exact)(exact.skeleton.to(dtype), exact.interpolation.to(dtype), exact.permutation, side)
        rounded = fix_gauge(a, b, side, dtype)
        assert rounded.skeleton.dtype == rounded.interpolation.dtype == dtype
        assert (dense_product(rounded) - product).norm() <= (dense_product(cast) - product).norm() * (1 + 1e-9)


@pytest.mark.parametrize("case", ["independent", "a zero column", "repeated columns"])
def test_least_squares(case):
    """Reference: numpy's, by SVD. Of dependent columns any solution will do: the residual is compared."""
    matrix, right = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    if case == "a zero column":
        matrix[:, 3] = 0
    elif case == "repeated columns":
        matrix[:, 3] = matrix[:, 7]
    solution, metric = least_squares(matrix, right)
    expected = torch.from_numpy(np.linalg.lstsq(matrix.numpy(), right.numpy(), rcond=None)[0])
    torch.testing.assert_close(matrix @ solution, matrix @ expected)
    torch.testing.assert_close(metric.T @ metric, matrix.T @ matrix)
    if case == "independent":
        torch.testing.assert_close(solution, expected)
