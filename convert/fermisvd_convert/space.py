"""Space on disk: what a conversion will write is counted before its long work, and refused where it does not fit."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from rich.filesize import decimal

from fermisvd.errors import OutputError
from fermisvd.groups import LinearGroup, block_of
from fermisvd.joining import fused_layers, joined
from fermisvd_convert.conversion import Conversion
from fermisvd_convert.places import disk_of, existing
from fermisvd_convert.source import TORCH_TYPES
from fermisvd_convert.stages.calibration import Statistics
from fermisvd_convert.stages.decomposition import KeptDecomposition
from fermisvd_convert.writer import copied_files

SMALL_FILES = 2**20  # bytes: index, report, card, the stages' JSON


def check_space(needs: Mapping[Path, Mapping[str, int]]) -> None:
    """Raises OutputError, saying what was counted, if a disk has fewer bytes free than the folders on it need.

    needs: for each folder, there or not, the bytes still to be written below it, by what they are.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(disk_of(existing(folder)), []).append(folder)
    for folders in disks.values():
        free = shutil.disk_usage(existing(folders[0])).free
        needed = sum(sum(needs[folder].values()) for folder in folders)
        if needed > free:
            counted = "; ".join(
                f"{folder}: " + ", ".join(f"{name} {decimal(size)}" for name, size in needs[folder].items() if size)
                for folder in folders
            )
            raise OutputError(f"no space: {decimal(needed)} needed, {decimal(free)} free ({counted})")


def out_bytes(conversion: Conversion, groups: Sequence[LinearGroup]) -> dict[str, int]:
    """What the checkpoint will take, at most: factors on the budget, and all that is copied."""
    source, storage = conversion.source, conversion.storage
    replaced = {f"{name}.weight" for group in groups for name in group.members}
    dense = 0
    for name, info in source.headers.items():
        cast = conversion.options.dtype != "auto" and info.dtype in TORCH_TYPES
        dense += 0 if name in replaced else info.numel * storage.itemsize if cast else info.bytes
    found = {"dense tensors": dense, "factors": conversion.budget.numbers(groups) * storage.itemsize}
    if conversion.options.form == "pivga":
        found["permutations"] = sum(4 * (g.columns if g.side == "columns" else g.rows) for g in groups)
    copied = sum((source.folder / path).stat().st_size for path in copied_files(source.folder)[0])
    return found | {"other files": copied + SMALL_FILES}


def work_bytes(
    conversion: Conversion, decomposition: KeptDecomposition, groups: Sequence[LinearGroup]
) -> dict[str, int]:
    """What the stages will still write, at most; Gram matrices and factors that are there are not counted.

    Hidden states, float32, are gone before factors are made: the larger counts.
    """
    grams = _gram_bytes(decomposition.statistics, groups)
    states = 0
    if any(grams.values()):
        places = 2  # before and behind a block
        if decomposition.statistics.outputs is not None:
            places += len({block_of(group.name) for group in groups})  # gradients go back through all blocks
        states = places * conversion.windows.numel() * groups[0].columns * 4 - conversion.limits.hidden_bytes
    later = _factor_bytes(conversion, decomposition, groups)
    if states > sum(later.values()):
        later = {"hidden states": states}
    return grams | later | {"other stages": SMALL_FILES}


def _gram_bytes(statistics: Statistics, groups: Sequence[LinearGroup]) -> dict[str, int]:
    """Gram matrices, float64."""
    widths = {group.source: group.columns for group in groups}
    needed = {"input Gram matrices": sum(8 * n**2 for n in widths.values()) - statistics.inputs.bytes_written()}
    if statistics.outputs is not None:
        members = [min(rows, group.columns) for group in groups for rows in group.member_rows]
        needed["output Gram matrices"] = sum(8 * n**2 for n in members) - statistics.outputs.bytes_written()
    return {name: max(0, size) for name, size in needed.items()}


def _factor_bytes(
    conversion: Conversion, decomposition: KeptDecomposition, groups: Sequence[LinearGroup]
) -> dict[str, int]:
    """Factors of all groups, and of all that they may be joined to, float32; those refitted; those healed."""
    pieces = list(groups)
    for parts in fused_layers(groups) if conversion.options.groups == "auto" else []:
        pieces += [joined(parts[i:j]) for i, j in combinations(range(len(parts) + 1), 2) if j - i > 1]
    whole = sum(4 * g.full_rank * (g.rows + g.columns) for g in pieces)
    needed = {"factors": whole - decomposition.stage.bytes_written()}
    kept = conversion.budget.numbers(groups)
    if conversion.options.refits:
        needed["refitted factors"] = 8 * kept  # float32; r (m + n) is at most twice what pivga counts
    if conversion.options.healing.steps:
        needed["healed factors"] = kept * conversion.storage.itemsize
    return {name: max(0, size) for name, size in needed.items()}
