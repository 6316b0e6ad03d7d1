"""Rank <-> parameter count of a group in both forms, and integer ranks that meet a budget exactly."""

import math
from collections.abc import Sequence
from typing import Literal

from fermisvd.errors import FermiSVDError
from fermisvd.groups import LinearGroup

Form = Literal["svd", "pivga"]


class BudgetError(FermiSVDError):
    """The asked removal cannot be met with ranks of at least one alignment step."""


def factor_parameters(rank: float, rows: int, columns: int, form: Form) -> float:
    """Numbers stored for a rank-r group: svd r (m + n); pivga r (m + n) - r^2 (DESIGN, Budget)."""
    count = rank * (rows + columns)
    return count - rank * rank if form == "pivga" else count


def stays_dense(group: LinearGroup, rank: float, form: Form) -> bool:
    """True where factors would be no smaller than the matrix, so that it is stored as it is."""
    return factor_parameters(min(rank, group.full_rank), group.rows, group.columns, form) >= group.dense_parameters


def group_parameters(group: LinearGroup, rank: float, form: Form) -> float:
    """Numbers stored for the group at this rank, the dense matrix where that is no larger."""
    count = factor_parameters(min(rank, group.full_rank), group.rows, group.columns, form)
    return min(count, group.dense_parameters)


def total_parameters(groups: Sequence[LinearGroup], ranks: Sequence[float], form: Form) -> float:
    return sum(group_parameters(g, r, form) for g, r in zip(groups, ranks, strict=True))


def kept_parameters(groups: Sequence[LinearGroup], remove: float) -> int:
    """The budget: numbers that may stay when the fraction `remove` of the groups' parameters goes.

    Raises BudgetError unless 0 < remove < 1 and at least one number goes.
    """
    check_fraction(remove)
    total = sum(g.dense_parameters for g in groups)
    kept = math.floor((1 - remove) * total + 1e-6)
    if kept == total:
        raise BudgetError(f"--remove {remove}: less than one of the {total} parameters")
    return kept


def check_fraction(remove: float) -> None:
    """Raises BudgetError unless 0 < remove < 1."""
    if not 0 < remove < 1:
        raise BudgetError(f"--remove must lie between 0 and 1, got {remove}")


def uniform_rank(group: LinearGroup, remove: float, form: Form) -> float:
    """Real rank at which this group alone loses the fraction `remove`.

    svd: (1 - f) m n / (m + n), the rule of SVD-LLM; pivga: the smaller root of r (m + n) - r^2 = (1 - f) m n.
    """
    width, target = group.rows + group.columns, (1 - remove) * group.dense_parameters
    if form == "svd":
        return target / width
    return (width - math.sqrt(width * width - 4 * target)) / 2


def auto_alignment(group: LinearGroup) -> int:
    """Alignment step of a group's rank: 64, a GEMM tile, from k = 2048; below, the power of two next below k / 64."""
    return 64 if group.full_rank >= 2048 else 2 ** int(math.log2(max(1, group.full_rank / 64)))


def rank_ladder(group: LinearGroup, form: Form, align: int, minimum: int = 1) -> list[int]:
    """Ranks a group may take: multiples of `align`, from `minimum` on, that save something, then k, i.e. dense."""
    ladder = [r for r in range(align, group.full_rank, align) if r >= minimum and not stays_dense(group, r, form)]
    return [*ladder, group.full_rank]


def check_budget(
    groups: Sequence[LinearGroup], budget: int, form: Form, align: int | None = None, minimum: int = 1
) -> None:
    """Raises BudgetError if even the lowest ranks exceed the budget; arguments as those of round_to_budget."""
    ladders = [rank_ladder(g, form, align or auto_alignment(g), minimum) for g in groups]
    lowest = sum(int(group_parameters(g, ladder[0], form)) for g, ladder in zip(groups, ladders, strict=True))
    if lowest > budget:
        raise BudgetError(
            f"--remove leaves {budget} parameters, but the lowest aligned ranks need {lowest}; "
            "remove less, or give a smaller --align or --minimum-rank"
        )


def round_to_budget(
    groups: Sequence[LinearGroup],
    ideal: Sequence[float],
    budget: int,
    form: Form,
    align: int | None = None,
    minimum: int = 1,
) -> list[int]:
    """Integer ranks near `ideal` that spend at most `budget` and leave less than one step of it unspent.

    ideal: real ranks, one a group; align: step of the ranks, None for auto_alignment; minimum: lowest rank. Ranks
    start from the rung below the ideal, come down where that is too much and go up where the next rung still fits,
    always where the distance to the ideal, in units of k, is largest. A dense group of the svd form comes down last,
    since its next rung lies below the jump.
    Raises BudgetError if even the lowest ranks exceed the budget.
    """
    check_budget(groups, budget, form, align, minimum)
    aligns = [align or auto_alignment(g) for g in groups]
    ladders = [rank_ladder(g, form, step, minimum) for g, step in zip(groups, aligns, strict=True)]
    costs = [[int(group_parameters(g, r, form)) for r in ladder] for g, ladder in zip(groups, ladders, strict=True)]
    rungs = [
        max([i for i, r in enumerate(ladder) if r <= x], default=0) for ladder, x in zip(ladders, ideal, strict=True)
    ]
    spent = sum(cost[i] for cost, i in zip(costs, rungs, strict=True))

    def surplus(g: int, rank: int) -> float:
        return (rank - ideal[g]) / groups[g].full_rank

    while spent > budget:
        above = [g for g, i in enumerate(rungs) if i > 0]
        g = max(above, key=lambda g: surplus(g, min(ladders[g][rungs[g] - 1] + aligns[g], ladders[g][rungs[g]])))
        spent += costs[g][rungs[g] - 1] - costs[g][rungs[g]]
        rungs[g] -= 1
    while True:
        room = [
            g for g, i in enumerate(rungs) if i + 1 < len(costs[g]) and spent + costs[g][i + 1] - costs[g][i] <= budget
        ]
        if not room:
            return [ladder[i] for ladder, i in zip(ladders, rungs, strict=True)]
        g = min(room, key=lambda g: surplus(g, ladders[g][rungs[g] + 1]))
        spent += costs[g][rungs[g] + 1] - costs[g][rungs[g]]
        rungs[g] += 1


def uniform_ranks(groups: Sequence[LinearGroup], remove: float, form: Form, align: int | None = None) -> list[int]:
    """The same fraction from every group, rounded to the budget."""
    ideal = [uniform_rank(g, remove, form) for g in groups]
    return round_to_budget(groups, ideal, kept_parameters(groups, remove), form, align)
