import pytest
import torch
from transformers import AutoModelForCausalLM

from fermisvd.budget import BudgetError, kept_parameters, round_to_budget, total_parameters
from fermisvd.decomposition import data_aware_svd
from fermisvd.fermigrad import install_gates
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.jump import jump_rank, settle_jump, truncated_kl
from fermisvd.losses import kl_divergence, set_weight


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)


class Problem:
    """A random Llama in float64, in which one layer's MLP matters far more than all the rest."""

    def __init__(self, folder, important="layers.0.mlp"):
        self.dense, model = load(folder), load(folder)
        self.groups = find_groups(model, "separate")
        for both in (self.dense, model):
            for group in self.groups:
                if important not in group.name:
                    set_weight(both, group, 0.02 * stacked_weight(both, group))
        self.factors = {
            g.name: data_aware_svd(stacked_weight(model, g), torch.eye(g.columns, dtype=torch.float64))
            for g in self.groups
        }
        self.model = model
        self.gated = install_gates(model, self.groups, lambda g: self.factors[g.name].truncated(g.full_rank))
        self.ids = torch.randint(2048, (4, 12), generator=torch.Generator().manual_seed(0))

    def kl(self, ranks):
        """Reference: the dense model with its weights replaced by truncated products."""
        student = self.dense.__class__(self.dense.config).double().eval()
        student.load_state_dict(self.dense.state_dict())
        for group, rank in zip(self.groups, ranks, strict=True):
            if rank < group.full_rank:
                a, b = self.factors[group.name].truncated(rank)
                set_weight(student, group, a @ b)
        with torch.no_grad():
            return kl_divergence(self.dense(self.ids).logits, student(self.ids).logits).item()

    def settle(self, mus, remove, **options):
        budget = kept_parameters(self.groups, remove)
        mus, records = settle_jump(self.model, self.groups, self.gated, mus, budget, self.ids, **options)
        return mus, round_to_budget(self.groups, mus, budget, "svd", 1), records


def test_truncated_kl_is_that_of_replaced_weights(tiny_llama):
    problem = Problem(tiny_llama)
    ranks = [max(1, g.full_rank // 2) for g in problem.groups]
    with torch.no_grad():
        assert truncated_kl(problem.model, problem.gated, ranks, problem.ids) == pytest.approx(problem.kl(ranks))
        assert truncated_kl(problem.model, problem.gated, [g.full_rank for g in problem.groups], problem.ids) == 0


def test_no_rank_is_left_beyond_the_jump_and_the_budget_is_spent(tiny_llama):
    problem = Problem(tiny_llama)
    mus, ranks, _ = problem.settle([0.7 * g.full_rank for g in problem.groups], 0.3)
    for group, mu in zip(problem.groups, mus, strict=True):
        assert mu == pytest.approx(group.full_rank) or mu <= jump_rank(group) + 1e-6
    budget = kept_parameters(problem.groups, 0.3)
    step = max(g.rows + g.columns for g in problem.groups)
    assert budget - step < total_parameters(problem.groups, ranks, "svd") <= budget


def test_layers_that_matter_go_dense(tiny_llama):
    """All ranks equally far below their jump: only a measurement can tell which groups are worth a whole matrix."""
    problem = Problem(tiny_llama)
    start = [0.9 * jump_rank(g) for g in problem.groups]
    mus, ranks, records = problem.settle(start, 0.3)
    chosen = [g.name for g, mu in zip(problem.groups, mus, strict=True) if mu == pytest.approx(g.full_rank)]
    assert any("layers.0.mlp" in name for name in chosen)
    before = round_to_budget(problem.groups, start, kept_parameters(problem.groups, 0.3), "svd", 1)
    assert problem.kl(ranks) < 0.5 * problem.kl(before)
    accepted = [r for r in records if r["kl"] < r["kl_before"]]
    assert accepted[-1]["kl"] == pytest.approx(problem.kl(ranks))


def test_dense_groups_that_the_budget_cannot_hold_are_cut(tiny_llama):
    problem = Problem(tiny_llama)
    _, ranks, _ = problem.settle([g.full_rank for g in problem.groups], 0.6)
    assert total_parameters(problem.groups, ranks, "svd") <= kept_parameters(problem.groups, 0.6)
    assert min(ranks) >= 1


def test_an_impossible_budget_is_refused(tiny_llama):
    problem = Problem(tiny_llama)
    with pytest.raises(BudgetError, match="lowest aligned ranks"):
        problem.settle([1.0] * len(problem.groups), 0.5, minimum_rank=10_000)
