import pytest
import torch

from fermisvd import load_model
from fermisvd.budget import Budget, Form, RankedGroup, compressed, group_parameters
from fermisvd.decomposition import data_aware_svd
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.joining import coarser_partitions, fused_layers, join_groups, joined, rank_at
from fermisvd.losses import StudentLoss, set_weight
from fermisvd.teacher import teach


def test_coarser_partitions_of_three():
    found = {tuple((s.start, s.stop) for s in partition) for partition in coarser_partitions(3)}
    assert found == {((0, 1), (1, 3)), ((0, 2), (2, 3)), ((0, 3),)}
    assert list(coarser_partitions(1)) == []


def test_joined_groups_are_those_found_jointly(tiny_llama):
    model = load_model(tiny_llama)
    assert [joined(parts) for parts in fused_layers(find_groups(model, "separate"))] == find_groups(model, "joint")


@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("align", [1, 8])
def test_rank_at_is_the_largest_that_fits(tiny_llama, form, align):
    for group in find_groups(load_model(tiny_llama)):
        for share in (0.3, 0.7, 1.0):
            room = share * group.dense_parameters
            rank = rank_at(group, room, Budget(0.5, form, align))
            if share == 1:
                assert rank == group.full_rank
                continue
            assert group_parameters(group, rank, form) <= room < group_parameters(group, rank + align, form)


class Problem:
    """A random Llama, uniform ranks, separate groups; q, k and v of both layers may be made to share their rows."""

    def __init__(self, folder, share_rows: bool, form: Form = "pivga"):
        self.dense, self.budget = load_model(folder), Budget(0.5, form, align=1)
        self.groups = find_groups(self.dense, "separate")
        if share_rows:  # all three see the same 12 directions of the input: together they need them once
            for layer in self.dense.model.layers:
                directions = torch.randn(12, 96) * 0.2
                with torch.no_grad():
                    for name in ("q_proj", "k_proj", "v_proj"):
                        weight = getattr(layer.self_attn, name).weight
                        weight.copy_(torch.randn(weight.shape[0], 12) @ directions)
        self.student = load_model(folder)
        self.student.load_state_dict(self.dense.state_dict())
        thin = [g for g in self.groups if "self_attn" in g.name and not g.name.endswith("o_proj")]
        self.ranked = [RankedGroup(g, 6 if g in thin else g.full_rank, form) for g in self.groups]
        for each in compressed(self.ranked):
            a, b = self.factors(each.group).truncated(each.rank)
            set_weight(self.student, each.group, (a @ b).float())
        self.loss = StudentLoss(self.student, teach(self.dense, torch.randint(2048, (4, 24)), 4), 4)

    def factors(self, group):
        return data_aware_svd(stacked_weight(self.dense, group), torch.eye(group.columns))

    def join(self):
        found = []
        result = join_groups(
            self.student,
            self.ranked,
            self.budget,
            self.loss,
            lambda group: stacked_weight(self.dense, group),
            self.factors,
            on_layer=found.append,
        )
        return result, found


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_layers_that_share_directions_are_joined_and_others_never_cost_loss(tiny_llama, form):
    shared = Problem(tiny_llama, share_rows=True, form=form)
    before = shared.loss()
    result, records = shared.join()
    assert any(len(each.group.members) == 3 for each in result)
    assert records[-1]["joined_kl"] < 0.7 * before
    assert shared.loss() == pytest.approx(records[-1]["joined_kl"], rel=1e-5)
    assert sum(each.parameters for each in result) <= sum(each.parameters for each in shared.ranked)
    assert [m for each in result for m in each.group.members] == [g.name for g in shared.groups]


def test_student_and_result_agree(tiny_llama):
    """The student that comes back has the weights of the groups and ranks that come back."""
    problem = Problem(tiny_llama, share_rows=False)
    result, _ = problem.join()
    for each in result:
        expected = stacked_weight(problem.dense, each.group).double()
        if not each.stays_dense:
            a, b = problem.factors(each.group).truncated(each.rank)
            expected = (a @ b).double()
        torch.testing.assert_close(stacked_weight(problem.student, each.group).double(), expected, rtol=0, atol=1e-5)
