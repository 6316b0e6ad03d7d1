import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fermisvd import decomposition
from fermisvd.decomposition import (
    OutputGram,
    both_factors,
    data_aware_svd,
    group_factors,
    group_spectrum,
    kfac_svd,
    one_factor,
)

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_problem(m: int, n: int, tokens: int = 200):
    mixing = torch.randn(n, n, dtype=torch.float64)
    x = mixing @ torch.randn(n, tokens, dtype=torch.float64)
    return torch.randn(m, n, dtype=torch.float64), x


def output_error(w, x, rank, factors):
    a, b = factors.truncated(rank)
    return ((w @ x - a @ b @ x) ** 2).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_tail_of_the_spectrum(shape):
    w, x = make_problem(*shape)
    factors = data_aware_svd(w, x @ x.T)
    sigma = factors.sigma
    for rank in range(1, min(shape) + 1):
        tail = (sigma[rank:] ** 2).sum()
        assert output_error(w, x, rank, factors) == pytest.approx(tail.item(), abs=1e-9 * (sigma**2).sum().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_svd_of_the_whitened_weight(shape):
    """Reference: torch.linalg.svd of W S with a Cholesky S, which a well-conditioned C allows."""
    w, x = make_problem(*shape)
    gram = x @ x.T
    factors = data_aware_svd(w, gram)
    u, sigma = factors.a, factors.sigma
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
    factors = data_aware_svd(stacked, x @ x.T)
    a, b = factors.truncated(10)
    error = sum(((w @ x - part @ b @ x) ** 2).sum() for w, part in zip([wq, wk], a.split([20, 8]), strict=True))
    assert error == pytest.approx((factors.sigma[10:] ** 2).sum().item(), rel=1e-9)


def test_full_rank_is_exact():
    for shape in SHAPES:
        w, x = make_problem(*shape)
        a, b = data_aware_svd(w, x @ x.T).truncated(min(shape))
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
    factors = data_aware_svd(w, x @ x.T, damping)
    u, sigma = factors.a, factors.sigma
    assert u.isfinite().all() and sigma.isfinite().all()
    torch.testing.assert_close(u.T @ u, torch.eye(min(shape), dtype=torch.float64))
    for rank in (1, 6, min(shape)):
        tail = (sigma[rank:] ** 2).sum()
        # damping counts unseen directions too, so the spectrum's tail is an upper bound of the loss
        assert output_error(w, x, rank, factors) <= tail + 1e-8 * (sigma**2).sum() + 1e-12


def test_damping_orders_directions_that_calibration_never_saw():
    w, x = make_problem(6, 8)
    x[:4] = 0
    w[:, 4:] = 0
    w[:, 0] *= 100
    u = data_aware_svd(w, x @ x.T, damping=1e-6).a
    best = torch.linalg.svd(w)[0][:, 0]
    assert abs((u[:, 0] @ best).item()) == pytest.approx(1, abs=1e-6)


def test_singular_values_descend():
    w, x = make_problem(30, 12)
    sigma = data_aware_svd(w, x @ x.T).sigma
    assert (sigma.diff() <= 0).all()


def make_kfac_problem(m: int, n: int, spread: float = 1.0, tokens: int = 300):
    """W, inputs, output gradients (m, tokens) whose covariance is not round, and the OutputGram of them."""
    w, x = make_problem(m, n, tokens)
    scales = torch.logspace(0, -spread, m, dtype=torch.float64)[:, None]
    g = torch.randn(m, m, dtype=torch.float64) @ (scales * torch.randn(m, tokens, dtype=torch.float64))
    covariance = g @ g.T
    matrix = covariance if m <= n else w.T @ covariance @ w
    return w, x, covariance, OutputGram(matrix, covariance.diagonal().mean().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_kfac_is_the_svd_between_both_roots(shape, damping):
    """Reference: torch.linalg.svd of L^T W S with Cholesky roots, mapped back by solving with them."""
    w, x, covariance, output = make_kfac_problem(*shape)
    factors = kfac_svd(w, x @ x.T, output, output_damping=damping)
    ridge = damping * covariance.diagonal().mean() * torch.eye(shape[0], dtype=torch.float64)
    left, right = torch.linalg.cholesky(covariance + ridge), torch.linalg.cholesky(x @ x.T)
    u, sigma, vh = torch.linalg.svd(left.T @ w @ right, full_matrices=False)
    torch.testing.assert_close(factors.sigma, sigma, rtol=1e-5, atol=1e-6 * sigma[0].item())
    for rank in {1, min(shape) // 2, min(shape)} - {0}:
        a, b = factors.truncated(rank)
        whitened = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        best = torch.linalg.solve(left.T, torch.linalg.solve(right.T, whitened.T).T)
        torch.testing.assert_close(a @ b, best, rtol=0, atol=1e-6 * w.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["kfac", "no gradients", "input"])
def test_spectrum_is_that_of_the_factors(shape, case):
    w, x, _, output = make_kfac_problem(*shape)
    outputs = [OutputGram(torch.zeros_like(output.matrix), 0.0) if case == "no gradients" else output]
    given = [w], x @ x.T, None if case == "input" else outputs
    expected = group_factors(*given).sigma
    torch.testing.assert_close(group_spectrum(*given), expected, rtol=1e-9, atol=1e-7 * expected[0].item())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_kfac_beats_input_whitening_in_the_loss_that_it_minimises(shape):
    w, x, covariance, output = make_kfac_problem(*shape, spread=2.0)
    gram = x @ x.T

    def loss(a, b):
        error = w - a @ b
        return (covariance @ error @ gram @ error.T).trace().item()

    for rank in (2, 6, 10):
        ours = loss(*kfac_svd(w, gram, output, output_damping=0.0).truncated(rank))
        assert ours < 0.9 * loss(*data_aware_svd(w, gram).truncated(rank))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_kfac_without_gradients_is_input_whitening(shape):
    w, x = make_problem(*shape)
    nothing = OutputGram(torch.zeros(min(shape), min(shape), dtype=torch.float64), 0.0)
    a, b = kfac_svd(w, x @ x.T, nothing).truncated(5)
    reference = data_aware_svd(w, x @ x.T).truncated(5)
    torch.testing.assert_close(a @ b, reference[0] @ reference[1])


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("case", ["no inputs", "dead inputs", "dead outputs", "one token"])
def test_kfac_with_singular_matrices(shape, case):
    """At full rank the product is W, and every rank is finite, whatever calibration did not see."""
    w, x, covariance, _ = make_kfac_problem(*shape)
    if case == "no inputs":
        x = torch.zeros_like(x)
    elif case == "dead inputs":
        x[::2] = 0
    elif case == "dead outputs":
        covariance[::2] = 0
        covariance[:, ::2] = 0
    else:
        x, covariance = x[:, :1], covariance[:, :1] @ covariance[:1]
        covariance = covariance @ covariance.T
    matrix = covariance if shape[0] <= shape[1] else w.T @ covariance @ w
    factors = kfac_svd(w, x @ x.T, OutputGram(matrix, covariance.diagonal().mean().item()), 1e-6)
    assert factors.a.isfinite().all() and factors.b.isfinite().all() and factors.sigma.isfinite().all()
    torch.testing.assert_close(factors.a @ factors.b, w, rtol=0, atol=1e-6 * w.abs().max().item())


def whitened_loss(w, gram, covariance, a, b):
    """tr(G E C E^T), E = W - A B, densely in float64."""
    error = w.double() - a.double() @ b.double()
    return (covariance @ error @ gram @ error.T).trace().item()


def least_loss(w, gram, covariance, rank):
    """The least that rank r can reach: discarded squares of torch.linalg.svd(L^T W S), roots by eigendecomposition."""

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt()

    sigma = torch.linalg.svdvals(root(covariance).T @ w.double() @ root(gram))
    return (sigma[rank:] ** 2).sum().item()


def massive_problem(m: int, n: int):
    """Inputs as language models have them: variances over three decades, but two channels a thousand times as large as
    they would be."""
    w, x, covariance, output = make_kfac_problem(m, n, spread=1.0, tokens=4 * n)
    x = torch.logspace(0, -1.5, n, dtype=torch.float64)[:, None] * x
    x[[1, n // 2]] *= 1e3
    return w, x @ x.T, covariance, output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whitening", ["input", "kfac"])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_product_of_its_rank_loses_less(device, whitening, shape, dtype):
    """Also in float32, and with activations a thousand times the others."""
    w, gram, covariance, output = massive_problem(*shape)
    w = w.to(dtype)
    if whitening == "input":
        covariance = torch.eye(shape[0], dtype=torch.float64)
        factors = data_aware_svd(w.to(device), gram.to(device))
    else:
        if shape[0] > shape[1]:
            output = OutputGram(w.double().T @ covariance @ w.double(), output.mean)
        output = OutputGram(output.matrix.to(device), output.mean)
        factors = kfac_svd(w.to(device), gram.to(device), output, output_damping=0.0)
        if shape[0] > shape[1]:  # the loss that it minimises has the ridge that it takes to factorise C
            gram.diagonal().add_(decomposition.SMALLEST_DAMPING * gram.diagonal().median())
    assert factors.a.dtype == factors.b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for rank in (15, 30, 45):
        loss = whitened_loss(w, gram, covariance, *(f.cpu() for f in factors.truncated(rank)))
        least = least_loss(w, gram, covariance, rank)
        assert loss == pytest.approx(least, rel=1e-6 if dtype == torch.float64 else 1e-3)
        assert (factors.sigma[rank:] ** 2).sum().item() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("whitening", ["input", "kfac"])
@pytest.mark.parametrize("shape", [(20, 90), (90, 20)])
def test_slices_change_nothing(shape, whitening, monkeypatch):
    w, x, _, output = make_kfac_problem(*shape)

    def products():
        gram = x @ x.T
        factors = data_aware_svd(w, gram, 1e-3) if whitening == "input" else kfac_svd(w, gram, output, 1e-3)
        return [a @ b for a, b in map(factors.truncated, (5, 10, 20))]

    whole = products()
    monkeypatch.setattr(decomposition, "SLICE", 32)  # does not divide 90
    torch.testing.assert_close(products(), whole)


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that torch operations make."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("whitening", ["input", "kfac"])
def test_no_second_matrix_as_large_as_the_gram_matrix(whitening, monkeypatch):
    monkeypatch.setattr(decomposition, "SLICE", 64)
    w, x, _, output = make_kfac_problem(32, 256)
    gram = x @ x.T
    with LargestStorage() as made:
        data_aware_svd(w, gram, 1e-6) if whitening == "input" else kfac_svd(w, gram, output, 1e-6)
    assert 0 < made.bytes <= w.nbytes


def kept_and_made_again(weight, factors):
    """As the converter keeps factors: one of them, in float32."""
    kept = {name: tensor if name == "sigma" else tensor.float() for name, tensor in one_factor(factors).items()}
    return kept, both_factors(weight, kept)


def extreme_problem(m: int, n: int, dtype: torch.dtype):
    """As `massive_problem`, but one channel has 10^6 times the median's energy."""
    w, x, covariance, output = make_kfac_problem(m, n, spread=1.0, tokens=4 * n)
    x = torch.logspace(0, -1.5, n, dtype=torch.float64)[:, None] * x
    energy = x.square().sum(1)
    x[n // 3] *= (1e6 * energy.median() / energy[n // 3]).sqrt()
    w, gram = w.to(dtype), x @ x.T
    matrix = covariance if m <= n else w.double().T @ covariance @ w.double()
    return w, gram, covariance, OutputGram(matrix, output.mean)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whitening", ["input", "kfac"])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_from_one_of_them_and_rounded_matrices_lose_no_more(device, whitening, shape, dtype):
    """Reference: float64 throughout, with a channel that has a million times the others' energy."""
    w, gram, covariance, output = extreme_problem(shape[0], shape[1], dtype)
    damped = gram + decomposition.DAMPING * gram.diagonal().median() * torch.eye(len(gram), dtype=torch.float64)
    rounded = OutputGram(output.matrix.float().double().to(device), output.mean)
    narrow = gram.float().to(device)
    if whitening == "input":
        covariance = torch.eye(shape[0], dtype=torch.float64)
        exact = data_aware_svd(w.double(), gram, decomposition.DAMPING)
        factors = data_aware_svd(w.to(device), narrow, decomposition.DAMPING)
    else:
        covariance = covariance + decomposition.OUTPUT_DAMPING * output.mean * torch.eye(shape[0], dtype=torch.float64)
        exact = kfac_svd(w.double(), gram, output, decomposition.DAMPING)
        factors = kfac_svd(w.to(device), narrow, rounded, decomposition.DAMPING)
    kept, again = kept_and_made_again(w.to(device), factors)
    assert again.a.dtype == again.b.dtype == torch.float32 and again.orthonormal == (whitening == "input")
    k = min(shape)
    assert sum(tensor.numel() for tensor in kept.values()) == k + k * (shape[0] if whitening == "input" else k)
    for rank in (15, 30, 45):
        least = whitened_loss(w, damped, covariance, *exact.truncated(rank))
        loss = whitened_loss(w, damped, covariance, *(factor.cpu() for factor in again.truncated(rank)))
        assert loss == pytest.approx(least, rel=1e-5)
    a, b = again.a.cpu().double(), again.b.cpu().double()
    error = (a @ b - w.double()).abs()
    if whitening == "kfac":
        assert (error <= 2**-24 * (a.abs() @ b.abs())).all()  # only the factor that was made is rounded
    assert error.max() <= 4e-7 * w.abs().max()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("whitening", ["input", "kfac"])
def test_singular_weights_are_made_again(shape, whitening):
    """Half of W's rows and columns are zero: W has no inverse, but what is kept gives both factors."""
    w, x, _, _ = make_kfac_problem(*shape)
    w[::2], w[:, ::2] = 0, 0
    covariance = torch.eye(shape[0], dtype=torch.float64)
    output = OutputGram(covariance if shape[0] <= shape[1] else w.T @ w, 1.0)
    gram = x @ x.T
    factors = data_aware_svd(w, gram, 1e-6) if whitening == "input" else kfac_svd(w, gram, output, 1e-6)
    _, again = kept_and_made_again(w, factors)
    torch.testing.assert_close(again.a @ again.b, w.float())
    for rank in (2, 5):
        a, b = factors.truncated(rank)
        torch.testing.assert_close(again.a[:, :rank] @ again.b[:rank], (a @ b).float())


@pytest.mark.parametrize("shape", [(20, 90), (90, 20)])
def test_slices_change_nothing_in_what_is_made_again(shape, monkeypatch):
    w, x, _, output = make_kfac_problem(*shape)
    factors = kfac_svd(w, x @ x.T, output, 1e-3)
    whole = kept_and_made_again(w, factors)[1]
    monkeypatch.setattr(decomposition, "SLICE", 32)  # does not divide 90
    sliced = kept_and_made_again(w, factors)[1]
    torch.testing.assert_close((sliced.a, sliced.b), (whole.a, whole.b))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_arguments_are_not_changed(shape):
    w, x, _, output = make_kfac_problem(*shape)
    gram = x @ x.T
    before = [t.clone() for t in (w, gram, output.matrix)]
    data_aware_svd(w, gram, 0.1)
    kfac_svd(w, gram, output, 0.1)
    for now, then in zip((w, gram, output.matrix), before, strict=True):
        assert torch.equal(now, then)


def test_root_of_a_matrix_that_rounding_made_indefinite_is_lifted_to_the_ridge_of_its_largest_channel():
    """Reference: the matrix before it was rounded to float32. One channel has a million times the others' energy."""
    shared = torch.rand(60, 1, dtype=torch.float64) + 1
    shared[7] *= 1e3
    rows = 1e3 * shared @ torch.randn(1, 20, dtype=torch.float64) + 1e-2 * torch.randn(60, 20, dtype=torch.float64)
    matrix, ridge = rows @ rows.T, 1e-3
    rounded = matrix.float().double()
    assert torch.linalg.eigvalsh(rounded)[0] < -10 * ridge
    root = decomposition._root(rounded, ridge)
    scaled = root / matrix.diagonal().sqrt()[:, None]
    expected = ridge / matrix.diagonal().max()
    assert torch.linalg.eigvalsh(scaled @ scaled.T)[0] == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(root @ root.T, matrix, rtol=0, atol=1e-7 * matrix.abs().max().item())


@pytest.mark.parametrize("case", ["definite", "singular", "indefinite by rounding"])
def test_root(case):
    rows = torch.randn(20, 20 if case == "definite" else 7, dtype=torch.float64)
    matrix = rows @ rows.T
    if case == "indefinite by rounding":
        matrix -= 1e-14 * torch.eye(20, dtype=torch.float64)
    root = decomposition._root(matrix, 0.0)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, matrix, rtol=0, atol=1e-12)
    ridge = 3.0 * torch.eye(20, dtype=torch.float64)
    root = decomposition._root(matrix, 3.0)
    torch.testing.assert_close(root @ root.T, matrix + ridge)


@pytest.mark.parametrize("whitening", ["input", "kfac"])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
def test_damping_does_not_follow_a_few_huge_channels(whitening, shape):
    """Reference: the least loss that C itself, undamped, allows. With a ridge of DAMPING times the mean of diag C,
    which the two channels make alone, the worst of these loses between 43 and 430 % more."""
    w, gram, covariance, output = massive_problem(*shape)
    if whitening == "input":
        covariance = torch.eye(shape[0], dtype=torch.float64)
        factors = data_aware_svd(w, gram, decomposition.DAMPING)
    else:
        if shape[0] > shape[1]:
            output = OutputGram(w.T @ covariance @ w, output.mean)
        factors = kfac_svd(w, gram, output, decomposition.DAMPING, output_damping=0.0)
    for rank in (15, 30, 45):
        loss = whitened_loss(w, gram, covariance, *factors.truncated(rank))
        assert loss <= (1 + 1e-6) * least_loss(w, gram, covariance, rank)


def test_ridge_of_dead_and_huge_channels():
    energy = torch.tensor([0.0, 1e-9, 2.0, 4.0, 8e6, 0.0, 3.0], dtype=torch.float64)
    assert decomposition.input_ridge(torch.diag(energy), 0.5) == 1.5
    assert decomposition.input_ridge(torch.zeros(3, 3), 0.5) == 0


def test_factors_are_not_multiplied_in_tf32():
    w, x = make_problem(12, 30)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert data_aware_svd(w.float(), x @ x.T).b.dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
    assert data_aware_svd(w.float(), x @ x.T).b.dtype == torch.float32
