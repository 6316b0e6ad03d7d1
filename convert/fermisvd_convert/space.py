"""Space on disk: what a conversion will write is counted before its long work, and refused where it does not fit."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from rich.filesize import decimal

from fermisvd.budget import Form, kept_parameters
from fermisvd.errors import FermiSVDError
from fermisvd.groups import LinearGroup, block_of
from fermisvd.partition import fused_layers, joined
from fermisvd_convert.memory import Limits
from fermisvd_convert.source import TORCH_TYPES, Source
from fermisvd_convert.stages import Decomposition
from fermisvd_convert.writer import copied_files

SMALL_FILES = 2**20  # bytes: index, report, card, the stages' JSON


class SpaceError(FermiSVDError):
    """A disk has no room for what the conversion will write."""


def check_space(needs: Mapping[Path, Mapping[str, int]]) -> None:
    """Raises SpaceError, saying what was counted, if a disk has fewer bytes free than the folders on it need.

    needs: for each folder, there or not, the bytes still to be written below it, by what they are.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(device_of(existing(folder)), []).append(folder)
    for folders in disks.values():
        free = shutil.disk_usage(existing(folders[0])).free
        needed = sum(sum(needs[folder].values()) for folder in folders)
        if needed > free:
            counted = "; ".join(
                f"{folder}: " + ", ".join(f"{name} {decimal(size)}" for name, size in needs[folder].items() if size)
                for folder in folders
            )
            raise SpaceError(f"no space: {decimal(needed)} needed, {decimal(free)} free ({counted})")


def existing(path: Path) -> Path:
    """The path, or what is nearest above it and there."""
    return next(place for place in (path, *path.parents) if place.exists())


def device_of(path: Path) -> int:
    """Number of the file system that holds the path."""
    return path.stat().st_dev


def out_bytes(
    source: Source, groups: Sequence[LinearGroup], remove: float, form: Form, storage: torch.dtype, cast_dense: bool
) -> dict[str, int]:
    """What the checkpoint will take, at most: factors on the budget, and all that is copied."""
    replaced = {f"{name}.weight" for group in groups for name in group.members}
    dense = 0
    for name, info in source.headers.items():
        cast = cast_dense and info.dtype in TORCH_TYPES
        dense += 0 if name in replaced else info.numel * storage.itemsize if cast else info.bytes
    found = {"dense tensors": dense, "factors": kept_parameters(groups, remove) * storage.itemsize}
    if form == "pivga":
        found["permutations"] = sum(4 * (g.columns if g.side == "columns" else g.rows) for g in groups)
    copied = sum((source.folder / path).stat().st_size for path in copied_files(source.folder)[0])
    return found | {"other files": copied + SMALL_FILES}


def work_bytes(
    decomposition: Decomposition,
    groups: Sequence[LinearGroup],
    remove: float,
    storage: torch.dtype,
    windows: torch.Tensor,
    limits: Limits,
    *,
    joins: bool,
    refits: bool,
    heals: bool,
) -> dict[str, int]:
    """What the stages will still write, at most; Gram matrices and factors that are there are not counted.

    windows: calibrated on, (samples, length); joins: whether layers that read the same input may be joined; refits,
    heals: whether those stages follow. Hidden states, float32, are gone before factors are made: the larger counts.
    """
    statistics, stage, folder = decomposition.statistics, decomposition.stage, decomposition.workspace.folder
    pieces = list(groups)
    for parts in fused_layers(groups) if joins else []:
        pieces += [joined(parts[i:j]) for i, j in combinations(range(len(parts) + 1), 2) if j - i > 1]
    widths = {group.source: group.columns for group in groups}
    members = [min(rows, group.columns) for group in groups for rows in group.member_rows]
    grams = {"input Gram matrices": sum(8 * n**2 for n in widths.values()) - written(folder / statistics.grams)}
    places = 2  # before and behind a block
    if statistics.outputs is not None:
        grams["output Gram matrices"] = sum(8 * n**2 for n in members) - written(folder / statistics.outputs)
        places += len({block_of(group.name) for group in groups})  # gradients go back through all blocks
    grams = {name: max(0, size) for name, size in grams.items()}
    states = places * windows.numel() * groups[0].columns * 4 - limits.hidden_bytes if any(grams.values()) else 0
    kept = kept_parameters(groups, remove)
    later = {"factors": sum(4 * g.full_rank * (g.rows + g.columns) for g in pieces) - written(folder / stage)}
    if refits:
        later["refitted factors"] = 8 * kept  # float32; r (m + n) is at most twice what pivga counts
    if heals:
        later["healed factors"] = kept * storage.itemsize
    later = {name: max(0, size) for name, size in later.items()}
    if states > sum(later.values()):
        later = {"hidden states": states}
    return grams | later | {"other stages": SMALL_FILES}


def written(folder: Path) -> int:
    """Bytes of the files in a folder, which need not be there."""
    return sum(path.stat().st_size for path in folder.glob("*"))
