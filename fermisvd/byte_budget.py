"""A budget in bytes: what is really written of a group counts, scales and permutations included."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypeVar

import torch

from fermisvd.budget import Budget, Curve, Form, RankedGroup, SoftBudget
from fermisvd.errors import OptionError
from fermisvd.groups import LinearGroup
from fermisvd.schemes import GROUP_SIZES, Weights, scheme_for
from fermisvd.storage import stored_bytes

B = TypeVar("B", bound=Budget)
PERMUTATION_BYTES = 4  # of each entry
SMALLEST_GROUP = GROUP_SIZES[-1]  # of int4: what a rank may ask for


@dataclass(frozen=True)
class ByteBudget(Budget):
    """kept: fraction that may stay of the bytes that the groups' dense matrices take in `dtype`, which is the type of
    factors on no grid, and of scales."""

    dtype: str = "bfloat16"
    left: ClassVar[str] = "--bytes leaves {} bytes"
    remedy: ClassVar[str] = "allow more"

    @classmethod
    def keeping(cls, fraction: float, form: Form, align: int | None, minimum_rank: int, weights: Weights) -> Self:
        """Raises OptionError unless 0 < fraction < 1."""
        if not 0 < fraction < 1:
            raise OptionError(f"--bytes must lie between 0 and 1, got {fraction}")
        return cls(fraction, form, align, minimum_rank, weights)

    @property
    def storage(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def total(self, groups: Sequence[LinearGroup]) -> int:
        return super().total(groups) * self.storage.itemsize

    def numbers(self, groups: Sequence[LinearGroup]) -> int:
        """How many bytes may stay."""
        return math.floor(self.kept * self.total(groups))

    def cost(self, group: LinearGroup, rank: int) -> int:
        ranked = RankedGroup(group, rank, self.form, self.weights)
        if ranked.stays_dense and self.weights == "auto":
            return self.total([group])
        return sum(stored_bytes(ranked, self.storage).values())

    def saves(self, group: LinearGroup, rank: int) -> bool:
        return super().saves(group, rank) and self.cost(group, rank) < self.cost(group, group.full_rank)

    def soft(self, groups: Sequence[LinearGroup]) -> SoftBudget:
        return SoftBudget(groups, self.form, curves=[self.curve(group) for group in groups], total=self.total(groups))

    def curve(self, group: LinearGroup) -> Curve:
        """`cost` of real-valued ranks, but that int4 takes its smallest groups of ranks."""
        m, n = group.rows, group.columns
        inputs, scale = self.number_bytes(n)
        ranks = self.number_bytes(SMALLEST_GROUP)[0]
        dense = m * n * inputs + m * scale
        if self.form == "svd":
            return Curve(m * scale, m * ranks + n * inputs + scale, 0, dense)
        if group.side == "columns":
            return Curve(m * scale + n * PERMUTATION_BYTES, (m + n) * ranks + scale, ranks, dense)
        return Curve(m * scale + m * PERMUTATION_BYTES, n * inputs + m * ranks, ranks, dense)

    def number_bytes(self, width: int) -> tuple[float, int]:
        """Bytes of a number of a factor with so many inputs, its share of a group's scale included, and of a scale that
        all of an output channel share."""
        scheme, size = scheme_for(self.weights, width), self.storage.itemsize
        if scheme is None:
            return size, 0
        return (1, size) if scheme.group_size is None else (0.5 + size / scheme.group_size, 0)

    def uniform_rank(self, group: LinearGroup) -> float:
        """Real rank at which this group alone keeps its fraction; k where its matrix does."""
        constant, linear, square, dense = self.curve(group)
        target = self.kept * self.total([group])
        if target >= dense:
            return group.full_rank
        left = max(target - constant, 0.0)
        if not square:
            return left / linear
        inside = linear * linear - 4 * square * left
        return (linear - math.sqrt(inside)) / (2 * square) if inside > 0 else group.full_rank

    def parameters(self, groups: Sequence[LinearGroup]) -> int:
        return math.floor(self.kept_parameters * super().total(groups))

    @property
    def kept_parameters(self) -> float:
        return min(1.0, self.kept * self.storage.itemsize / self.number_bytes(SMALLEST_GROUP)[0])


def in_type(budget: B, dtype: torch.dtype) -> B:
    """The budget, its bytes those of this type; one in parameters as it is."""
    return replace(budget, dtype=str(dtype).removeprefix("torch.")) if isinstance(budget, ByteBudget) else budget
