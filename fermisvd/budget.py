"""The parameter budget: rank <-> parameter count of a group in both forms, and whole ranks that meet the budget."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch

from fermisvd.errors import OptionError
from fermisvd.groups import LinearGroup
from fermisvd.schemes import Weights, scheme_for

Form = Literal["svd", "pivga"]
Stored = Literal["svd", "pivga", "dense"]  # dense: on a grid, but no product of factors


def factor_parameters(rank: float, rows: int, columns: int, form: Stored) -> float:
    """Numbers stored for a rank-r group: svd r (m + n); pivga r (m + n) - r^2 (docs/method.md, Budget)."""
    if form == "dense":
        return rows * columns
    count = rank * (rows + columns)
    return count - rank * rank if form == "pivga" else count


def stays_dense(group: LinearGroup, rank: float, form: Form) -> bool:
    """True where factors would be no smaller than the matrix, so that it is stored as it is."""
    return factor_parameters(min(rank, group.full_rank), group.rows, group.columns, form) >= group.dense_parameters


def group_parameters(group: LinearGroup, rank: float, form: Form) -> float:
    """Numbers stored for the group at this rank, the dense matrix where that is no larger."""
    count = factor_parameters(min(rank, group.full_rank), group.rows, group.columns, form)
    return min(count, group.dense_parameters)


def dense_parameters(groups: Iterable[LinearGroup]) -> int:
    return sum(group.dense_parameters for group in groups)


@dataclass(frozen=True)
class RankedGroup:
    """A group, the rank that was chosen for it, and the form that it would be stored in, on which grid if any.

    own: factors on another grid than `weights`, by name.
    """

    group: LinearGroup
    rank: int
    form: Form
    weights: Weights = "auto"
    own: tuple[tuple[str, Weights], ...] = ()

    @property
    def stays_dense(self) -> bool:
        return stays_dense(self.group, self.rank, self.form)

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return int(group_parameters(self.group, self.rank, self.form))


def compressed(ranked: Iterable[RankedGroup]) -> list[RankedGroup]:
    """Those that do not stay dense."""
    return [each for each in ranked if not each.stays_dense]


def stored_in_groups(ranked: Iterable[RankedGroup]) -> list[RankedGroup]:
    """Those whose weights are not stored as they were: factors, and dense matrices on a grid."""
    return [each for each in ranked if not each.stays_dense or each.weights != "auto"]


def auto_alignment(group: LinearGroup, weights: Weights = "auto") -> int:
    """Alignment step of a group's rank: 64, a GEMM tile, from k = 2048; below, the power of two next below k / 64. On a
    grid also what its kernels like, where that is no more than a sixteenth of k: others are filled up by the server.
    """
    step = 64 if group.full_rank >= 2048 else 2 ** int(math.log2(max(1, group.full_rank / 64)))
    scheme = scheme_for(weights, group.columns)
    wanted = scheme.step if scheme else 1
    return max(step, min(wanted, 2 ** int(math.log2(max(1, group.full_rank / 16)))))


@dataclass(frozen=True)
class Budget:
    """What may stay of the groups' parameters, and the ranks that they may take.

    kept: fraction that may stay; form: that is stored, and counted; align: step of the ranks, None for auto_alignment;
    minimum_rank: lowest rank of any group; weights: the grid that factors are to be stored on.
    """

    kept: float
    form: Form
    align: int | None = None
    minimum_rank: int = 1
    weights: Weights = "auto"
    left: ClassVar[str] = "--remove leaves {} parameters"
    remedy: ClassVar[str] = "remove less"

    @classmethod
    def removing(
        cls,
        remove: float,
        form: Form,
        align: int | None = align,
        minimum_rank: int = minimum_rank,
        weights: Weights = weights,
    ) -> Self:
        """The budget when the fraction `remove` goes. Raises OptionError unless 0 < remove < 1."""
        check_fraction(remove)
        return cls(1 - remove, form, align, minimum_rank, weights)

    def total(self, groups: Sequence[LinearGroup]) -> int:
        """What the groups count, dense."""
        return dense_parameters(groups)

    def numbers(self, groups: Sequence[LinearGroup]) -> int:
        """How many numbers may stay. Raises OptionError if none is to go."""
        total = self.total(groups)
        numbers = math.floor(self.kept * total + 1e-6)
        if numbers == total:
            raise OptionError(f"--remove {1 - self.kept:.3g}: less than one of the {total} parameters")
        return numbers

    def cost(self, group: LinearGroup, rank: int) -> int:
        """What a group counts at this rank."""
        return int(group_parameters(group, rank, self.form))

    def soft(self, groups: Sequence[LinearGroup]) -> "SoftBudget":
        """The same of real-valued ranks."""
        return SoftBudget(groups, self.form)

    def parameters(self, groups: Sequence[LinearGroup]) -> int:
        """How many parameters may stay."""
        return self.numbers(groups)

    @property
    def kept_parameters(self) -> float:
        """Fraction of the parameters that may stay."""
        return self.kept

    def alignment(self, group: LinearGroup) -> int:
        """Step of the group's rank."""
        return self.align or auto_alignment(group, self.weights)

    def ladder(self, group: LinearGroup) -> list[int]:
        """Ranks the group may take: multiples of its step, from the minimum on, that save something, then k: dense."""
        step = self.alignment(group)
        rungs = [r for r in range(step, group.full_rank, step) if r >= self.minimum_rank]
        return [*(r for r in rungs if self.saves(group, r)), group.full_rank]

    def saves(self, group: LinearGroup, rank: int) -> bool:
        """Whether factors of this rank take less than the matrix."""
        return not stays_dense(group, rank, self.form)

    def holds_all(self, groups: Sequence[LinearGroup]) -> bool:
        """Whether all groups at their full ranks are on the budget: a grid alone may save enough."""
        return sum(self.cost(group, group.full_rank) for group in groups) <= self.numbers(groups)

    def check(self, groups: Sequence[LinearGroup]) -> None:
        """Raises OptionError if even the lowest ranks exceed the budget."""
        lowest = sum(self.cost(group, self.ladder(group)[0]) for group in groups)
        if lowest > (numbers := self.numbers(groups)):
            raise OptionError(
                f"{self.left.format(numbers)}, but the lowest aligned ranks need {lowest}; "
                f"{self.remedy}, or give a smaller --align or --minimum-rank"
            )

    def uniform_rank(self, group: LinearGroup) -> float:
        """Real rank at which this group alone keeps its fraction.

        svd: (1 - f) m n / (m + n), the rule of SVD-LLM; pivga: the smaller root of r (m + n) - r^2 = (1 - f) m n.
        """
        width, target = group.rows + group.columns, self.kept * group.dense_parameters
        if self.form == "svd":
            return target / width
        return (width - math.sqrt(width * width - 4 * target)) / 2

    def uniform_ranks(self, groups: Sequence[LinearGroup]) -> list[float]:
        return [self.uniform_rank(group) for group in groups]

    def ranks(self, groups: Sequence[LinearGroup], ideal: Sequence[float]) -> list[int]:
        """Whole ranks near `ideal` that spend at most the budget and leave less than one step of it unspent.

        ideal: real ranks, one a group. Ranks start from the rung below the ideal, come down where that is too much and
        go up where the next rung still fits, always where the distance to the ideal, in units of k, is largest. A dense
        group of the svd form comes down last, since its next rung lies below the jump.
        Raises OptionError if even the lowest ranks exceed the budget.
        """
        self.check(groups)
        numbers, steps = self.numbers(groups), [self.alignment(group) for group in groups]
        ladders = [self.ladder(group) for group in groups]
        costs = [[self.cost(group, r) for r in ladder] for group, ladder in zip(groups, ladders, strict=True)]
        rungs = [
            max([i for i, r in enumerate(ladder) if r <= wish], default=0)
            for ladder, wish in zip(ladders, ideal, strict=True)
        ]
        spent = sum(cost[i] for cost, i in zip(costs, rungs, strict=True))

        def surplus(g: int, rank: int) -> float:
            return (rank - ideal[g]) / groups[g].full_rank

        def lower(g: int) -> int:
            """The next rank below, one step below k where that is the jump."""
            return min(ladders[g][rungs[g] - 1] + steps[g], ladders[g][rungs[g]])

        while spent > numbers:
            g = max([g for g, i in enumerate(rungs) if i > 0], key=lambda g: surplus(g, lower(g)))
            spent += costs[g][rungs[g] - 1] - costs[g][rungs[g]]
            rungs[g] -= 1
        while True:
            room = [
                g
                for g, i in enumerate(rungs)
                if i + 1 < len(costs[g]) and spent + costs[g][i + 1] - costs[g][i] <= numbers
            ]
            if not room:
                return [ladder[i] for ladder, i in zip(ladders, rungs, strict=True)]
            g = min(room, key=lambda g: surplus(g, ladders[g][rungs[g] + 1]))
            spent += costs[g][rungs[g] + 1] - costs[g][rungs[g]]
            rungs[g] += 1

    def ranked(self, groups: Sequence[LinearGroup], ideal: Sequence[float]) -> list[RankedGroup]:
        """The groups at the whole ranks of `ranks`."""
        ranks = self.ranks(groups, ideal)
        return [RankedGroup(group, rank, self.form, self.weights) for group, rank in zip(groups, ranks, strict=True)]


def check_fraction(remove: float) -> None:
    """Raises OptionError unless 0 < remove < 1."""
    if not 0 < remove < 1:
        raise OptionError(f"--remove must lie between 0 and 1, got {remove}")


class Curve(NamedTuple):
    """What a group counts at rank r, constant + linear r - square r^2, and what it does dense."""

    constant: float
    linear: float
    square: float
    dense: float


def parameter_curve(group: LinearGroup, form: Form) -> Curve:
    """`factor_parameters` of the group."""
    return Curve(0, group.rows + group.columns, 1 if form == "pivga" else 0, group.dense_parameters)


class SoftBudget:
    """Parameter counts of real-valued ranks, all groups at once, float64, as functions of the shares mu/k, (groups,).

    capped: whether a group's count stops at m n, as stored; the paper counts r (m + n) however much that is; curves:
    what is counted, if not parameters, and its total of the dense model.
    """

    def __init__(
        self,
        groups: Sequence[LinearGroup],
        form: Form,
        capped: bool = True,
        curves: Sequence[Curve] | None = None,
        total: float | None = None,
    ):
        def column(values):
            return torch.tensor(list(values), dtype=torch.float64)

        curves = [parameter_curve(group, form) for group in groups] if curves is None else curves
        self.full_rank = column(g.full_rank for g in groups)
        self.constant, self.linear, self.square, self.dense = (column(values) for values in zip(*curves, strict=True))
        self.total = self.dense.sum().item() if total is None else total
        self.capped = capped

    def counts(self, share: torch.Tensor) -> torch.Tensor:
        """What each group counts at mu = share * k; where capped, no more than dense."""
        rank = share.clamp(0, 1) * self.full_rank
        counts = self.constant + rank * (self.linear - self.square * rank)
        return torch.minimum(counts, self.dense) if self.capped else counts

    def fraction(self, share: torch.Tensor) -> torch.Tensor:
        """Kept fraction of what the dense model counts."""
        return self.counts(share).sum() / self.total

    def price(self, share: torch.Tensor) -> torch.Tensor:
        """d fraction / d share, (groups,): what one unit of mu/k costs each group.

        In svd form the price goes on above the rank where dense is cheaper, so that a dense group can be drawn down.
        """
        rank = share.clamp(0, 1) * self.full_rank
        return (self.linear - 2 * self.square * rank) * self.full_rank / self.total

    def tangent(self, gradient: torch.Tensor, share: torch.Tensor, low: torch.Tensor, high: float) -> torch.Tensor:
        """The gradient less its part along the price: what is left trades parameters between groups.

        Loss falls with every rank, so Adam, which looks at signs, would raise all groups alike. The Lagrangian's
        gradient raises those that gain more per parameter than the others and lowers the rest; its multiplier is the
        least-squares one over the groups inside the box.
        """
        price = self.price(share)
        inside = (share > low) & (share < high)
        weight = price * inside if inside.any() else price
        return gradient - (gradient @ weight) / (weight @ weight).clamp(min=1e-30) * price

    def project(self, share: torch.Tensor, kept: float, low: torch.Tensor, high: torch.Tensor | float) -> torch.Tensor:
        """All mu/k shifted together, inside the box, so that the kept fraction is `kept` (bisection on the shift)."""
        high = torch.as_tensor(high, dtype=share.dtype)
        above = 1.0 + high.max().item()
        below = -above
        for _ in range(60):
            middle = (below + above) / 2
            shifted = torch.maximum(torch.minimum(share + middle, high), low)
            below, above = (middle, above) if self.fraction(shifted) < kept else (below, middle)
        return torch.maximum(torch.minimum(share + below, high), low)
