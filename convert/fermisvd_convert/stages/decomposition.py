"""The groups' factors, each made once and kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fermisvd.budget import RankedGroup
from fermisvd.decomposition import DAMPING, OUTPUT_DAMPING, Factors, group_factors
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair
from fermisvd.running import distributed
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.memory import give_back
from fermisvd_convert.progress import bar
from fermisvd_convert.source import Source
from fermisvd_convert.stages.calibration import Statistics
from fermisvd_convert.workspace import Stage

FactorsOf = Callable[[LinearGroup], Pair]  # A (m x r) and B (r x n) of a group at its rank


@dataclass(frozen=True)
class Decomposition:
    """Factors by `input` or `kfac` whitening, from the source's weights and the calibration's matrices."""

    stage: Stage
    source: Source
    statistics: Statistics
    device: str

    def factors(self, group: LinearGroup) -> Factors:
        """A (m x k), B (k x n), float32, and sigma (k,) of W = A B."""
        name = group.name if len(group.members) == 1 else f"{group.name}+{len(group.members) - 1}"
        if not self.stage.has(name):
            made = self.fit(group, None, self.statistics.gram(group.source).to(self.device))
            self.stage.save(name, {"a": made.a.float(), "b": made.b.float(), "sigma": made.sigma})
        return Factors(**self.stage.load(name))

    def whole(self, group: LinearGroup) -> Pair:
        """A (m x k) and B (k x n) of a group, W = A B."""
        factors = self.factors(group)
        return factors.a, factors.b

    def sigma(self, group: LinearGroup) -> torch.Tensor:
        """Singular values of a group's whitened W, (k,) descending, float64."""
        return self.factors(group).sigma

    def truncated(self, ranked: Sequence[RankedGroup]) -> FactorsOf:
        """What gives the factors of these groups, read when they are asked for."""
        ranks = {each.group: each.rank for each in ranked}
        return lambda group: self.factors(group).truncated(ranks[group])

    def fit(self, group: LinearGroup, change: torch.Tensor | None, gram: torch.Tensor) -> Factors:
        """Factors of W, or of W M where `change` is M (n x n), for inputs with this Gram matrix (n x n)."""
        weights = group_weight(self.source, group).to(gram.device).split(list(group.member_rows))
        outputs = None
        if self.statistics.outputs is not None:
            outputs = [self.statistics.output(name, gram.device) for name in group.members]
        return group_factors(weights, gram, outputs, change)


def decomposition_of(conversion: Conversion, statistics: Statistics) -> Decomposition:
    """Where factors are kept, and what they are made of."""
    stage = conversion.workspace.stage("factors", statistics.name, DAMPING, OUTPUT_DAMPING)
    return Decomposition(stage, conversion.source, statistics, conversion.device)


@timed("decompose")
def decompose(conversion: Conversion, statistics: Statistics, groups: Sequence[LinearGroup]) -> Decomposition:
    """All groups' factors; each process makes its part of them."""
    decomposition = decomposition_of(conversion, statistics)
    own = distributed.own_part(groups)
    with bar("decompose", len(own), "group") as shown:
        for group in own:
            decomposition.factors(group)
            give_back()
            shown.advance()
    conversion.workspace.wait_for_all()
    return decomposition


def group_weight(source: Source, group: LinearGroup) -> torch.Tensor:
    """W of a group, read from the source's files, (rows x columns)."""
    stored = [source.tensor(f"{name}.weight") for name in group.members]
    return torch.cat([weight.T if group.transposed else weight for weight in stored])
