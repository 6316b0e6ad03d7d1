"""Before `fermisvd heal`'s long work: whether memory has room for it, and in what passes."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from fermisvd.budget import factor_parameters
from fermisvd.errors import OptionError
from fermisvd.format import read_checkpoint, read_config, stacked_shape
from fermisvd.groups import find_groups
from fermisvd_convert.memory import (
    Need,
    Passes,
    Sizes,
    activation_bytes,
    fewer,
    head_bytes,
    healing_bytes,
    memory_of,
    missing,
    model_sizes,
)
from fermisvd_convert.options import HealOptions
from fermisvd_convert.output import files_of
from fermisvd_convert.source import Source
from fermisvd_convert.text import CalibrationText

logger = logging.getLogger("fermisvd")


def bytes_of(checkpoint: Path) -> int:
    """Of all its files."""
    return sum((checkpoint / name).stat().st_size for name in files_of(checkpoint))


def windows_that_fit(
    checkpoint: Path, source: Source, text: CalibrationText, options: HealOptions, dtype: torch.dtype, device: str
) -> int:
    """Windows of a pass, as many of a batch as memory has room for; said where they are fewer. dtype: of the student.
    Raises OptionError where it has none for one."""
    size, factors = sizes_of(checkpoint, source, text, dtype, device)
    host_room, lacking = memory_of("cpu", None) if device.startswith("cuda") else None, ""
    length = text.windows.shape[1]
    step = options.healing.step_windows(options.batch_size, length)
    on_grid = any(group.schemes for group in read_config(checkpoint).groups)
    for windows in fewer(options.batch_size):
        required = heal_needs(size, factors, Passes(windows, length), step, host_room is not None, on_grid)
        if not (lacking := missing(required, memory_of(device, None), host_room, "what the machine has")):
            if windows < options.batch_size:
                logger.warning("memory has room for passes of %d windows: a batch takes several", windows)
            return windows
    raise OptionError(lacking)


def sizes_of(
    checkpoint: Path, source: Source, text: CalibrationText, dtype: torch.dtype, device: str
) -> tuple[Sizes, int]:
    """Of the dense model, its compressed layers' numbers as `dense`, and how many numbers their factors have."""
    config, headers = read_checkpoint(checkpoint)
    shapes = [(each, *stacked_shape(each, headers, checkpoint)) for each in config.groups]
    groups, tokens = find_groups(source.stream(device, dtype)), text.windows.numel() + text.held_back.numel()
    size = model_sizes(source.headers, groups, source.vocabulary, tokens, dtype.itemsize, device)
    dense = sum(sum(rows) * columns for _, rows, columns in shapes)
    factors = sum(factor_parameters(each.rank, sum(rows), columns, each.form) for each, rows, columns in shapes)
    return replace(size, dense=dense), int(factors)


def heal_needs(
    size: Sizes, factors: int, passes: Passes, step_windows: int, on_gpu: bool, on_grid: bool = False
) -> dict[str, Need]:
    """Of the parts of `fermisvd heal`, by name. Models are loaded in the host's memory and then put on a GPU."""
    whole, kept = size.item * (size.blocks + size.outside), factors / size.dense
    student, states = whole - size.item * (size.dense - factors), size.item * size.text * size.width
    asked = whole + head_bytes(size, passes.tokens) + activation_bytes(size, passes.tokens) // 2
    trained, start = healing_bytes(size, passes, kept, step_windows, on_grid), size.item * factors
    shorter = "fewer --samples, or --sequence-length smaller"
    return {
        "the dense model": Need(asked, whole if on_gpu else 0, "--device cpu" if on_gpu else "--compute bfloat16"),
        "what the dense model makes of the text": Need(0, states, shorter),
        "healing": Need(trained, states + (max(start, student) if on_gpu else start), shorter),
    }
