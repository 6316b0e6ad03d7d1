"""The kept directions of all groups weighed anew."""

from collections.abc import Sequence

from fermisvd.budget import RankedGroup
from fermisvd.compress import set_aside
from fermisvd.gates import install_gates
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair
from fermisvd.refit import MIXTURES, REFIT_DAMPING, TRIAL_WINDOWS
from fermisvd.rescaling import BANDS, LONGEST, ROUNDS, SHORTEST, rescale
from fermisvd.running import distributed
from fermisvd.teacher import Taught
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.decomposition import FactorsOf, KeptDecomposition


@timed("rescale")
def rescale_groups(
    conversion: Conversion,
    ranked: Sequence[RankedGroup],
    decomposition: KeptDecomposition,
    factors_of: FactorsOf,
    taught: Taught,
) -> FactorsOf:
    """What gives A (m x r), its columns weighed, and B (r x n) of a compressed group; as they were where no rescaling
    is asked for. factors_of: theirs so far."""
    options = conversion.options
    if not options.rescales or not ranked:
        return factors_of
    aside, training = set_aside(taught[: options.samples])
    chosen = [[each.group.members, each.rank] for each in ranked]
    refit = (conversion.passes.windows, MIXTURES, REFIT_DAMPING, TRIAL_WINDOWS) if options.refits else None
    settings = (options.compute, refit, BANDS, ROUNDS, SHORTEST, LONGEST)
    stage = conversion.workspace.stage(
        "rescale", decomposition.stage.name, chosen, training.windows, aside.windows, *settings
    )

    def make() -> dict:
        records: list[dict] = []
        with bar("rescale", ROUNDS, "round") as shown:

            def show(record: dict) -> None:
                shown.show(record)
                records.append(record)

            model = conversion.stream()
            groups = [each.group for each in ranked]
            gated = install_gates(model, groups, factors_of, conversion.passes.parts > 1)
            weights = rescale(
                model,
                gated,
                [decomposition.sigma(each.group)[: each.rank] for each in ranked],
                conversion.windows.numel(),
                training,
                aside,
                batch_size=conversion.passes.windows,
                on_round=show,
            )
        if distributed.this_process() == 0:
            stage.save("weights", {group.name: own for group, own in zip(groups, weights, strict=True)})
        return {"records": records}

    conversion.choices["rescale"] = stage.json(make, lambda _: stage.has("weights"), together=True)["records"]
    conversion.workspace.wait_for_all()  # who did not write them learns of them
    weights = stage.load("weights")

    def rescaled(group: LinearGroup) -> Pair:
        a, b = factors_of(group)
        return a * weights[group.name].to(a), b

    return rescaled
