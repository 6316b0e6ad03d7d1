"""What the stages of a conversion share."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

from fermisvd.budget import Budget
from fermisvd.byte_budget import ByteBudget, in_type
from fermisvd_convert.ahead import workers_beside
from fermisvd_convert.memory import UNKNOWN, Limits, Passes, Sizes, give_back, memory_of
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.source import Source
from fermisvd_convert.text import CalibrationText, recorded_names
from fermisvd_convert.workspace import Workspace

P = ParamSpec("P")
R = TypeVar("R")


LONG_SECONDS = 5  # a step that took no longer held little: looking for it would take longer


@dataclass(frozen=True)
class Conversion:
    """The model and the text, how they are to be compressed, and where.

    options: as given, the open ones settled (sequence_length, samples that there are, refit, rescale, compute); key:
    hash of the model; storage: type of the factors; out: the folder to be made; left_files: files of MODEL that it will
    not have; device, limits, passes and size are known once the processes are there and the groups are; choices,
    seconds: what was decided by measurement, and how long each part took, for the record.
    """

    options: ConvertOptions
    out: Path
    source: Source
    key: str
    text: CalibrationText
    storage: torch.dtype
    workspace: Workspace
    left_files: tuple[str, ...]
    device: str
    limits: Limits = field(default_factory=lambda: Limits(0, 0))
    passes: Passes = field(default_factory=lambda: Passes(1, 1))
    size: Sizes = UNKNOWN
    choices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        return in_type(self.options.budget, self.storage)

    @property
    def bits(self) -> ByteBudget | None:
        """What is spent on bits once ranks are chosen."""
        return in_type(self.options.bits, self.storage) if self.options.bits else None

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.text.windows.shape[1]

    @property
    def windows(self) -> torch.Tensor:
        """Token ids that are calibrated on, (samples, length)."""
        return self.text.windows[: self.options.samples]

    def recorded_settings(self) -> dict[str, Any]:
        """The options that a record names, as they were settled; places only by their last names."""
        options = self.options
        return options.by_name() | {
            "ranks": Path(options.ranks).name,
            "calibration": recorded_names(options.calibration),
            "count": options.fermigrad.count or options.form,
            "align": options.align or "auto",
            "dtype": str(self.storage).removeprefix("torch."),
        }

    @property
    def compute(self) -> torch.dtype:
        """Type of the model's passes."""
        return getattr(torch, self.options.compute)

    def workers(self, each: int) -> int:
        """How many pieces of work that take so many bytes are in hand at once."""
        return workers_beside(self.device, memory_of(self.device, self.options.max_memory), each)

    def load(self) -> PreTrainedModel:
        """The dense model."""
        return self.source.load(self.device, self.compute)

    def stream(self) -> PreTrainedModel:
        """The dense model, one decoder block in memory at a time."""
        return self.source.stream(self.device, self.compute, bounded=self.options.max_memory is not None)


def timed(part: str) -> Callable[[Callable[Concatenate[Conversion, P], R]], Callable[Concatenate[Conversion, P], R]]:
    """A step whose wall-clock seconds are added up in its conversion, under the name of the part that it belongs to;
    what a long one held is given back before the next."""

    def decorate(step: Callable[Concatenate[Conversion, P], R]) -> Callable[Concatenate[Conversion, P], R]:
        @wraps(step)
        def run(conversion: Conversion, *args: P.args, **kwargs: P.kwargs) -> R:
            begin = time.perf_counter()
            result = step(conversion, *args, **kwargs)
            seconds = conversion.seconds.get(part, 0) + time.perf_counter() - begin
            if time.perf_counter() - begin > LONG_SECONDS:
                gc.collect()  # models hold themselves by their hooks
                give_back()
            conversion.seconds[part] = round(seconds, 2)
            return result

        return run

    return decorate
