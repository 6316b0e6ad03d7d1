"""--weights mixed: which factors get more bits, once ranks and factors are settled."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial

from fermisvd.bits import Way, check_room_for_bits, spend, ways_of
from fermisvd.budget import RankedGroup
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
    """The groups with the grids of their factors, where the options ask for it. Raises OptionError if they do not fit
    --bytes in the coarser one."""
    budget = conversion.bits
    if budget is None:
        return list(ranked)
    check_room_for_bits(ranked, budget)
    chosen = [[each.group.members, each.rank, each.form] for each in ranked]
    fitted = [conversion.choices.get(name) for name in ("refit", "rescale")]  # with the losses of what was kept
    stage = conversion.workspace.stage("bits", decomposition.stage.name, chosen, fitted, budget.dtype, COARSE, FINE)

    def make() -> list:
        work = partial(
            ways_of,
            factors_of=factors_of,
            decomposition=decomposition,
            dtype=budget.storage,
            tokens=conversion.windows.numel(),
        )
        workers = conversion.workers(writing_bytes(conversion.size, conversion.options.weights))
        found = []
        with (
            bar("weigh bits", len(ranked), "group") as shown,
            closing(in_order(work, ranked, conversion.device, workers)) as ways,
        ):
            for each in ways:
                found.append([vars(way) for way in each])
                give_back()
                shown.advance()
        return found

    conversion.workspace.wait_for_all()  # factors of joined groups are the first's
    ways = [[Way(tuple(way["fine"]), way["bytes"], way["loss"]) for way in each] for each in stage.json(make)]
    best = spend(ways, budget.numbers([each.group for each in ranked]))
    conversion.choices["bits"] = [
        {"group": each.group.name, "fine": list(way.fine), "kl": way.loss, "kl_coarse": all_ways[0].loss}
        for each, way, all_ways in zip(ranked, best, ways, strict=True)
    ]
    return [way.of(each) for way, each in zip(best, ranked, strict=True)]
