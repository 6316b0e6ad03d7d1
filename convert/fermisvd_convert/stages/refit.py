"""Sequential refit of the groups' factors."""

from collections.abc import Sequence

from fermisvd.budget import RankedGroup
from fermisvd.compress import set_aside
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair, set_products
from fermisvd.refit import MIXTURES, REFIT_DAMPING, TRIAL_WINDOWS, refit
from fermisvd.running import distributed
from fermisvd.teacher import Taught
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.decomposition import FactorsOf, KeptDecomposition


@timed("refit")
def refit_groups(
    conversion: Conversion, ranked: Sequence[RankedGroup], decomposition: KeptDecomposition, taught: Taught
) -> FactorsOf:
    """What gives A (m x r) and B (r x n) of a compressed group; as they were decomposed where no refit is asked for."""
    options = conversion.options
    aside, training = set_aside(taught[: options.samples])
    chosen, unchanged = [[each.group.members, each.rank] for each in ranked], decomposition.kept(ranked)
    if not options.refits or not ranked:
        return unchanged
    settings = (conversion.passes.windows, options.compute, MIXTURES, REFIT_DAMPING, TRIAL_WINDOWS)
    stage = conversion.workspace.stage(
        "refit", decomposition.stage.name, chosen, training.windows, aside.windows, *settings
    )

    def make() -> dict:
        records: list[dict] = []
        with bar("refit", len({each.group.source for each in ranked}), "input") as shown:

            def show(record: dict) -> None:
                shown.show(record)
                records.append(record)

            student = set_products(conversion.load(), ((each.group, unchanged(each.group)) for each in ranked))
            found = refit(
                conversion.stream(),
                student,
                ranked,
                training.windows,
                aside,
                decomposition.fit,
                batch_size=conversion.passes.windows,
                on_source=show,
            )
        for name, (a, b) in found.items() if distributed.this_process() == 0 else ():
            stage.save(name, {"a": a.float(), "b": b.float()})
        return {"refitted": sorted(found), "records": records}

    result = stage.json(make, lambda found: all(stage.has(name) for name in found["refitted"]), together=True)
    conversion.workspace.wait_for_all()  # who did not write them learns of them

    def factors_of(group: LinearGroup) -> Pair:
        if group.name in result["refitted"]:
            kept = stage.load(group.name)
            return kept["a"], kept["b"]
        return unchanged(group)

    conversion.choices["refit"] = result["records"]
    return factors_of
