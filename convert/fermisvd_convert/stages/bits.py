"""--weights mixed: which factors get more bits, once ranks and factors are settled."""

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from fermisvd.bits import Way, choices_of, spend, ways_of
from fermisvd.budget import RankedGroup
from fermisvd.running import distributed
from fermisvd.schemes import COARSE, FINE
from fermisvd_convert.ahead import in_order
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.memory import give_back, writing_bytes
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.decomposition import FactorsOf, KeptDecomposition


@timed("bits")
def choose_bits(
    conversion: Conversion, ranked: Sequence[RankedGroup], factors_of: FactorsOf, decomposition: KeptDecomposition
) -> list[RankedGroup]:
    """The groups with the grids of their factors, where the options ask for it; each process weighs its part."""
    budget = conversion.bits
    if budget is None:
        return list(ranked)
    chosen = [[each.group.members, each.rank, each.form] for each in ranked]
    fitted = [conversion.choices.get(name) for name in ("refit", "rescale")]  # with the losses of what was kept
    stage = conversion.workspace.stage("bits", decomposition.stage.name, chosen, fitted, budget.dtype, COARSE, FINE)

    def weigh(each: RankedGroup) -> None:
        if not stage.has(each.group.name):
            ways = ways_of(each, factors_of, decomposition, budget.storage, conversion.windows.numel())
            stage.save(each.group.name, as_tensors(ways))

    conversion.workspace.wait_for_all()  # factors of joined groups are the first's
    own = distributed.own_part(ranked)
    workers = conversion.workers(writing_bytes(conversion.size, conversion.options.weights))
    with (
        bar("weigh bits", len(own), "group") as shown,
        closing(in_order(weigh, own, conversion.device, workers)) as weighed,
    ):
        for _ in weighed:
            give_back()
            shown.advance()
    conversion.workspace.wait_for_all()
    ways = [as_ways(each, stage.load(each.group.name)) for each in ranked]
    best = spend(ways, budget.numbers([each.group for each in ranked]))
    conversion.choices["bits"] = [
        {"group": each.group.name, "fine": list(way.fine), "kl": way.loss, "kl_coarse": all_ways[0].loss}
        for each, way, all_ways in zip(ranked, best, ways, strict=True)
    ]
    return [way.of(each) for way, each in zip(best, ranked, strict=True)]


def as_tensors(ways: Sequence[Way]) -> dict[str, torch.Tensor]:
    """Of all choices, in their order: bytes and losses."""
    losses = torch.tensor([way.loss for way in ways], dtype=torch.float64)
    return {"bytes": torch.tensor([way.bytes for way in ways]), "losses": losses}


def as_ways(ranked: RankedGroup, kept: Mapping[str, torch.Tensor]) -> list[Way]:
    pairs = zip(kept["bytes"].tolist(), kept["losses"].tolist(), strict=True)
    return [Way(fine, *pair) for fine, pair in zip(choices_of(ranked), pairs, strict=True)]
