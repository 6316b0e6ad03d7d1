import pytest
import torch

from fermisvd import load_model
from fermisvd.budget import Budget, RankedGroup
from fermisvd.decomposition import data_aware_svd
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.losses import StudentLoss, set_weight
from fermisvd.refit import TRIAL_WINDOWS, refit, refit_map
from fermisvd.teacher import teach


def test_refit_map_gives_the_least_squares_weight():
    """Reference: lstsq on the inputs themselves."""
    w, x = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, 60, dtype=torch.float64)
    seen = x + 0.3 * torch.randn_like(x)
    for mixture in (0.0, 0.5):
        found = w @ refit_map(x @ seen.T, seen @ seen.T, mixture, damping=0.0)
        target = (1 - mixture) * w @ x + mixture * w @ seen
        torch.testing.assert_close(found, torch.linalg.lstsq(seen.T, target.T).solution.T)


@pytest.mark.parametrize("tokens", [0, 3, 60])
def test_refit_map_without_drift_is_the_identity(tokens):
    x = torch.randn(8, tokens, dtype=torch.float64)  # no token, fewer tokens than channels, enough
    torch.testing.assert_close(refit_map(x @ x.T, x @ x.T, 0.0), torch.eye(8, dtype=torch.float64))


def decomposition_of(dense):
    return lambda group, change, gram: data_aware_svd(stacked_weight(dense, group).double() @ change, gram)


def test_refit_lowers_the_loss_it_accepts_by_and_gives_the_student_s_factors(tiny_llama):
    dense = load_model(tiny_llama)
    groups = find_groups(dense, "separate")
    budget = Budget.removing(0.5, "pivga", align=1)
    ranked = budget.ranked(groups, budget.uniform_ranks(groups))
    student = load_model(tiny_llama)
    for group, rank in ((each.group, each.rank) for each in ranked):
        a, b = data_aware_svd(stacked_weight(dense, group), torch.eye(group.columns)).truncated(rank)
        set_weight(student, group, (a @ b).float())
    untouched = {g.name: stacked_weight(student, g).clone() for g in groups}
    windows, aside = torch.randint(2048, (24, 32)), teach(dense, torch.randint(2048, (12, 32)), 8)
    decide = aside[:TRIAL_WINDOWS]
    before, records = StudentLoss(student, decide, 8)(), []
    decompose = decomposition_of(dense)
    found = refit(dense, student, ranked, windows, aside, decompose, batch_size=8, on_source=records.append)
    after = StudentLoss(student, decide, 8)()
    assert records[0]["kl"] == pytest.approx(before, rel=1e-5)
    assert len(records) < len(groups)  # those of one input together
    assert [record["source"] for record in records] == list(dict.fromkeys(group.source for group in groups)) and found
    assert after < 0.9 * before
    assert after == pytest.approx(min(r["refitted_kl"] for r in records), rel=1e-4)
    for group, rank in ((each.group, each.rank) for each in ranked):
        weight = stacked_weight(student, group)
        if group.name in found:
            a, b = found[group.name]
            assert a.shape == (group.rows, rank) and b.shape == (rank, group.columns)
            torch.testing.assert_close((a @ b).float(), weight)
        else:
            assert torch.equal(weight, untouched[group.name])


def test_nothing_is_refitted_where_it_cannot_help(tiny_llama):
    """At full rank the student is the teacher: no candidate is strictly better."""
    dense, student = load_model(tiny_llama), load_model(tiny_llama)
    ranked = [RankedGroup(group, group.full_rank, "pivga") for group in find_groups(dense)]
    windows = torch.randint(2048, (8, 32))
    aside = teach(dense, windows[:2], 8)
    for chosen in (windows, windows[:3], windows[:0]):  # also less than a batch, and none
        assert refit(dense, student, ranked, chosen, aside, decomposition_of(dense), batch_size=8) == {}
