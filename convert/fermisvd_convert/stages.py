"""The stages between a dense model and its ranks; each kept in the workspace, skipped when found there."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fermisvd.budget import Form, kept_parameters, round_to_budget, uniform_ranks
from fermisvd.calibration import gram_matrices
from fermisvd.decomposition import data_aware_svd
from fermisvd.errors import FermiSVDError
from fermisvd.fermigrad import FermiGradSettings, install_gates, optimise_ranks
from fermisvd.groups import LinearGroup, Partition, find_groups, left_dense
from fermisvd_convert.source import Source
from fermisvd_convert.workspace import Workspace, settings_key

DAMPING = 1e-6  # of mean(diag C): orders the directions that calibration never saw, changes no other


class RankFileError(FermiSVDError):
    """A --ranks file is not what it should be."""


def windows_key(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def structure(
    workspace: Workspace, key: str, partition: Partition, load: Callable[[], nn.Module]
) -> tuple[list[LinearGroup], dict[str, int]]:
    """Groups of the model, found by a forward pass of a few tokens, and the matrices in no group (experts, routers)."""

    def run() -> dict:
        groups = find_groups(load(), partition)
        return {"groups": [asdict(group) for group in groups], "left_dense": left_dense(load(), groups)}

    found = workspace.json(f"structure-{settings_key(key, partition)}", run)
    groups = [
        LinearGroup(**{**g, "members": tuple(g["members"]), "member_rows": tuple(g["member_rows"])})
        for g in found["groups"]
    ]
    return groups, found["left_dense"]


def calibrate(
    workspace: Workspace,
    key: str,
    groups: list[LinearGroup],
    windows: torch.Tensor,
    batch_size: int,
    load: Callable[[], nn.Module],
    limit_bytes: int,
) -> str:
    """Gram matrix of every input the groups read; returns the stage's name.

    As many matrices are gathered in one pass over the text as fit `limit_bytes`; finished ones are kept.
    """
    stage = f"gram-{settings_key(key, windows_key(windows))}"
    widths = {group.source: group.columns for group in groups}
    missing = [name for name in widths if not workspace.has_tensors(stage, name)]
    passes: list[list[str]] = []
    room = 0
    for name in missing:
        size = 8 * widths[name] ** 2
        if size > room or not passes:
            passes.append([])
            room = limit_bytes
        passes[-1].append(name)
        room -= size
    for number, names in enumerate(passes, 1):
        batches = tqdm(windows.split(batch_size), desc=f"calibrate ({number}/{len(passes)})", leave=False)
        for name, gram in gram_matrices(load(), names, batches).items():
            workspace.save_tensors(stage, name, {"gram": gram})
    return stage


def group_weight(source: Source, group: LinearGroup) -> torch.Tensor:
    """W of a group, read from the source's files, (rows x columns)."""
    return torch.cat([source.tensor(f"{name}.weight") for name in group.members])


def decompose(workspace: Workspace, source: Source, groups: list[LinearGroup], gram_stage: str, device: str) -> str:
    """U and sigma of every group; returns the stage's name."""
    partition = [group.members for group in groups]
    stage = f"spectra-{settings_key(gram_stage, DAMPING, partition)}"
    missing = [group for group in groups if not workspace.has_tensors(stage, group.name)]
    for group in tqdm(missing, desc="decompose", leave=False, disable=not missing):
        gram = workspace.load_tensors(gram_stage, group.source)["gram"].to(device)
        u, sigma = data_aware_svd(group_weight(source, group).to(device), gram, DAMPING)
        workspace.save_tensors(stage, group.name, {"u": u.float(), "sigma": sigma})
    return stage


def fermigrad(
    workspace: Workspace,
    groups: list[LinearGroup],
    spectra_stage: str,
    windows: torch.Tensor,
    remove: float,
    form: Form,
    settings: FermiGradSettings,
    load: Callable[[], nn.Module],
) -> dict:
    """{"mu": {group: real rank}, "trace": [...]} of the rank optimisation."""

    def run() -> dict:
        model = load()
        gated = install_gates(model, groups, lambda group: workspace.load_tensors(spectra_stage, group.name)["u"])
        bar = tqdm(total=settings.steps, desc="FermiGrad", leave=False)

        def show(record: dict) -> None:
            bar.update()
            bar.set_postfix(kl=f"{record['kl']:.4f}", kept=f"{record['kept']:.3f}")

        kept = kept_parameters(groups, remove) / sum(g.dense_parameters for g in groups)
        mus, trace = optimise_ranks(model, groups, gated, windows, kept, form, settings, show)
        bar.close()
        return {"mu": {g.name: mu for g, mu in zip(groups, mus, strict=True)}, "trace": trace}

    key = settings_key(spectra_stage, windows_key(windows), remove, form, asdict(settings))
    return workspace.json(f"ranks-{key}", run)


def ranks_from_file(path: Path, groups: list[LinearGroup]) -> list[float]:
    """Ideal ranks of a JSON file {group's first member: rank}, or of an earlier conversion's fermisvd.json.

    Raises RankFileError if the file is unreadable, or its groups are not the model's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values.get("groups"), list):
            values = {group["members"][0]: group["rank"] for group in values["groups"]}
        values = values.get("mu", values)
        ranks = {str(name): float(rank) for name, rank in values.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RankFileError(f"{path}: not a file of ranks ({error})") from None
    names = {group.name for group in groups}
    if strangers := ranks.keys() - names:
        raise RankFileError(f"{path}: {min(strangers)} is no group of the model (--groups must be the same)")
    if missing := names - ranks.keys():
        raise RankFileError(f"{path}: {min(missing)} has no rank in the file (--groups must be the same)")
    return [ranks[group.name] for group in groups]


def choose_ranks(
    rule: str,
    groups: list[LinearGroup],
    remove: float,
    form: Form,
    align: int | None,
    run_fermigrad: Callable[[], dict],
) -> tuple[list[int], list[dict]]:
    """Integer ranks on the budget by `uniform`, `fermigrad` or a file, and FermiGrad's trace."""
    if rule == "uniform":
        return uniform_ranks(groups, remove, form, align), []
    if rule == "fermigrad":
        result = run_fermigrad()
        ideal, trace = [result["mu"][group.name] for group in groups], result["trace"]
    else:
        ideal, trace = ranks_from_file(Path(rule), groups), []
    return round_to_budget(groups, ideal, kept_parameters(groups, remove), form, align), trace
