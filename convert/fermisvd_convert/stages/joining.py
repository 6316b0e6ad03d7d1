"""--groups auto: parts of fused layers joined where the measured loss allows."""

from collections.abc import Sequence
from dataclasses import asdict

from transformers import PreTrainedModel

from fermisvd.bits import ranked_within
from fermisvd.budget import RankedGroup, compressed
from fermisvd.compress import set_aside
from fermisvd.joining import FEWEST_TOKENS, HOPE, TIE, TRIALS, FusedLayer, fused_layers, join_groups, layers_with_hopes
from fermisvd.losses import StudentLoss, set_products
from fermisvd.running import distributed
from fermisvd.running.streaming import fill_all
from fermisvd.teacher import Taught
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.decomposition import FactorsOf, KeptDecomposition
from fermisvd_convert.stages.structure import group_of


@timed("groups")
def join(
    conversion: Conversion, ranked: list[RankedGroup], decomposition: KeptDecomposition, taught: Taught
) -> list[RankedGroup]:
    """Groups and ranks after joining, where the options ask for it."""
    if not conversion.options.joins:
        return ranked
    options, budget = conversion.options, conversion.budget
    aside = set_aside(taught[: options.samples])[0]
    chosen = [[each.group.members, each.rank] for each in ranked]
    settings = (budget, aside.windows, options.batch_size, options.compute, HOPE, TRIALS, FEWEST_TOKENS, TIE)
    stage = conversion.workspace.stage("groups", decomposition.stage.name, chosen, *settings)

    def make() -> dict:
        records: list[dict] = []
        fused = fused_layers([each.group for each in ranked])
        with bar("compare spectra", len(fused), "layer") as shown:
            layers: list[FusedLayer] = []
            if distributed.this_process() == 0:  # what a last digit decides must be one decision
                layers = layers_with_hopes(ranked, budget, decomposition, shown.advance)
            layers = distributed.from_first(layers)
        with bar("join groups", sum(len(parts) > 1 for parts in fused), "layer") as shown:

            def show(record: dict) -> None:
                shown.show(record)
                records.append(record)

            student = load_products(conversion, compressed(ranked), decomposition.kept(ranked))
            loss = StudentLoss(student, aside, conversion.passes.windows)
            found, whole = join_groups(student, layers, decomposition, loss, show)
        groups = [{**asdict(each.group), "rank": each.rank} for each in found]
        return {"groups": groups, "records": records, "whole": whole}

    found = stage.json(make, together=True)
    groups = [group_of(entry) for entry in found["groups"]]
    conversion.choices["groups"], conversion.choices["joining"] = found["records"], found["whole"]
    # joined groups may leave a step unspent
    return ranked_within(budget, conversion.bits, groups, [entry["rank"] for entry in found["groups"]])


def load_products(conversion: Conversion, ranked: Sequence[RankedGroup], factors_of: FactorsOf) -> PreTrainedModel:
    """The dense model with the groups' A B for their weights, its blocks divided among the processes where memory asks
    for it, one after the other, so that the whole need not fit."""
    student = conversion.stream()

    def put(block: str) -> None:
        inside = (each.group for each in ranked if each.group.name.startswith(f"{block}."))
        set_products(student, ((group, factors_of(group)) for group in inside))

    fill_all(student, conversion.passes.parts > 1, put)
    return student
