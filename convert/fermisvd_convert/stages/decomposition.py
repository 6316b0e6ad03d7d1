"""The groups' factors, each made once and kept."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from fermisvd.budget import RankedGroup
from fermisvd.compress import Whitening
from fermisvd.decomposition import (
    DAMPING,
    FAINT,
    OUTPUT_DAMPING,
    Decomposition,
    Factors,
    OutputGram,
    both_factors,
    one_factor,
)
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair
from fermisvd.running import distributed
from fermisvd_convert.ahead import in_order
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.memory import decomposition_bytes, give_back
from fermisvd_convert.progress import bar
from fermisvd_convert.source import Source
from fermisvd_convert.stages.calibration import Statistics
from fermisvd_convert.workspace import Stage

FactorsOf = Callable[[LinearGroup], Pair]  # A (m x r) and B (r x n) of a group at its rank


@dataclass(frozen=True)
class KeptDecomposition(Decomposition):
    """Factors of the source's weights and the calibration's matrices, one of each pair kept in the workspace; the other
    is made when it is asked for, from the weights."""

    stage: Stage
    source: Source
    statistics: Statistics
    device: str

    def keep(self, group: LinearGroup) -> str:
        """Make a group's factors and keep one of them, unless it is there; returns its name."""
        name = group.name if len(group.members) == 1 else f"{group.name}+{len(group.members) - 1}"
        if not self.stage.has(name):
            self.stage.save(name, one_factor(self.made(group)))
        return name

    def factors(self, group: LinearGroup) -> Factors:
        kept = {name: tensor.to(self.device) for name, tensor in self.stage.load(self.keep(group)).items()}
        return both_factors(self.weights(group).to(self.device), kept)

    def sigma(self, group: LinearGroup) -> torch.Tensor:
        return self.stage.load(self.keep(group))["sigma"]

    def weights(self, group: LinearGroup) -> torch.Tensor:
        stored = [self.source.tensor(f"{name}.weight") for name in group.members]
        return torch.cat([weight.T if group.transposed else weight for weight in stored])

    def gram(self, source: str) -> torch.Tensor:
        return self.statistics.gram(source, torch.device(self.device))

    def outputs(self, group: LinearGroup, device: torch.device) -> list[OutputGram] | None:
        if self.statistics.outputs is None:
            return None
        return [self.statistics.output(name, device) for name in group.members]

    def kept(self, ranked: Sequence[RankedGroup]) -> FactorsOf:
        """What gives the factors of these groups, read when they are asked for."""
        ranks = {each.group: each.rank for each in ranked}
        return lambda group: self.factors(group).truncated(ranks[group])


def factor_bytes(group: LinearGroup, whitening: Whitening) -> int:
    """Of what is kept of a group's factors, but for one whose inputs or gradients vanish: see `one_factor`."""
    k = group.full_rank
    return 4 * k * (k if whitening == "kfac" else group.rows) + 8 * k


def decomposition_of(conversion: Conversion, statistics: Statistics) -> KeptDecomposition:
    """Where factors are kept, and what they are made of."""
    damping = ("of the median", DAMPING, OUTPUT_DAMPING, FAINT)
    stage = conversion.workspace.stage("factors", statistics.name, *damping)
    return KeptDecomposition(stage, conversion.source, statistics, conversion.device)


@timed("decompose")
def decompose(conversion: Conversion, statistics: Statistics, groups: Sequence[LinearGroup]) -> KeptDecomposition:
    """All groups' factors; each process makes its part of them."""
    decomposition = decomposition_of(conversion, statistics)
    own, workers = distributed.own_part(groups), conversion.workers(decomposition_bytes(conversion.size))
    with (
        bar("decompose", len(own), "group") as shown,
        closing(in_order(decomposition.keep, own, conversion.device, workers)) as kept,
    ):
        for _ in kept:
            give_back()
            shown.advance()
    conversion.workspace.wait_for_all()
    return decomposition
