import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fermisvd.budget import Budget, SoftBudget, dense_parameters, group_parameters
from fermisvd.decomposition import data_aware_svd
from fermisvd.errors import NumericalError
from fermisvd.fermigrad import PLATEAU_STEPS, FermiGradSettings, gated_kl, on_a_plateau, optimise_ranks
from fermisvd.gates import GatedGroup, GatedLinear, fermi_gate, install_gates, open_gates, set_gates
from fermisvd.groups import Partition, find_groups, stacked_weight
from fermisvd.linear import linear_layer
from fermisvd.losses import kl_divergence
from fermisvd.running.blocks import checkpointed
from fermisvd.running.halves import HEAD_TOKENS, halves_of
from fermisvd.teacher import teach


def test_gate_is_the_printed_formula():
    n, temperature, mu = 50, 0.02, 20.3
    expected = [1 / (1 + math.exp((j - mu) / (n * temperature))) for j in range(n)]
    gate = fermi_gate(torch.tensor(mu, dtype=torch.float64), n, temperature)
    torch.testing.assert_close(gate, torch.tensor(expected, dtype=torch.float64))


def test_gate_opens_fully_above_the_box():
    gate = fermi_gate(torch.tensor(64 * (1 + 6 * 0.01)), 64, 0.01)
    assert gate.min() > 0.997


@pytest.mark.parametrize("bias", [False, True])
def test_gated_layer_is_the_formula_in_float64(bias):
    """Reference: U diag(F) U^T W x by plain matrix products, its gradients by autograd."""
    w = torch.randn(6, 9, dtype=torch.float64)
    factors = data_aware_svd(w, torch.eye(9, dtype=torch.float64))
    b = torch.randn(6, dtype=torch.float64) if bias else None
    shared = GatedGroup(factors.b)
    layer = GatedLinear(factors.a, shared, b)
    x = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, w, b))  # teacher
    gate = torch.rand(6, dtype=torch.float64, requires_grad=True)
    shared.set_gate(gate, 6)
    direct = nn.functional.linear(x, factors.a @ torch.diag(gate) @ factors.a.T @ w, b)
    torch.testing.assert_close(layer(x), direct)
    weight = torch.randn_like(direct)
    ours = torch.autograd.grad((layer(x) * weight).sum(), [x, gate])
    reference = torch.autograd.grad((direct * weight).sum(), [x, gate])
    for got, want in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, want)


def gated_model(folder, partition: Partition = "joint", dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    groups = find_groups(model, partition)
    bases = {}
    for group in groups:
        mixing = torch.randn(group.columns, group.columns, dtype=torch.float64)
        bases[group.name] = data_aware_svd(stacked_weight(model, group), mixing @ mixing.T)
    return model, groups, install_gates(model, groups, lambda g: bases[g.name].truncated(g.full_rank))


@pytest.mark.parametrize("partition", ["joint", "separate"])
def test_open_gates_give_the_teacher(tiny_llama, partition):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    model, _, _ = gated_model(tiny_llama, partition)
    ids = torch.randint(2048, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits)


def test_gradient_in_mu_equals_finite_differences(tiny_llama):
    model, groups, gated = gated_model(tiny_llama)
    ids = torch.randint(2048, (2, 12))
    with torch.no_grad():
        teacher = model(input_ids=ids).logits

    def loss(mus):
        for group, shared, mu in zip(groups, gated, mus, strict=True):
            shared.set_gate(fermi_gate(mu, group.full_rank, 0.02), group.full_rank)
        log_p, log_q = teacher.log_softmax(-1), model(input_ids=ids).logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    mus = torch.tensor([0.6 * g.full_rank for g in groups], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(mus), mus)
    for i in range(len(groups)):
        step = torch.zeros_like(mus)
        step[i] = 0.02  # Hugging Face's norms and softmax compute in float32, so a smaller step drowns in rounding
        with torch.no_grad():
            difference = (loss(mus + step) - loss(mus - step)) / 0.04
        assert gradient[i].item() == pytest.approx(difference.item(), rel=2e-3, abs=1e-5)
    assert (gradient < 0).any()


def test_kl_is_the_definition():
    p, q = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_kl_gradient_is_autograd_s_over_several_slices():
    """Reference: the definition, differentiated by autograd; more tokens than a slice holds."""
    tokens = HEAD_TOKENS + 37
    p = torch.randn(tokens, 1, 5)
    ours, reference = (torch.randn(tokens, 1, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    value = kl_divergence(p, ours.requires_grad_())
    log_p, log_q = p.log_softmax(-1), reference.requires_grad_().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(value, expected)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, reference.grad)


def test_narrow_products_equal_the_whole_ones(tiny_llama):
    """Gates closed beyond the tail are left out; reference: nothing left out."""
    model, groups, gated = gated_model(tiny_llama)
    ids = torch.randint(2048, (2, 12))
    with torch.no_grad():
        teacher = model(input_ids=ids).logits

    halves = halves_of(model)
    with torch.no_grad():
        taught = halves.body(ids)

    def gradient(loss, mus):
        return loss, *torch.autograd.grad(loss, mus)

    mus = torch.tensor([0.3 * g.full_rank for g in groups], dtype=torch.float64, requires_grad=True)
    narrow = gradient(gated_kl(halves, gated, ids, taught, mus, 0.01), mus)
    assert all(g.open_rank < g.full_rank for g in gated)
    open_gates(gated)
    set_gates(gated, mus, 0.01, tail=1000.0)
    assert all(g.open_rank == g.full_rank for g in gated)
    whole = gradient(kl_divergence(teacher, model(input_ids=ids).logits), mus)
    for ours, expected in zip(narrow, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=5e-3, atol=1e-6)


def test_nothing_of_a_forward_pass_is_kept_once_all_members_have_read(tiny_llama):
    model, groups, gated = gated_model(tiny_llama)
    with torch.no_grad():
        model(input_ids=torch.randint(2048, (1, 6)))
    assert any(len(g.members) > 1 for g in groups)
    assert all(shared._projected is None for shared in gated)


def test_plateau_needs_enough_steps_at_the_target():
    plateau, half = 0.01, PLATEAU_STEPS
    records = [{"kl": 1.0, "kept": 0.8}] * (2 * half)
    assert on_a_plateau(records, 0.8, plateau)
    assert not on_a_plateau(records[:-1], 0.8, plateau)
    assert not on_a_plateau([{"kl": 1.0, "kept": 0.9}, *records[1:]], 0.8, plateau)
    assert not on_a_plateau(records[:half] + [{"kl": 0.9, "kept": 0.8}] * half, 0.8, plateau)
    assert not on_a_plateau(records, 0.8, FermiGradSettings().plateau)


def test_default_steps_can_end_on_a_plateau(tiny_llama):
    model, groups, gated = gated_model(tiny_llama, dtype=torch.float32)
    taught = teach(model, torch.randint(2048, (16, 8)), 8)
    settings = FermiGradSettings(plateau=1.0)  # whatever is gained, it is less
    _, records = optimise_ranks(model, groups, gated, taught, Budget(0.8, "pivga"), settings, batch_size=8, seed=0)
    assert len(records) < settings.steps


def test_projection_keeps_each_group_in_its_own_box(tiny_llama):
    budget = SoftBudget(find_groups(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)), "pivga")
    count = len(budget.full_rank)
    low, high = torch.linspace(0.05, 0.3, count).double(), torch.linspace(1.0, 0.6, count).double()
    shifted = budget.project(torch.linspace(0.9, 0.1, count).double(), 0.7, low, high)
    assert (shifted >= low).all() and (shifted <= high).all()
    assert budget.fraction(shifted).item() == pytest.approx(0.7)


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_soft_budget_equals_integer_counts(tiny_llama, form):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    groups = find_groups(model)
    budget = SoftBudget(groups, form)
    ranks = torch.tensor([g.full_rank // 3 for g in groups])
    counts = budget.counts(ranks / budget.full_rank)
    assert counts.tolist() == pytest.approx(
        [group_parameters(g, r.item(), form) for g, r in zip(groups, ranks, strict=True)]
    )
    assert budget.fraction(torch.full_like(budget.full_rank, 1.06)) == 1


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_price_is_the_derivative_of_the_fraction(tiny_llama, form):
    budget = SoftBudget(find_groups(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)), form)
    state = torch.full_like(budget.full_rank, 0.3).requires_grad_()
    (derivative,) = torch.autograd.grad(budget.fraction(state), state)
    torch.testing.assert_close(budget.price(state.detach()), derivative)


@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_projection_lands_on_the_budget(tiny_llama, form, kept):
    budget = SoftBudget(find_groups(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)), form)
    low = 1 / budget.full_rank
    state = torch.rand(len(budget.full_rank), dtype=torch.float64) * 1.06
    projected = budget.project(state, kept, low, 1.06)
    assert budget.fraction(projected).item() == pytest.approx(kept, abs=1e-9)
    assert (projected >= low).all() and (projected <= 1.06).all()
    inside = (projected > low) & (projected < 1.06)
    shifts = (projected - state)[inside]
    assert shifts.max() - shifts.min() < 1e-9  # one shift for all that are inside the box


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_tangent_spends_nothing_and_follows_the_gain_per_parameter(tiny_llama, form):
    budget = SoftBudget(find_groups(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)), form)
    state = torch.full_like(budget.full_rank, 0.4)
    low, price = 1 / budget.full_rank, budget.price(state)
    gradient = -torch.rand(len(state), dtype=torch.float64) * price
    tangent = budget.tangent(gradient, state, low, 1.06)
    assert (tangent @ price).abs().item() < 1e-12
    gain = gradient / price
    assert tangent[gain.argmin()] < 0 < tangent[gain.argmax()]  # descent raises the first and lowers the second
    assert budget.tangent(-3 * price, state, low, 1.06).abs().max().item() < 1e-12  # at the optimum nothing moves


@pytest.mark.parametrize("constraint", ["projection", "penalty"])
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_optimised_ranks_hold_the_budget_and_lower_the_loss(tiny_llama, constraint, form):
    """One group's spectrum is cut down to four directions that matter: it must give its ranks to the others."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval().requires_grad_(False)
    groups = find_groups(model)
    poor = 3
    with torch.no_grad():
        weight = linear_layer(model, groups[poor].name).weight
        weight.copy_(torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1]) * 0.2)
    bases = {g.name: data_aware_svd(stacked_weight(model, g), torch.eye(g.columns)) for g in groups}
    gated = install_gates(model, groups, lambda g: bases[g.name].truncated(g.full_rank))
    taught = teach(model, torch.randint(2048, (8, 24)), 8)
    settings = FermiGradSettings(constraint=constraint, steps=60, learning_rate=0.03, penalty_growth=1.08)
    budget = Budget(0.7, form)
    mus, records = optimise_ranks(model, groups, gated, taught, budget, settings, batch_size=4, seed=0)
    target = budget.numbers(groups) / dense_parameters(groups)
    kept = sum(group_parameters(g, mu, form) for g, mu in zip(groups, mus, strict=True)) / dense_parameters(groups)
    assert kept == pytest.approx(target, abs=1e-6)
    assert records[-1]["kept"] == pytest.approx(target, abs=1e-6 if constraint == "projection" else 0.03)
    assert len(records) == 60 and all(math.isfinite(r["kl"]) for r in records)
    shares = [mu / g.full_rank for g, mu in zip(groups, mus, strict=True)]
    assert shares[poor] == min(shares) and shares[poor] < 0.6 * sum(shares) / len(shares)
    again, _ = optimise_ranks(model, groups, gated, taught, budget, settings, batch_size=4, seed=0)
    assert again == mus  # deterministic for a seed


def test_infinite_loss_is_an_error(tiny_llama):
    model, groups, gated = gated_model(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="step 0"):
        taught, settings = teach(model, torch.randint(2048, (2, 8)), 8), FermiGradSettings(steps=2)
        optimise_ranks(model, groups, gated, taught, Budget(0.8, "pivga"), settings, batch_size=8, seed=0)


@pytest.mark.parametrize("constraint", ["projection", "penalty"])
def test_interrupted_optimisation_goes_on_to_the_same_ranks(tiny_llama, constraint):
    model, groups, gated = gated_model(tiny_llama, dtype=torch.float32)
    taught = teach(model, torch.randint(2048, (5, 16)), 8)
    settings = FermiGradSettings(constraint=constraint, steps=7)
    kept, given = [], (model, groups, gated, taught, Budget(0.7, "pivga"), settings)
    expected = optimise_ranks(*given, batch_size=2, seed=0, on_progress=kept.append)
    for state in (kept[0], kept[3], kept[-1]):
        begun = json.loads(json.dumps(state))
        assert optimise_ranks(*given, batch_size=2, seed=0, begun=begun) == expected


def test_blocks_that_are_computed_again_for_the_gradient_give_the_same(tiny_llama):
    model, groups, gated = gated_model(tiny_llama)
    ids, runs, halves = torch.randint(2048, (2, 16)), [], halves_of(model)
    with torch.no_grad():
        taught = halves.body(ids)
    mus = torch.tensor([0.5 * g.full_rank for g in groups], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gated_kl(halves, gated, ids, taught, mus, 0.01), mus)
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    with checkpointed(model, 1000, ids.numel(), kept_bytes=0):
        (found,) = torch.autograd.grad(gated_kl(halves, gated, ids, taught, mus, 0.01), mus)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(runs) == len(model.model.layers) * 2  # once, and again for the gradient
    assert not any("forward" in vars(block) for block in model.model.layers)
    with checkpointed(model, 1000, ids.numel()):  # little enough to keep
        gated_kl(halves, gated, ids, taught, mus, 0.01)
    assert len(runs) == len(model.model.layers) * 3


def test_another_form_is_counted_by_the_uniform_ranks_that_remove_the_same(tiny_llama):
    """The paper's recipe: svd parameters are counted, uncapped, and PivGa is written."""
    model, groups, gated = gated_model(tiny_llama, dtype=torch.float32)
    taught, budget = teach(model, torch.randint(2048, (4, 16)), 8), Budget(0.7, "pivga")
    settings = FermiGradSettings(steps=20, count="svd")
    mus, _ = optimise_ranks(model, groups, gated, taught, budget, settings, batch_size=4, seed=0)
    widths = [g.rows + g.columns for g in groups]
    uniform = [budget.uniform_rank(g) for g in groups]
    expected = sum(rank * width for rank, width in zip(uniform, widths, strict=True))
    assert sum(mu * width for mu, width in zip(mus, widths, strict=True)) == pytest.approx(expected, rel=1e-6)


def test_a_batch_in_several_passes_gives_the_same_ranks(tiny_llama):
    model, groups, gated = gated_model(tiny_llama)
    taught, settings = teach(model, torch.randint(2048, (7, 16)), 8), FermiGradSettings(steps=4)
    given = (model, groups, gated, taught, Budget(0.7, "pivga"), settings)
    expected, records = optimise_ranks(*given, batch_size=5, seed=0)
    found, again = optimise_ranks(*given, batch_size=5, seed=0, at_once=2)
    assert found == pytest.approx(expected, rel=1e-6)
    assert [each["kl"] for each in again] == pytest.approx([each["kl"] for each in records], rel=1e-5)
