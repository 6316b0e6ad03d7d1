import pytest
from hypothesis import given
from hypothesis import strategies as st

from fermisvd.budget import (
    Budget,
    RankedGroup,
    auto_alignment,
    compressed,
    dense_parameters,
    factor_parameters,
    group_parameters,
    stays_dense,
)
from fermisvd.errors import OptionError
from fermisvd.groups import LinearGroup


def make_group(rows: int, columns: int, name: str = "w") -> LinearGroup:
    return LinearGroup((name,), (rows,), columns, "columns", name)


def total(groups, ranks, form) -> float:
    return sum(group_parameters(g, r, form) for g, r in zip(groups, ranks, strict=True))


shapes = st.tuples(st.integers(2, 300), st.integers(2, 300))
forms = st.sampled_from(["svd", "pivga"])


@given(shapes, st.integers(1, 300), forms)
def test_parameters_count_the_stored_tensors(shape, rank, form):
    rows, columns = shape
    rank = min(rank, *shape)
    stored = rows * rank + rank * columns if form == "svd" else rows * rank + rank * (columns - rank)
    assert factor_parameters(rank, rows, columns, form) == stored


@given(shapes, st.integers(1, 300), forms)
def test_dense_is_stored_where_factors_are_no_smaller(shape, rank, form):
    group, rank = make_group(*shape), min(rank, *shape)
    count = factor_parameters(rank, shape[0], shape[1], form)
    assert stays_dense(group, rank, form) == (count >= shape[0] * shape[1])
    assert group_parameters(group, rank, form) == min(count, shape[0] * shape[1])


def test_pivga_meets_dense_exactly_at_full_rank():
    assert factor_parameters(40, 40, 70, "pivga") == 40 * 70
    assert not stays_dense(make_group(40, 70), 39, "pivga")


@given(shapes, st.floats(0.01, 0.99), forms)
def test_uniform_rank_solves_its_equation(shape, remove, form):
    count = factor_parameters(Budget.removing(remove, form).uniform_rank(make_group(*shape)), shape[0], shape[1], form)
    assert count == pytest.approx((1 - remove) * shape[0] * shape[1], rel=1e-9)


@given(
    st.lists(shapes, min_size=1, max_size=8),
    st.data(),
    st.floats(0.05, 0.6),
    forms,
    st.sampled_from([1, 1, 2, 8]),
)
def test_rounded_ranks_meet_the_budget_within_one_step(group_shapes, data, remove, form, align):
    groups = [make_group(*shape, name=f"w{i}") for i, shape in enumerate(group_shapes)]
    ideal = [data.draw(st.floats(0, g.full_rank)) for g in groups]
    budget = Budget.removing(remove, form, align)
    kept = (1 - remove) * dense_parameters(groups)
    try:
        ranks = budget.ranks(groups, ideal)
    except OptionError:
        lowest = [budget.ladder(g)[0] for g in groups]
        assert total(groups, lowest, form) > kept - 1 or kept > dense_parameters(groups) - 1  # or nothing would go
        return
    spent = total(groups, ranks, form)
    assert spent <= kept + 1e-6
    for g, rank in zip(groups, ranks, strict=True):
        ladder = budget.ladder(g)
        assert rank in ladder
        if rank != ladder[-1]:
            step = ladder[ladder.index(rank) + 1]
            assert spent + group_parameters(g, step, form) - group_parameters(g, rank, form) > kept - 1


def test_ideal_ranks_that_fit_are_kept():
    groups = [make_group(64, 64, "a"), make_group(32, 64, "b")]
    ideal = [20.0, 10.0]
    budget = Budget(total(groups, ideal, "pivga") / dense_parameters(groups), "pivga", align=1)
    assert budget.ranks(groups, ideal) == [20, 10]


@pytest.mark.parametrize("remove", [0, 1, -0.1, 1.5])
def test_remove_out_of_range_is_refused(remove):
    with pytest.raises(OptionError, match="--remove"):
        Budget.removing(remove, "pivga")


def test_unreachable_budget_is_refused():
    with pytest.raises(OptionError, match="align"):
        Budget(100 / 64**2, "pivga", align=32).ranks([make_group(64, 64)], [1])


@pytest.mark.parametrize(("width", "step"), [(64, 1), (192, 2), (512, 8), (2047, 16), (2048, 64), (16384, 64)])
def test_auto_alignment_grows_with_width(width, step):
    assert auto_alignment(make_group(width, width)) == step


def test_uniform_ranks_remove_what_was_asked():
    groups = [make_group(96, 64, "a"), make_group(64, 170, "b")]
    dense = dense_parameters(groups)
    for form in ("svd", "pivga"):
        budget = Budget.removing(0.3, form, align=1)
        removed = 1 - total(groups, budget.ranks(groups, budget.uniform_ranks(groups)), form) / dense
        assert 0.3 <= removed < 0.3 + 240 / dense  # one step of one group is at most m + n numbers


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_no_rank_is_below_the_minimum(form):
    groups = [LinearGroup((name,), (48,), 64, "columns", name) for name in "abc"]
    ranks = Budget.removing(0.4, form, align=1, minimum_rank=8).ranks(groups, [2.0, 5.0, 48.0])
    assert min(ranks) >= 8
    with pytest.raises(OptionError, match="lowest aligned ranks"):
        Budget.removing(0.9, form, align=1, minimum_rank=30).ranks(groups, [2.0, 5.0, 48.0])


def test_a_dense_group_of_the_svd_form_comes_down_last():
    """Many groups below one aligned step exceed the budget; giving up the dense one would cost it half its rank."""
    groups = [LinearGroup((f"m{i}",), (1024,), 1024, "columns", f"m{i}") for i in range(9)]
    ideal = [1024.0, *[10.0] * 6, 300.0, 300.0]
    numbers = total(groups, ideal, "svd")
    ranks = Budget(numbers / dense_parameters(groups), "svd", align=16).ranks(groups, ideal)
    assert ranks[0] == 1024
    assert numbers - 16 * 2048 < total(groups, ranks, "svd") <= numbers


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_ranked_groups_count_what_they_store(form):
    groups = [make_group(96, 64, "a"), make_group(64, 170, "b")]
    ranked = [RankedGroup(groups[0], 20, form), RankedGroup(groups[1], 64, form)]
    assert [each.parameters for each in ranked] == [int(factor_parameters(20, 96, 64, form)), 64 * 170]
    assert compressed(ranked) == ranked[:1]
