"""Calibration: Gram matrices of the inputs and, for kfac whitening, of the output gradients."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fermisvd.calibration import Grams, OutputGrams, Part, calibration_grams, grams_by_blocks, passes_by_blocks
from fermisvd.decomposition import OutputGram
from fermisvd.groups import LinearGroup
from fermisvd.running import distributed
from fermisvd.running.blocks import BlocksError, DecoderBlocks, device_of
from fermisvd.running.streaming import fill_all
from fermisvd_convert.ahead import in_order
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.memory import KEPT_AHEAD, give_back
from fermisvd_convert.progress import bar
from fermisvd_convert.stages.teacher import keeper
from fermisvd_convert.workspace import Stage

logger = logging.getLogger("fermisvd")
STRIP = 256  # rows of a Gram matrix that are kept together


class Matrix(NamedTuple):
    """A matrix that calibration is to gather: of the input of layer `name`, or of its output; (width x width)."""

    of_output: bool
    name: str
    width: int


@dataclass(frozen=True)
class Statistics:
    """Where the matrices are kept: those of the inputs, and those of the outputs; None with `input` whitening."""

    inputs: Stage
    outputs: Stage | None

    @property
    def name(self) -> list[str | None]:
        """What depends on them depends on this."""
        return [self.inputs.name, self.outputs and self.outputs.name]

    def has(self, matrix: Matrix) -> bool:
        stage = self.outputs if matrix.of_output else self.inputs
        return stage is not None and stage.has(matrix.name)

    def keep(self, grams: Grams, outputs: OutputGrams) -> None:
        """Keep a part of the matrices, which the first process does for all."""
        if distributed.this_process():
            return
        for name, gram in grams.items():
            self.inputs.save(name, strips(gram))
        for name, output in outputs.items():
            assert self.outputs is not None
            mean = torch.tensor(output.mean, dtype=torch.float64)
            self.outputs.save(name, strips(output.matrix) | {"mean": mean})

    def gram(self, source: str, device: torch.device) -> torch.Tensor:
        """C of the input of a layer, (n x n), float32."""
        return from_strips(self.inputs.load(source), device)

    def output(self, member: str, device: torch.device) -> OutputGram:
        """G of the output of a layer."""
        assert self.outputs is not None
        kept = self.outputs.load(member)
        mean = kept.pop("mean").item()
        return OutputGram(from_strips(kept, device).double(), mean)


def strips(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """A symmetric matrix (n x n) as it is kept: STRIP rows at a time, up to the diagonal, float32, named by the first
    row. Every entry is rounded relative to itself, so that channels of little energy lose no more than others."""
    return {str(i): matrix[i : i + STRIP, : i + STRIP].float() for i in range(0, len(matrix), STRIP)}


def from_strips(kept: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The matrix (n x n) again, float32."""
    width = max(strip.shape[1] for strip in kept.values())
    matrix = torch.empty(width, width, device=device)
    for first, strip in ((int(name), strip.to(device)) for name, strip in kept.items()):
        matrix[first : first + STRIP, : first + STRIP] = strip
        matrix[:first, first : first + STRIP] = strip[:, :first].T
    return matrix


def strip_bytes(width: int) -> int:
    """Of a (width x width) matrix in strips."""
    return sum(4 * min(STRIP, width - i) * min(i + STRIP, width) for i in range(0, width, STRIP))


def statistics_of(conversion: Conversion) -> Statistics:
    """Where `calibrate` keeps them."""
    options, workspace = conversion.options, conversion.workspace
    common = (conversion.key, conversion.windows, conversion.passes.calibrated, options.compute)
    outputs = workspace.stage("outputs", *common, options.seed) if options.whitening == "kfac" else None
    return Statistics(workspace.stage("gram", *common), outputs)


@timed("calibrate")
def calibrate(conversion: Conversion, groups: Sequence[LinearGroup]) -> Statistics:
    """Matrices of every input that the groups read and of every member's output.

    Decoder block by decoder block; a block's matrices are kept as soon as it is done.
    """
    statistics = statistics_of(conversion)
    wanted = [Matrix(False, group.source, group.columns) for group in groups]
    if statistics.outputs is not None:
        members = [(g, name, rows) for g in groups for name, rows in zip(g.members, g.member_rows, strict=True)]
        wanted += [Matrix(True, name, min(rows, group.columns)) for group, name, rows in members]
    missing = []
    if distributed.this_process() == 0:
        missing = [matrix for matrix in dict.fromkeys(wanted) if not statistics.has(matrix)]
    missing = distributed.from_first(missing)
    if missing:
        _gather(conversion, statistics, missing)
        conversion.workspace.wait_for_all()
    return statistics


def _gather(conversion: Conversion, statistics: Statistics, missing: Sequence[Matrix]) -> None:
    model, options, limits = conversion.stream(), conversion.options, conversion.limits
    batches = conversion.windows.split(conversion.passes.calibrated)
    try:
        with bar("take the model apart", 1, "batch"):
            blocks = DecoderBlocks(model)
            blocks.first(batches[0].to(device_of(model)))
    except BlocksError as error:
        if limits.bounded:
            raise BlocksError(f"{error}; it is run whole, which --max-memory does not allow") from None
        logger.warning("%s; the model is run whole", error)
        fill_all(model)  # the way back needs its weights again
        room = max(limits.gram_bytes, sum(p.nbytes for p in model.parameters()))
        parts = in_parts(missing, room)
        with bar("calibrate", len(parts) * len(distributed.own_part(batches)), "batch") as shown:
            for part in parts:
                statistics.keep(*calibration_grams(model, *_names(part), batches, options.seed, shown.advance))
        return
    names = _names(missing)
    passes = passes_by_blocks(blocks, *names, batches, limits.gram_bytes)
    with (
        conversion.workspace.hidden_states(limits.hidden_bytes, limits.device_hidden_bytes) as hidden,
        bar("calibrate", passes, "batch") as shown,
    ):
        limit = limits.gram_bytes
        given = (blocks, *names, batches, hidden, options.seed, limit, shown.advance)
        parts = grams_by_blocks(*given, on_last=keeper(conversion, model))
        workers = KEPT_AHEAD if limits.copies > 1 else 1  # the disk has its time beside a GPU
        with closing(in_order(lambda part: statistics.keep(*part), parts, conversion.device, workers)) as kept:
            for _ in kept:
                give_back()


def _names(matrices: Sequence[Matrix]) -> Part:
    """Layers whose inputs, and layers whose outputs are meant."""
    return [m.name for m in matrices if not m.of_output], [m.name for m in matrices if m.of_output]


def in_parts(matrices: Sequence[Matrix], limit_bytes: int) -> list[list[Matrix]]:
    """Matrices in parts whose float64 numbers fit the limit, one at least in each: a model that is no plain row of
    blocks is run whole, once a part."""
    parts, room = [], 0
    for matrix in matrices:
        size = 8 * matrix.width**2
        if size > room or not parts:
            parts.append([])
            room = limit_bytes
        parts[-1].append(matrix)
        room -= size
    return parts
