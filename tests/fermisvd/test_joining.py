import pytest
import torch

from fermisvd import joining, load_model, losses
from fermisvd.budget import Budget, Form, RankedGroup, compressed, group_parameters
from fermisvd.compress import InMemory
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.joining import coarser_partitions, fused_layers, join_groups, joined, layers_with_hopes, rank_at
from fermisvd.losses import StudentLoss, set_products
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
    """A random Llama, separate groups, q, k and v at rank 6, all else dense; q, k and v may be made to share rows.
    Inputs are white, so that a whitened error is that of the weights."""

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
        grams = {group.source: torch.eye(group.columns, dtype=torch.float64) for group in self.groups}
        self.decomposition = InMemory(self.dense, grams, {})
        thin = [g for g in self.groups if "self_attn" in g.name and not g.name.endswith("o_proj")]
        self.ranked = [RankedGroup(g, 6 if g in thin else g.full_rank, form) for g in self.groups]
        student = load_model(folder)
        student.load_state_dict(self.dense.state_dict())
        self.student = set_products(student, self.decomposition.truncated(compressed(self.ranked)).items())
        self.aside = torch.randint(2048, (4, 24))
        self.loss = StudentLoss(self.student, teach(self.dense, self.aside, 4), 4)

    @property
    def layers(self):
        return layers_with_hopes(self.ranked, self.budget, self.decomposition)

    def join(self):
        found = []
        result, whole = join_groups(self.student, self.layers, self.decomposition, self.loss, found.append)
        return result, found, whole

    def check_student(self, result):
        """It has the weights of these groups at their ranks: W, or the best fit by torch.linalg.svd in float64."""
        for each in result:
            expected = stacked_weight(self.dense, each.group).double()
            if not each.stays_dense:
                u, sigma, vh = torch.linalg.svd(expected, full_matrices=False)
                expected = (u[:, : each.rank] * sigma[: each.rank]) @ vh[: each.rank]
            torch.testing.assert_close(stacked_weight(self.student, each.group).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_hopes_are_the_partitions_that_lose_no_more_by_svd(tiny_llama, form, monkeypatch):
    """Reference: discarded squares of torch.linalg.svdvals of the stacked weights."""
    problem = Problem(tiny_llama, share_rows=True, form=form)

    def lost(ranked):
        values = {each: torch.linalg.svdvals(stacked_weight(problem.dense, each.group).double()) for each in ranked}
        return sum(values[each][each.rank :].square().sum().item() for each in ranked if not each.stays_dense)

    found = problem.layers
    assert [len(layer.parts) for layer in found] == [3, 1, 2, 1] * 2
    for layer in found:
        for hope in layer.hopes:
            assert hope.error == pytest.approx(lost(hope.groups) / lost(layer.parts), rel=1e-4)
        assert [hope.error for hope in layer.hopes] == sorted(hope.error for hope in layer.hopes)
    assert [len(layer.hopes) for layer in found] == [3, 0, 0, 0] * 2  # dense layers are not joined
    assert all(hope.error < 0.9 for layer in found for hope in layer.hopes)
    best, second, _ = found[0].hopes
    assert len(best.groups) == 1  # q, k and v are tried together only where two of them are
    for limit, expected in ((second.error, [best.error, second.error]), (best.error, [])):
        monkeypatch.setattr(joining, "HOPE", 1.0001 * limit)
        assert [hope.error for hope in problem.layers[0].hopes] == expected


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_layers_that_share_directions_are_joined_and_others_never_cost_loss(tiny_llama, form):
    shared = Problem(tiny_llama, share_rows=True, form=form)
    before = shared.loss()
    result, records, whole = shared.join()
    assert any(len(each.group.members) == 3 for each in result)
    assert [record["layer"].rpartition(".")[2] for record in records] == ["q_proj", "gate_proj"] * 2
    assert records[-1]["joined_kl"] < 0.7 * before
    assert whole[0] == {"joined": 0, "kl": pytest.approx(before)}
    assert shared.loss() == pytest.approx(min(record["kl"] for record in whole), rel=1e-5)
    assert sum(each.parameters for each in result) <= sum(each.parameters for each in shared.ranked)
    assert [m for each in result for m in each.group.members] == [g.name for g in shared.groups]
    shared.check_student(result)


def test_layers_that_share_nothing_stay_apart_at_no_cost(tiny_llama, monkeypatch):
    problem = Problem(tiny_llama, share_rows=False)
    monkeypatch.setattr(joining, "HOPE", 0.9)
    monkeypatch.setattr(losses.LossFromABlock, "__call__", lambda _: pytest.fail("measured, with no hope"))
    result, records, whole = problem.join()
    assert result == problem.ranked and whole == [] and [record["groups"] for record in records] == [3, 2, 3, 2]
    problem.check_student(result)


@pytest.mark.parametrize(
    ("of_pairs", "groups"),
    [
        (0.5 - 1e-6, 1),  # a tie, which sums in another order would turn round
        (0.5 - 1e-3, 2),
    ],
)
def test_of_a_tie_fewer_groups_win(tiny_llama, of_pairs, groups):
    problem = Problem(tiny_llama, share_rows=True)
    layer = problem.layers[0]
    measured = [0.5 if len(hope.groups) == 1 else of_pairs for hope in layer.hopes]

    class Loss(losses.LossFromABlock):
        def __init__(self):
            pass

        def begin_at(self, layer):
            pass

        def __call__(self):
            return next(answers)

    answers = iter(measured)
    with torch.no_grad():
        chosen, kl, records = joining.tried(problem.student, layer, problem.decomposition, Loss(), 1.0)
    assert len(chosen) == groups and kl == (0.5 if groups == 1 else of_pairs)
    assert sorted(record["kl"] for record in records) == sorted([0.5, of_pairs, of_pairs])


@pytest.mark.parametrize(
    ("measured", "joined_layers"),
    [
        ([1.0, 0.9, 0.95], 2),  # half of them are worse than all
        ([1.0, 0.9, 0.8], 1),
        ([1.0, 1.1, 0.8], 1),
        ([1.0, 1.1, 1.2], 0),
        ([1.0, 1.00005, 1.2], 2),  # a tie with none joined
        ([1.0, 0.9, 0.89995], 2),  # and with more joined
    ],
)
def test_what_trials_joined_is_taken_apart_where_all_windows_say_so(tiny_llama, monkeypatch, measured, joined_layers):
    problem = Problem(tiny_llama, share_rows=True)
    monkeypatch.setattr(joining, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(joining, "TRIALS", 3)  # of six hopes: two of four windows each
    on_all, calls, original = iter(measured), [], losses.LossFromABlock.__call__

    def loss(loss):
        calls.append(sum(len(part) for part, _ in loss.passes))
        return next(on_all) if calls[-1] == 4 else original(loss)

    monkeypatch.setattr(losses.LossFromABlock, "__call__", loss)
    result, records, whole = problem.join()
    monkeypatch.undo()
    assert calls == [4, *[2] * 7, 4, 4] and [record["kl"] for record in whole] == measured
    assert sum(len(each.group.members) > 1 for each in result) == joined_layers
    if joined_layers == 1:  # the one that gained more
        gain = max(records, key=lambda record: record["kl"] - record["joined_kl"])
        assert next(each.group.name for each in result if len(each.group.members) > 1).startswith(gain["layer"][:14])
    problem.check_student(result)
