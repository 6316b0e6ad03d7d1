"""The stages between a dense model and its ranks; each kept in the workspace, skipped when found there."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fermisvd import distributed
from fermisvd.blocks import BlocksError, DecoderBlocks, device_of
from fermisvd.budget import (
    Form,
    auto_alignment,
    factor_parameters,
    kept_parameters,
    round_to_budget,
    stays_dense,
    uniform_rank,
)
from fermisvd.calibration import Grams, OutputGrams, Part, calibration_grams, grams_by_blocks
from fermisvd.compress import GroupsRule, Whitening
from fermisvd.decomposition import DAMPING, OUTPUT_DAMPING, Factors, OutputGram, group_factors
from fermisvd.errors import FermiSVDError
from fermisvd.fermigrad import FermiGradSettings, install_gates, optimise_ranks
from fermisvd.groups import LinearGroup, Partition, find_groups, left_dense
from fermisvd.healing import HealingSettings, heal, rounded_factors
from fermisvd.jump import CANDIDATES, settle_jump
from fermisvd.losses import set_weight
from fermisvd.partition import fused_layers, join_groups, joined
from fermisvd.refit import DAMPING as REFIT_DAMPING
from fermisvd.refit import MIXTURES, refit
from fermisvd_convert.memory import Limits, give_back
from fermisvd_convert.source import Source
from fermisvd_convert.workspace import Workspace, file_hash, settings_key

logger = logging.getLogger("fermisvd")

FactorsOf = Callable[[LinearGroup], tuple[torch.Tensor, torch.Tensor]]


class RankFileError(FermiSVDError):
    """A --ranks file is not what it should be."""


def windows_key(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def structure(
    workspace: Workspace, key: str, rule: GroupsRule, load: Callable[[], nn.Module]
) -> tuple[list[LinearGroup], dict[str, int]]:
    """Groups of the model, found by a forward pass of a few tokens, and the matrices in no group (experts, routers).

    `auto` begins with separate groups; see `join`.
    """
    partition: Partition = "joint" if rule == "joint" else "separate"

    def run() -> dict:
        model = load()
        groups = find_groups(model, partition)
        return {"groups": [asdict(group) for group in groups], "left_dense": left_dense(model, groups)}

    found = workspace.json(f"structure-{settings_key(key, partition)}", run)
    return [linear_group(entry) for entry in found["groups"]], found["left_dense"]


def linear_group(entry: dict) -> LinearGroup:
    """A group from its JSON form."""
    fields = {name: entry[name] for name in ("columns", "side", "source")}
    fields["transposed"] = entry.get("transposed", False)  # kept by an older version, which had none
    return LinearGroup(tuple(entry["members"]), tuple(entry["member_rows"]), **fields)


@dataclass(frozen=True)
class Statistics:
    """Where the calibration's matrices are kept: stage of the inputs' Gram matrices, and of the outputs' (kfac)."""

    grams: str
    outputs: str | None


def statistics_of(key: str, windows: torch.Tensor, whitening: Whitening, batch_size: int, seed: int) -> Statistics:
    """Where `calibrate` keeps the matrices of a model, by its key, on these windows."""
    text = windows_key(windows)
    outputs = f"outputs-{settings_key(key, text, seed, batch_size)}" if whitening == "kfac" else None
    return Statistics(f"gram-{settings_key(key, text, batch_size)}", outputs)


def calibrate(
    workspace: Workspace,
    found: Statistics,
    groups: list[LinearGroup],
    windows: torch.Tensor,
    batch_size: int,
    load: Callable[[], nn.Module],
    limits: Limits,
    seed: int,
) -> None:
    """Gram matrix of every input that the groups read and, for kfac whitening, of every member's output gradient.

    Decoder block by decoder block; a block's matrices are kept as soon as it is done. A model that is no plain row of
    blocks is run whole, as often as it takes to gather all within limits.gram_bytes.
    """
    wanted = [(found.grams, group.source, group.columns) for group in groups]
    if found.outputs is not None:
        for group in groups:
            for name, rows in zip(group.members, group.member_rows, strict=True):
                wanted.append((found.outputs, name, min(rows, group.columns)))
    missing = []
    if distributed.rank() == 0:
        missing = [item for item in dict.fromkeys(wanted) if not workspace.has_tensors(*item[:2])]
    missing = distributed.from_first(missing)
    if not missing:
        return

    def keep(grams: Grams, outputs: OutputGrams) -> None:
        if distributed.rank():
            return
        for name, gram in grams.items():
            workspace.save_tensors(found.grams, name, {"gram": gram})
        for name, output in outputs.items():
            assert found.outputs is not None
            mean = torch.tensor(output.mean, dtype=torch.float64)
            workspace.save_tensors(found.outputs, name, {"matrix": output.matrix, "mean": mean})

    def names(items: list[tuple[str, str, int]]) -> Part:
        return [n for stage, n, _ in items if stage == found.grams], [
            n for stage, n, _ in items if stage != found.grams
        ]

    model, batches = load(), windows.split(batch_size)
    try:
        blocks = DecoderBlocks(model)
        blocks.first(batches[0].to(device_of(model)))
    except BlocksError as error:
        if limits.bounded:
            raise BlocksError(f"{error}; it is run whole, which --max-memory does not allow") from None
        logger.warning("%s; the model is run whole", error)
        passes = in_parts(missing, max(limits.gram_bytes, sum(p.nbytes for p in model.parameters())))
        for number, items in enumerate(passes, 1):
            shown = tqdm(batches, desc=f"calibrate ({number}/{len(passes)})", leave=False)
            keep(*calibration_grams(model, *names(items), shown, seed))
    else:
        with workspace.hidden_states(limits.hidden_bytes) as hidden:
            sources, members = names(missing)
            passes = len(blocks.blocks) * (2 if members else 1)  # there and, for gradients, back
            with tqdm(total=passes, desc="calibrate", unit="block", leave=False) as bar:
                limit = limits.gram_bytes
                for part in grams_by_blocks(blocks, sources, members, batches, hidden, seed, limit, bar.update):
                    keep(*part)
                    give_back()
    workspace.wait_for_all()


def in_parts(items: list[tuple[str, str, int]], limit_bytes: int) -> list[list[tuple[str, str, int]]]:
    """Items (stage, name, width) in parts whose float64 matrices of that width fit the limit."""
    parts, room = [], 0
    for item in items:
        size = 8 * item[2] ** 2
        if size > room or not parts:
            parts.append([])
            room = limit_bytes
        parts[-1].append(item)
        room -= size
    return parts


def group_weight(source: Source, group: LinearGroup) -> torch.Tensor:
    """W of a group, read from the source's files, (rows x columns)."""
    stored = [source.tensor(f"{name}.weight") for name in group.members]
    return torch.cat([weight.T if group.transposed else weight for weight in stored])


@dataclass(frozen=True)
class Decomposition:
    """The groups' factors by `input` or `kfac` whitening, each made once and kept in the workspace."""

    workspace: Workspace
    source: Source
    statistics: Statistics
    device: str

    @property
    def stage(self) -> str:
        return f"factors-{settings_key(asdict(self.statistics), DAMPING, OUTPUT_DAMPING)}"

    def decompose(self, groups: list[LinearGroup]) -> None:
        """Make all groups' factors that are not there yet; each process its share."""
        for group in tqdm(distributed.share(groups), desc="decompose", leave=False):
            self.factors(group)
            give_back()
        self.workspace.wait_for_all()

    def factors(self, group: LinearGroup) -> Factors:
        """A (m x k), B (k x n), float32, and sigma (k,) of W = A B."""
        name = group.name if len(group.members) == 1 else f"{group.name}+{len(group.members) - 1}"
        if not self.workspace.has_tensors(self.stage, name):
            gram = self.workspace.load_tensors(self.statistics.grams, group.source)["gram"]
            made = self.fit(group, None, gram.to(self.device))
            tensors = {"a": made.a.float(), "b": made.b.float(), "sigma": made.sigma}
            self.workspace.save_tensors(self.stage, name, tensors)
        return Factors(**self.workspace.load_tensors(self.stage, name))

    def whole(self, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """A (m x k) and B (k x n) of a group, W = A B."""
        factors = self.factors(group)
        return factors.a, factors.b

    def sigma(self, group: LinearGroup) -> torch.Tensor:
        """Singular values of a group's whitened W, (k,) descending, float64."""
        return self.factors(group).sigma

    def truncated(self, ranks: dict[LinearGroup, int]) -> FactorsOf:
        """What gives A (m x r) and B (r x n) of a group at its rank."""
        return lambda group: self.factors(group).truncated(ranks[group])

    def fit(self, group: LinearGroup, change: torch.Tensor | None, gram: torch.Tensor) -> Factors:
        """Factors of W, or of W M where `change` is M (n x n), for inputs with this Gram matrix (n x n)."""
        weights = group_weight(self.source, group).to(gram.device).split(list(group.member_rows))
        if self.statistics.outputs is None:
            return group_factors(weights, gram, None, change)
        outputs = []
        for name in group.members:
            kept = self.workspace.load_tensors(self.statistics.outputs, name)
            outputs.append(OutputGram(kept["matrix"].to(gram.device), kept["mean"].item()))
        return group_factors(weights, gram, outputs, change)


def fermigrad(
    decomposition: Decomposition,
    groups: list[LinearGroup],
    windows: torch.Tensor,
    remove: float,
    form: Form,
    count: Form,
    settings: FermiGradSettings,
    load: Callable[[], nn.Module],
    shard: bool = False,
) -> dict:
    """{"mu": {group: real rank}, "trace": [...]} of the rank optimisation.

    form: the form to be written; count: the form whose parameters are counted meanwhile. Where they differ (the paper
    counts svd and applies PivGa afterwards) the target is the count of the uniform ranks that remove the same.
    shard: whether the model is divided among the processes. An interrupted run goes on where it was kept last.
    """
    partition = [group.members for group in groups]
    key = settings_key(decomposition.stage, partition, windows_key(windows), remove, form, count, asdict(settings))

    def run() -> dict:
        model = load()
        gated = install_gates(model, groups, decomposition.whole, shard)
        begun, keep = decomposition.workspace.progress(f"ranks-{key}")
        done = len(begun["records"]) if begun else 0
        bar = tqdm(total=settings.steps, initial=done, desc="FermiGrad", leave=False)

        def show(record: dict) -> None:
            bar.update()
            bar.set_postfix(kl=f"{record['kl']:.4f}", kept=f"{record['kept']:.3f}")

        target: float = kept_parameters(groups, remove)
        if count != form:
            uniform = [uniform_rank(g, remove, form) for g in groups]
            target = sum(factor_parameters(r, g.rows, g.columns, count) for g, r in zip(groups, uniform, strict=True))
        kept = target / sum(g.dense_parameters for g in groups)
        mus, trace = optimise_ranks(
            model, groups, gated, windows, kept, count, settings, show, count == form, begun, keep
        )
        bar.close()
        return {"mu": {g.name: mu for g, mu in zip(groups, mus, strict=True)}, "trace": trace}

    return decomposition.workspace.json(f"ranks-{key}", run, together=True)


def settle(
    decomposition: Decomposition,
    groups: list[LinearGroup],
    mus: list[float],
    remove: float,
    align: int | None,
    minimum_rank: int,
    aside: torch.Tensor,
    batch_size: int,
    load: Callable[[], nn.Module],
) -> tuple[list[float], list[dict]]:
    """Real ranks of the svd form once it is measured which groups stay dense, and the record of each choice."""

    def run() -> dict:
        model = load()
        gated = install_gates(model, groups, decomposition.whole)
        budget = kept_parameters(groups, remove)
        ranks, records = settle_jump(model, groups, gated, mus, budget, aside, align, minimum_rank, batch_size)
        return {"mu": ranks, "records": records}

    partition = [group.members for group in groups]
    key = settings_key(
        decomposition.stage, partition, mus, remove, align, minimum_rank, windows_key(aside), batch_size, CANDIDATES
    )
    found = decomposition.workspace.json(f"jump-{key}", run)
    return found["mu"], found["records"]


def low_rank_student(
    load: Callable[[], nn.Module], decomposition: Decomposition, compressed: list[tuple[LinearGroup, int]]
) -> nn.Module:
    """The dense model with every compressed group's weight replaced by its low-rank product."""
    model, factors_of = load(), decomposition.truncated(dict(compressed))
    for group, _ in compressed:
        a, b = factors_of(group)
        set_weight(model, group, a @ b)
    return model


def join(
    decomposition: Decomposition,
    groups: list[LinearGroup],
    ranks: list[int],
    remove: float,
    form: Form,
    align: int | None,
    minimum_rank: int,
    aside: torch.Tensor,
    batch_size: int,
    load: Callable[[], nn.Module],
) -> tuple[list[LinearGroup], list[int], list[dict]]:
    """--groups auto: groups and ranks after joining parts of fused layers where the loss allows, and its records."""

    def run() -> dict:
        compressed = [(g, r) for g, r in zip(groups, ranks, strict=True) if not stays_dense(g, r, form)]
        dense, student = load(), low_rank_student(load, decomposition, compressed)
        records: list[dict] = []
        fused = sum(len(parts) > 1 for parts in fused_layers(groups))
        with tqdm(total=fused, desc="groups", leave=False) as bar:

            def show(record: dict) -> None:
                bar.update()
                records.append(record)

            chosen = join_groups(
                dense,
                student,
                groups,
                ranks,
                form,
                aside,
                decomposition.factors,
                lambda g: align or auto_alignment(g),
                batch_size,
                show,
            )
        return {"groups": [{**asdict(group), "rank": rank} for group, rank in chosen], "records": records}

    key = settings_key(decomposition.stage, [[g.members, r] for g, r in zip(groups, ranks, strict=True)], form, align)
    found = decomposition.workspace.json(f"groups-{settings_key(key, windows_key(aside), batch_size)}", run)
    fewer = [linear_group(entry) for entry in found["groups"]]
    chosen = [entry["rank"] for entry in found["groups"]]
    # joined groups may leave a step unspent
    return fewer, whole_ranks(fewer, chosen, remove, form, align, minimum_rank), found["records"]


def refit_groups(
    decomposition: Decomposition,
    compressed: list[tuple[LinearGroup, int]],
    windows: torch.Tensor,
    aside: torch.Tensor,
    batch_size: int,
    load: Callable[[], nn.Module],
) -> tuple[FactorsOf, list[dict]]:
    """Sequential refit; returns what gives A (m x r) and B (r x n) of a compressed group, and its records."""
    workspace, chosen = decomposition.workspace, [[g.members, r] for g, r in compressed]
    texts = [windows_key(windows), windows_key(aside), batch_size]
    stage = f"refit-{settings_key(decomposition.stage, chosen, texts, MIXTURES, REFIT_DAMPING)}"

    def run() -> dict:
        groups, ranks = [g for g, _ in compressed], [r for _, r in compressed]
        student = low_rank_student(load, decomposition, compressed)
        records: list[dict] = []
        with tqdm(total=len(compressed), desc="refit", leave=False) as bar:

            def show(record: dict) -> None:
                bar.update()
                records.append(record)

            found = refit(
                load(), student, groups, ranks, windows, aside, decomposition.fit, batch_size=batch_size, on_group=show
            )
        for name, (a, b) in found.items():
            workspace.save_tensors(stage, name, {"a": a.float(), "b": b.float()})
        return {"refitted": sorted(found), "records": records}

    result = workspace.json(stage, run, lambda r: all(workspace.has_tensors(stage, name) for name in r["refitted"]))
    unchanged = decomposition.truncated(dict(compressed))

    def factors_of(group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        if group.name in result["refitted"]:
            kept = workspace.load_tensors(stage, group.name)
            return kept["a"], kept["b"]
        return unchanged(group)

    return factors_of, result["records"]


def heal_factors(
    workspace: Workspace,
    key: str,
    checkpoint: Path,
    dtype: torch.dtype,
    windows: torch.Tensor,
    aside: torch.Tensor,
    settings: HealingSettings,
    load: Callable[[], nn.Module],
    load_student: Callable[[], nn.Module],
) -> tuple[dict[str, torch.Tensor], dict]:
    """The checkpoint's factors after distillation from the dense model, in their storage type, and its record.

    key: of the dense model; windows: to train on; aside: windows that say whether it helped.
    """
    factors = [file_hash(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    texts = [windows_key(windows), windows_key(aside)]
    stage = f"healed-{settings_key(key, factors, texts, asdict(settings))}"

    def run() -> dict:
        teacher, student = load(), load_student()
        with tqdm(total=settings.steps, desc="heal", leave=False) as bar:

            def show(record: dict) -> None:
                bar.update()
                bar.set_postfix(kl=f"{record['kl']:.4f}")

            record = heal(teacher, student, windows, aside, settings, show)
        workspace.save_tensors(stage, "factors", rounded_factors(student, dtype))
        return record

    record = workspace.json(stage, run, lambda _: workspace.has_tensors(stage, "factors"))
    return workspace.load_tensors(stage, "factors"), record


def ranks_from_file(
    path: Path, groups: list[LinearGroup], partition: GroupsRule
) -> tuple[list[LinearGroup], list[float]]:
    """Groups and ideal ranks of a JSON file {group's first member: rank}, or of an earlier conversion's fermisvd.json,
    whose own groups are taken over by --groups auto.

    Raises RankFileError if the file is unreadable, or its groups are not the model's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values.get("groups"), list):
            if partition == "auto":
                groups = groups_of_file(path, values["groups"], groups)
            values = {group["members"][0]: group["rank"] for group in values["groups"]}
        values = values.get("mu", values)
        ranks = {str(name): float(rank) for name, rank in values.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise RankFileError(f"{path}: not a file of ranks ({error})") from None
    for name, rank in ranks.items():
        if not 0 < rank < math.inf:
            raise RankFileError(f"{path}: {name} has rank {rank}, a positive number is needed")
    names = {group.name for group in groups}
    if strangers := ranks.keys() - names:
        raise RankFileError(f"{path}: {min(strangers)} is no group of the model (--groups must be the same)")
    if missing := names - ranks.keys():
        raise RankFileError(f"{path}: {min(missing)} has no rank in the file (--groups must be the same)")
    return groups, [ranks[group.name] for group in groups]


def groups_of_file(path: Path, entries: list[dict], groups: list[LinearGroup]) -> list[LinearGroup]:
    """The model's separate groups joined as the file's entries say. Raises RankFileError if they do not fit."""
    first = {entry["members"][0]: list(entry["members"]) for entry in entries}
    chosen, left = [], list(groups)
    while left:
        members = first.get(left[0].name, [])
        parts, left = left[: len(members)], left[len(members) :]
        if not parts or [group.name for group in parts] != members or len(fused_layers(parts)) != 1:
            name = (parts or left)[0].name
            raise RankFileError(f"{path}: its group of {name} is none of the model's")
        chosen.append(joined(parts))
    return chosen


def ideal_ranks(
    rule: str,
    groups: list[LinearGroup],
    partition: GroupsRule,
    remove: float,
    form: Form,
    run_fermigrad: Callable[[], dict],
) -> tuple[list[LinearGroup], list[float], list[dict]]:
    """Groups, real ranks by `uniform`, `fermigrad` or a file, and FermiGrad's trace, if any."""
    if rule == "uniform":
        return groups, [uniform_rank(g, remove, form) for g in groups], []
    if rule == "fermigrad":
        result = run_fermigrad()
        return groups, [result["mu"][group.name] for group in groups], result["trace"]
    groups, ideal = ranks_from_file(Path(rule), groups, partition)
    return groups, ideal, []


def whole_ranks(
    groups: list[LinearGroup], ideal: list[float], remove: float, form: Form, align: int | None, minimum_rank: int
) -> list[int]:
    """Integer ranks near the ideal ones, on the budget."""
    return round_to_budget(groups, ideal, kept_parameters(groups, remove), form, align, minimum_rank)
