"""Space on disk: what a conversion will write is counted before its long work, and refused where it does not fit."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from rich.filesize import decimal

from fermisvd.compress import Whitening
from fermisvd.errors import OutputError
from fermisvd.groups import LinearGroup, block_of
from fermisvd.joining import fused_layers, joined
from fermisvd.running.blocks import places_back
from fermisvd.schemes import GROUP_SIZES
from fermisvd_convert.conversion import Conversion
from fermisvd_convert.places import disk_of, existing
from fermisvd_convert.source import TORCH_TYPES
from fermisvd_convert.stages.calibration import strip_bytes
from fermisvd_convert.stages.decomposition import KeptDecomposition, factor_bytes
from fermisvd_convert.stages.teacher import batches_to_ask
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
    found = {"dense tensors": dense, "factors": factors_written(conversion, groups)}
    if conversion.options.form == "pivga":
        found["permutations"] = sum(4 * (g.columns if g.side == "columns" else g.rows) for g in groups)
    copied = sum((source.folder / path).stat().st_size for path in copied_files(source.folder)[0])
    return found | {"other files": copied + SMALL_FILES}


def factors_written(conversion: Conversion, groups: Sequence[LinearGroup]) -> int:
    """Bytes of all factors on the budget, at most, with scales and what packing fills up."""
    size, weights = conversion.storage.itemsize, conversion.options.weights
    if conversion.bits:
        return conversion.bits.numbers(groups)
    number = {"auto": size, "int4": 0.5 + size / GROUP_SIZES[-1]}.get(weights, 1)
    beside = 0 if weights == "auto" else sum(2 * group.rows + group.full_rank for group in groups) * (size + 4)
    return int(conversion.budget.parameters(groups) * number) + beside


def work_bytes(
    conversion: Conversion, decomposition: KeptDecomposition, groups: Sequence[LinearGroup]
) -> dict[str, int]:
    """What the stages will still write, at most; Gram matrices and factors that are there are not counted.

    Hidden states, for which memory has no room, are gone before factors are made: the larger counts.
    """
    options, statistics = conversion.options, decomposition.statistics
    first = gram_bytes(groups, options.whitening)
    for name, stage in zip(first, (statistics.inputs, statistics.outputs), strict=False):
        first[name] = max(0, first[name] - (stage.bytes_written() if stage else 0))
    states = 0
    if any(first.values()):
        places = 1  # behind a block
        if options.whitening == "kfac":
            places += places_back(len({block_of(group.name) for group in groups}))
        states = places * conversion.windows.numel() * groups[0].columns * conversion.compute.itemsize
        states -= conversion.limits.hidden_bytes + conversion.limits.device_hidden_bytes
    if options.asks_teacher:
        tokens = sum(batch.numel() for _, batch in batches_to_ask(conversion))
        asked = tokens * groups[0].columns * conversion.compute.itemsize
        first["the teacher's states"] = asked
        first["hidden states on the way to them"] = max(0, asked - conversion.limits.hidden_bytes)
    later = {"factors": factors_bytes(groups, options.whitening, options.groups == "auto")}
    later["factors"] = max(0, later["factors"] - decomposition.stage.bytes_written())
    kept = conversion.budget.parameters(groups)
    if options.refits:
        later["refitted factors"] = 8 * kept  # float32; r (m + n) is at most twice what pivga counts
    if options.healing.steps:
        later["healed factors"] = factors_written(conversion, groups)
    if states > sum(later.values()):
        later = {"hidden states": states}
    return first | later | {"other stages": SMALL_FILES}


def gram_bytes(groups: Sequence[LinearGroup], whitening: Whitening) -> dict[str, int]:
    """All Gram matrices in the work directory."""
    inputs = {group.source: group.columns for group in groups}
    needed = {"input Gram matrices": sum(map(strip_bytes, inputs.values()))}
    if whitening == "kfac":
        members = [min(rows, group.columns) for group in groups for rows in group.member_rows]
        needed["output Gram matrices"] = sum(map(strip_bytes, members))
    return needed


def factors_bytes(groups: Sequence[LinearGroup], whitening: Whitening, joins: bool) -> int:
    """What is kept of the factors of all groups; joins: and of all that they may be joined to."""
    pieces = list(groups)
    for parts in fused_layers(groups) if joins else []:
        pieces += [joined(parts[i:j]) for i, j in combinations(range(len(parts) + 1), 2) if j - i > 1]
    return sum(factor_bytes(piece, whitening) for piece in pieces)
