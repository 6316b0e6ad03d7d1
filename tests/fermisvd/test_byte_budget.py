"""A budget in bytes. Reference: the bytes of the tensors that are stored."""

import pytest
import torch

from fermisvd.budget import RankedGroup
from fermisvd.byte_budget import ByteBudget, in_type
from fermisvd.compress import CompressOptions
from fermisvd.errors import OptionError
from fermisvd.groups import LinearGroup
from fermisvd.storage import compressed_tensors

GROUPS = [
    LinearGroup(("q",), (96,), 96, "columns", "q"),
    LinearGroup(("k", "v"), (32, 32), 96, "columns", "q"),
    LinearGroup(("o",), (96,), 96, "rows", "o"),
    LinearGroup(("down",), (96,), 256, "rows", "down"),
]
WEIGHTS = ["auto", "int8", "fp8", "int4"]


def budget_of(kept, form, weights, align=1):
    return ByteBudget.keeping(kept, form, align, 1, weights)


def written(group, rank, form, weights) -> int:
    """Bytes of the tensors of one group at a rank."""
    ranked = RankedGroup(group, rank, form, weights)
    if ranked.stays_dense and weights == "auto":
        return 2 * group.dense_parameters
    weight = torch.randn(group.rows, group.columns)
    parts = [weight] if ranked.stays_dense else [torch.randn(group.rows, rank), torch.randn(rank, group.columns)]
    tensors = compressed_tensors(ranked, parts, torch.bfloat16, torch.eye(group.columns))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_cost_is_what_is_written(group, form, weights):
    budget = budget_of(0.5, form, weights)
    for rank in (1, 17, 32, group.full_rank):
        assert budget.cost(group, rank) == written(group, rank, form, weights)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_real_ranks_cost_the_same(form, weights):
    """At whole ranks of whole tiles; int4 takes larger groups there than a real rank is counted with."""
    budget = budget_of(0.5, form, weights)
    soft = budget.soft(GROUPS)
    counts = soft.counts(torch.tensor([32 / group.full_rank for group in GROUPS], dtype=torch.float64)).tolist()
    exact = [budget.cost(group, 32) for group in GROUPS]
    if weights == "int4":
        assert all(0.9 * count <= cost <= count + 64 for count, cost in zip(counts, exact, strict=True))
    else:
        assert counts == pytest.approx(exact)
    assert soft.fraction(torch.ones(4, dtype=torch.float64)) == pytest.approx(
        sum(budget.cost(group, group.full_rank) for group in GROUPS) / budget.total(GROUPS), rel=0.02
    )


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("align", [1, 16])
def test_whole_ranks_hold_the_budget(form, weights, kept, align):
    """And leave less than a step of any group unspent, unless all are dense."""
    budget = budget_of(kept, form, weights, align)
    ranks = budget.ranks(GROUPS, budget.uniform_ranks(GROUPS))
    costs = [written(group, rank, form, weights) for group, rank in zip(GROUPS, ranks, strict=True)]
    limit = kept * 2 * sum(group.dense_parameters for group in GROUPS)
    assert sum(costs) <= limit
    for group, rank, cost in zip(GROUPS, ranks, costs, strict=True):
        ladder = budget.ladder(group)
        above = ladder[ladder.index(rank) + 1 :]
        assert not above or sum(costs) - cost + budget.cost(group, above[0]) > limit


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_wide_budget_leaves_all_dense_on_the_grid(weights):
    budget = budget_of(0.6, "pivga", weights)
    ranked = budget.ranked(GROUPS, budget.uniform_ranks(GROUPS))
    assert all(each.stays_dense and each.weights == weights for each in ranked)


@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_uniform_rank_solves_its_equation(form, weights):
    budget = budget_of(0.3 if weights != "int4" else 0.15, form, weights)
    for group in GROUPS:
        constant, linear, square, _ = budget.curve(group)
        rank = budget.uniform_rank(group)
        assert 0 < rank < group.full_rank
        assert constant + linear * rank - square * rank**2 == pytest.approx(budget.kept * budget.total([group]))


def test_bytes_are_of_the_models_type():
    budget = in_type(budget_of(0.5, "svd", "auto"), torch.float32)
    assert budget.total(GROUPS) == 4 * sum(group.dense_parameters for group in GROUPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of --remove and --bytes"),
        ({"remove": 0.2, "bytes": 0.5}, "one of --remove and --bytes"),
        ({"bytes": 0.5, "count": "svd"}, "--count"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(OptionError, match=message):
        CompressOptions.named(**options)


@pytest.mark.parametrize("kept", [0.0, 1.0, -1.0])
def test_no_fraction(kept):
    with pytest.raises(OptionError, match="--bytes must lie between 0 and 1"):
        _ = CompressOptions.named(bytes=kept).budget
