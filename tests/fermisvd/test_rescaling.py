"""Rescaling: its gradient by finite differences, its curvature by the matrices, its effect on a truncated model."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fermisvd.calibration import calibration_grams
from fermisvd.compress import InMemory
from fermisvd.decomposition import OutputGram, kfac_svd
from fermisvd.gates import install_gates
from fermisvd.groups import find_groups
from fermisvd.losses import StudentLoss
from fermisvd.rescaling import Bands, gradient, put_weights, rescale, search
from fermisvd.teacher import teach

RANK = 5


@pytest.fixture(scope="module")
def truncated():
    """Gated student cut to RANK, its groups' kept singular values, tokens calibrated on, and what the teacher says of
    other windows; float64."""
    torch.manual_seed(0)
    sizes: dict = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=32, initializer_range=0.4, **sizes)
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    windows = torch.randint(40, (40, 12))
    groups = find_groups(model, "separate")
    members = [group.name for group in groups]
    decomposition = InMemory(model, *calibration_grams(model, members, members, windows.split(8)))
    student = copy.deepcopy(model)
    factors = {group: decomposition.factors(group).truncated(RANK) for group in groups}
    gated = install_gates(student, groups, lambda group: factors[group])
    sigmas = [decomposition.sigma(group)[:RANK] for group in groups]
    return student, gated, sigmas, windows.numel(), teach(model, windows, 8)


def test_gradient_is_the_finite_difference(truncated):
    student, gated, sigmas, _, taught = truncated
    bands, loss = Bands.of([RANK] * len(sigmas), 2), StudentLoss(student, taught, 8)
    scales = 1 + 0.1 * torch.rand(len(bands.sizes), dtype=torch.float64)
    found = gradient(student, gated, bands, scales, taught, batch_size=4)
    for band in (0, 5, len(scales) - 1):
        change = torch.zeros_like(scales)
        change[band] = 1e-3
        values = []
        for sign in (1, -1):
            put_weights(gated, bands.weights(scales + sign * change))
            values.append(loss())
        assert found[band].item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=5e-3, abs=2e-4)


def test_curvature_is_what_the_matrices_say():
    """(a_j^T G a_j)(b_j C b_j^T) = sigma_j^2, and nothing between two directions."""
    torch.manual_seed(0)
    for m, n in ((6, 9), (9, 6)):
        w = torch.randn(m, n, dtype=torch.float64)
        x, g = torch.randn(40, n, dtype=torch.float64), torch.randn(40, m, dtype=torch.float64)
        gram, output = x.T @ x, g.T @ g
        side = output if m <= n else w.T @ output @ w
        factors = kfac_svd(w, gram, OutputGram(side, output.diagonal().mean().item()), output_damping=0.0)
        curvature = (factors.a.T @ output @ factors.a) * (factors.b @ gram @ factors.b.T)
        torch.testing.assert_close(
            curvature, factors.sigma.square().diag(), rtol=1e-6, atol=1e-6 * curvature.max().item()
        )


def test_bands_share_weights_and_sums():
    bands = Bands.of([5, 1], count=2)
    assert bands.sizes.tolist() == [3, 2, 1]
    assert bands.sums(torch.arange(6.0)).tolist() == [3, 7, 5]
    assert [each.tolist() for each in bands.weights(torch.tensor([1.0, 2.0, 3.0]))] == [[1, 1, 1, 2, 2], [3]]


def test_search_doubles_while_the_loss_falls():
    assert search(lambda step: (step - 0.3) ** 2, 0.09) == (0.25, pytest.approx(0.0025))
    assert search(lambda step: 1.0, 1.0) == (0.0, 1.0)


def test_loss_on_windows_aside_falls(truncated):
    student, gated, sigmas, tokens, taught = truncated
    put_weights(gated, [torch.ones(RANK)] * len(gated))
    loss, records = StudentLoss(student, taught[:8], 8), []
    before = loss()
    weights = rescale(student, gated, sigmas, tokens, taught[8:], taught[:8], batch_size=4, on_round=records.append)
    assert records[0]["kl"] == pytest.approx(before) and records[0]["rescaled_kl"] < before
    put_weights(gated, weights)
    assert loss() == pytest.approx(min(record["rescaled_kl"] for record in records), rel=1e-4)
    assert [len(each) for each in weights] == [RANK] * len(gated)
