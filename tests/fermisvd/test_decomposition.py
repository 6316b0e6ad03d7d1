import pytest
import torch

from fermisvd.decomposition import data_aware_svd, low_rank_factors

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1)]


def make_problem(m: int, n: int, tokens: int = 200):
    mixing = torch.randn(n, n, dtype=torch.float64)
    x = mixing @ torch.randn(n, tokens, dtype=torch.float64)
    return torch.randn(m, n, dtype=torch.float64), x


def output_error(w, x, rank, u):
    a, b = low_rank_factors(u, w, rank)
    return ((w @ x - a @ b @ x) ** 2).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_tail_of_the_spectrum(shape):
    w, x = make_problem(*shape)
    u, sigma = data_aware_svd(w, x @ x.T)
    for rank in range(1, min(shape) + 1):
        tail = (sigma[rank:] ** 2).sum()
        assert output_error(w, x, rank, u) == pytest.approx(tail.item(), abs=1e-9 * (sigma**2).sum().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_svd_of_the_whitened_weight(shape):
    """Reference: torch.linalg.svd of W S with a Cholesky S, which a well-conditioned C allows."""
    w, x = make_problem(*shape)
    gram = x @ x.T
    u, sigma = data_aware_svd(w, gram)
    u_reference, sigma_reference, _ = torch.linalg.svd(w @ torch.linalg.cholesky(gram), full_matrices=False)
    torch.testing.assert_close(sigma, sigma_reference, rtol=1e-6, atol=1e-6 * sigma[0].item())
    rank = max(1, min(shape) // 2)
    projector = u[:, :rank] @ u[:, :rank].T
    torch.testing.assert_close(projector, u_reference[:, :rank] @ u_reference[:, :rank].T, rtol=0, atol=1e-7)


def test_joint_group_is_the_svd_of_the_stacked_matrix():
    """One B for all members, A split by rows: the stacked problem's best fit, so no split of rank does better."""
    wq, x = make_problem(20, 24)
    wk = torch.randn(8, 24, dtype=torch.float64)
    stacked = torch.cat([wq, wk])
    u, sigma = data_aware_svd(stacked, x @ x.T)
    a, b = low_rank_factors(u, stacked, 10)
    error = sum(((w @ x - part @ b @ x) ** 2).sum() for w, part in zip([wq, wk], a.split([20, 8]), strict=True))
    assert error == pytest.approx((sigma[10:] ** 2).sum().item(), rel=1e-9)


def test_full_rank_is_exact():
    for shape in SHAPES:
        w, x = make_problem(*shape)
        u, _ = data_aware_svd(w, x @ x.T)
        a, b = low_rank_factors(u, w, min(shape))
        torch.testing.assert_close(a @ b, w)


@pytest.mark.parametrize("case", ["dead channels", "few tokens", "repeated columns", "all zero"])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_singular_gram_matrices(case, damping, shape):
    w, x = make_problem(*shape)
    if case == "dead channels":
        x[::2] = 0
    elif case == "few tokens":
        x = x[:, :5]
    elif case == "repeated columns":
        x[1::2] = x[::2]
    else:
        x = torch.zeros_like(x)
    u, sigma = data_aware_svd(w, x @ x.T, damping)
    assert u.isfinite().all() and sigma.isfinite().all()
    torch.testing.assert_close(u.T @ u, torch.eye(min(shape), dtype=torch.float64))
    for rank in (1, 6, min(shape)):
        tail = (sigma[rank:] ** 2).sum()
        # damping counts unseen directions too, so the spectrum's tail is an upper bound of the loss
        assert output_error(w, x, rank, u) <= tail + 1e-8 * (sigma**2).sum() + 1e-12


def test_damping_orders_directions_that_calibration_never_saw():
    w, x = make_problem(6, 8)
    x[:4] = 0
    w[:, 4:] = 0
    w[:, 0] *= 100
    u, _ = data_aware_svd(w, x @ x.T, damping=1e-6)
    best = torch.linalg.svd(w)[0][:, 0]
    assert abs((u[:, 0] @ best).item()) == pytest.approx(1, abs=1e-6)


def test_singular_values_descend():
    w, x = make_problem(30, 12)
    _, sigma = data_aware_svd(w, x @ x.T)
    assert (sigma.diff() <= 0).all()
