import pytest
import torch
from transformers import AutoModelForCausalLM

from fermisvd.budget import Budget, group_parameters
from fermisvd.decomposition import data_aware_svd
from fermisvd.dense_choice import choose_dense, jump_rank
from fermisvd.errors import OptionError
from fermisvd.gates import cut, install_gates
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.losses import StudentLoss, kl_divergence, set_weight
from fermisvd.teacher import teach


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
        self.taught = teach(self.dense, self.ids, 8)

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

    def settle(self, mus, remove, align=1, minimum_rank=1):
        budget = Budget.removing(remove, "svd", align, minimum_rank)
        self.calls = []
        mus, records = choose_dense(
            self.model,
            self.groups,
            self.gated,
            mus,
            budget,
            self.taught,
            batch_size=8,
            on_choice=lambda: self.calls.append(None),
        )
        assert len(self.calls) == 2 * len(records)
        return mus, budget.ranks(self.groups, mus), records

    def numbers(self, mus):
        return sum(group_parameters(g, mu, "svd") for g, mu in zip(self.groups, mus, strict=True))

    def dense_names(self, mus):
        return [g.name for g, mu in zip(self.groups, mus, strict=True) if mu == pytest.approx(g.full_rank)]


def test_loss_of_cut_gates_is_that_of_replaced_weights(tiny_llama):
    problem = Problem(tiny_llama)
    ranks = [max(1, g.full_rank // 2) for g in problem.groups]
    loss = StudentLoss(problem.model, problem.taught, 8)
    cut(problem.gated, ranks)
    assert loss() == pytest.approx(problem.kl(ranks))
    cut(problem.gated, [g.full_rank for g in problem.groups])
    assert loss() == pytest.approx(0, abs=1e-6)


def test_no_rank_is_left_beyond_the_jump_and_the_budget_is_spent(tiny_llama):
    problem = Problem(tiny_llama)
    mus, _, _ = problem.settle([0.7 * g.full_rank for g in problem.groups], 0.3)
    for group, mu in zip(problem.groups, mus, strict=True):
        assert mu == pytest.approx(group.full_rank) or mu <= jump_rank(group) + 1e-6
    assert problem.numbers(mus) == pytest.approx(Budget.removing(0.3, "svd").numbers(problem.groups))


@pytest.mark.parametrize("align", [1, 8])
def test_layers_that_matter_go_dense(tiny_llama, align):
    """All ranks equally far below their jump: only a measurement can tell which groups are worth a whole matrix."""
    problem = Problem(tiny_llama)
    start = [0.9 * jump_rank(g) for g in problem.groups]
    mus, ranks, records = problem.settle(start, 0.3, align)
    assert any("layers.0.mlp" in name for name in problem.dense_names(mus))
    before = Budget.removing(0.3, "svd", align).ranks(problem.groups, start)
    assert problem.kl(ranks) < 0.5 * problem.kl(before)
    accepted = [r for r in records if "kl" in r and r["kl"] < r["kl_before"]]
    assert accepted[-1]["kl"] == pytest.approx(problem.kl(ranks))  # what was measured is what is written


def test_a_dense_layer_that_does_not_matter_comes_down(tiny_llama):
    problem = Problem(tiny_llama)
    start = [0.6 * jump_rank(g) for g in problem.groups]
    idle = next(i for i, g in enumerate(problem.groups) if g.name.endswith("layers.1.mlp.gate_proj"))
    start[idle] = 1.05 * jump_rank(problem.groups[idle])
    mus, _, records = problem.settle(start, 0.4)
    assert mus[idle] < 0.9 * jump_rank(problem.groups[idle])
    tried = next(r for r in records if r["group"] == problem.groups[idle].name)
    assert tried["dense"] is False and tried["kl"] < tried["kl_before"]


def test_dense_groups_that_the_budget_cannot_hold_are_cut(tiny_llama):
    problem = Problem(tiny_llama)
    mus, _, _ = problem.settle([g.full_rank for g in problem.groups], 0.6)
    assert problem.numbers(mus) == pytest.approx(Budget.removing(0.6, "svd").numbers(problem.groups))


def test_an_impossible_budget_is_refused(tiny_llama):
    problem = Problem(tiny_llama)
    with pytest.raises(OptionError, match="lowest aligned ranks"):
        problem.settle([1.0] * len(problem.groups), 0.5, minimum_rank=10_000)
