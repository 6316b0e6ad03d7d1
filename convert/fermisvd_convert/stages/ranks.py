"""Real ranks of the groups: by a rule, or of a file."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fermisvd.byte_budget import ByteBudget
from fermisvd.compress import RANK_RULES, set_aside
from fermisvd.dense_choice import CANDIDATES, choose_dense
from fermisvd.fermigrad import optimise_ranks
from fermisvd.gates import install_gates
from fermisvd.groups import LinearGroup
from fermisvd.teacher import Taught
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.decomposition import KeptDecomposition
from fermisvd_convert.stages.rank_file import ranks_from_file


@dataclass(frozen=True)
class IdealRanks:
    """groups and their real ranks, on the budget or near it; trace: FermiGrad's steps."""

    groups: list[LinearGroup]
    ranks: list[float]
    trace: list[dict] = field(default_factory=list)


@timed("ranks")
def choose_ranks(
    conversion: Conversion, groups: list[LinearGroup], decomposition: KeptDecomposition, taught: Taught
) -> IdealRanks:
    """By the rule that the options name. Raises OptionError for a file that is not what it should be."""
    options = conversion.options
    if options.ranks in RANK_RULES and conversion.budget.holds_all(groups):
        return IdealRanks(groups, [group.full_rank for group in groups])
    if options.ranks == "uniform":
        return IdealRanks(groups, conversion.budget.uniform_ranks(groups))
    if options.ranks != "fermigrad":
        return IdealRanks(*ranks_from_file(Path(options.ranks), groups, options.groups))
    found = fermigrad_ranks(conversion, groups, decomposition, taught[: options.gradient_samples])
    aside = set_aside(taught[: options.samples])[0]
    return settle_dense(conversion, found, decomposition, aside) if options.form == "svd" else found


def fermigrad_ranks(
    conversion: Conversion, groups: list[LinearGroup], decomposition: KeptDecomposition, taught: Taught
) -> IdealRanks:
    """FermiGrad's; an interrupted run goes on where it was kept last."""
    options, windows = conversion.options, taught.windows
    members = [group.members for group in groups]
    budget = asdict(replace(conversion.budget, align=None))  # of which real ranks know nothing
    if not isinstance(conversion.budget, ByteBudget):  # nor of grids, unless bytes are counted
        del budget["weights"]
    settings = (budget, options.fermigrad, options.batch_size, options.seed, options.compute)
    stage = conversion.workspace.stage("ranks", decomposition.stage.name, members, windows, *settings)

    def make() -> dict:
        begun, keep = stage.progress()
        done = len(begun["records"]) if begun else 0
        with bar("FermiGrad", options.fermigrad.steps, done=done) as shown:
            model = conversion.stream()
            gated = install_gates(model, groups, decomposition.whole, conversion.passes.parts > 1)
            mus, trace = optimise_ranks(
                model,
                groups,
                gated,
                taught,
                conversion.budget,
                options.fermigrad,
                batch_size=options.batch_size,
                seed=options.seed,
                on_step=shown.show,
                begun=begun,
                on_progress=keep,
                at_once=conversion.passes.windows,
            )
        return {"mu": {group.name: mu for group, mu in zip(groups, mus, strict=True)}, "trace": trace}

    found = stage.json(make, together=True)
    return IdealRanks(groups, [found["mu"][group.name] for group in groups], found["trace"])


def settle_dense(
    conversion: Conversion, found: IdealRanks, decomposition: KeptDecomposition, aside: Taught
) -> IdealRanks:
    """Of the svd form: real ranks once it is measured which groups stay dense."""
    options, budget, groups = conversion.options, conversion.budget, found.groups
    members = [group.members for group in groups]
    settings = (budget, aside.windows, options.batch_size, CANDIDATES, options.compute)
    stage = conversion.workspace.stage("dense-groups", decomposition.stage.name, members, found.ranks, *settings)

    def make() -> dict:
        with bar("choose dense groups", 2 * min(CANDIDATES, len(groups)), "choice") as shown:
            model = conversion.stream()
            gated = install_gates(model, groups, decomposition.whole, conversion.passes.parts > 1)
            ranks, records = choose_dense(
                model,
                groups,
                gated,
                found.ranks,
                budget,
                aside,
                batch_size=conversion.passes.windows,
                on_choice=shown.advance,
            )
        return {"mu": ranks, "records": records}

    settled = stage.json(make, together=True)
    conversion.choices["dense"] = settled["records"]
    return replace(found, ranks=settled["mu"])
