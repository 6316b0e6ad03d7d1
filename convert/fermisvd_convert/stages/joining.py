"""--groups auto: parts of fused layers joined where the measured loss allows."""

from dataclasses import asdict

from fermisvd.budget import RankedGroup, compressed
from fermisvd.joining import fused_layers, join_groups
from fermisvd.losses import set_products
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.decomposition import KeptDecomposition
from fermisvd_convert.stages.structure import group_of


@timed("groups")
def join(conversion: Conversion, ranked: list[RankedGroup], decomposition: KeptDecomposition) -> list[RankedGroup]:
    """Groups and ranks after joining, where the options ask for it."""
    if not conversion.options.joins:
        return ranked
    budget, batch_size, aside = conversion.budget, conversion.options.batch_size, conversion.aside
    chosen = [[each.group.members, each.rank] for each in ranked]
    stage = conversion.workspace.stage("groups", decomposition.stage.name, chosen, budget, aside, batch_size)

    def make() -> dict:
        records: list[dict] = []
        fused = sum(len(parts) > 1 for parts in fused_layers([each.group for each in ranked]))
        with bar("join groups", fused, "layer") as shown:

            def show(record: dict) -> None:
                shown.show(record)
                records.append(record)

            factors_of = decomposition.kept(ranked)
            factors = ((each.group, factors_of(each.group)) for each in compressed(ranked))
            dense, student = conversion.load(), set_products(conversion.load(), factors)
            found = join_groups(
                dense, student, ranked, budget, aside, decomposition.factors, batch_size=batch_size, on_layer=show
            )
        return {"groups": [{**asdict(each.group), "rank": each.rank} for each in found], "records": records}

    found = stage.json(make)
    groups = [group_of(entry) for entry in found["groups"]]
    # joined groups may leave a step unspent
    conversion.choices["groups"] = found["records"]
    return budget.ranked(groups, [entry["rank"] for entry in found["groups"]])
