"""The groups' factors, each made once and kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fermisvd.budget import RankedGroup
from fermisvd.decomposition import DAMPING, FAINT, OUTPUT_DAMPING, Decomposition, Factors, OutputGram
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
class KeptDecomposition(Decomposition):
    """Factors of the source's weights and the calibration's matrices, kept in the workspace."""

    stage: Stage
    source: Source
    statistics: Statistics
    device: str

    def factors(self, group: LinearGroup) -> Factors:
        name = group.name if len(group.members) == 1 else f"{group.name}+{len(group.members) - 1}"
        if not self.stage.has(name):
            made = self.made(group)
            self.stage.save(name, {"a": made.a, "b": made.b, "sigma": made.sigma})
        return Factors(**self.stage.load(name))

    def weights(self, group: LinearGroup) -> torch.Tensor:
        stored = [self.source.tensor(f"{name}.weight") for name in group.members]
        return torch.cat([weight.T if group.transposed else weight for weight in stored])

    def gram(self, source: str) -> torch.Tensor:
        return self.statistics.gram(source).to(self.device)

    def outputs(self, group: LinearGroup, device: torch.device) -> list[OutputGram] | None:
        if self.statistics.outputs is None:
            return None
        return [self.statistics.output(name, device) for name in group.members]

    def kept(self, ranked: Sequence[RankedGroup]) -> FactorsOf:
        """What gives the factors of these groups, read when they are asked for."""
        ranks = {each.group: each.rank for each in ranked}
        return lambda group: self.factors(group).truncated(ranks[group])


def decomposition_of(conversion: Conversion, statistics: Statistics) -> KeptDecomposition:
    """Where factors are kept, and what they are made of."""
    stage = conversion.workspace.stage("factors", statistics.name, DAMPING, OUTPUT_DAMPING, FAINT)
    return KeptDecomposition(stage, conversion.source, statistics, conversion.device)


@timed("decompose")
def decompose(conversion: Conversion, statistics: Statistics, groups: Sequence[LinearGroup]) -> KeptDecomposition:
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
