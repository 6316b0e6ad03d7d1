"""Seconds and peak memory of a conversion, stage by stage."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from benchmarks.cost.depth import AnonymousPeak
from fermisvd_convert import convert as program

STAGES = {
    "calibrate": "calibration",
    "evaluate_dense": "evaluation of the dense model",
    "decompose": "decomposition",
    "ask_teacher": "the teacher",
    "choose_ranks": "FermiGrad",
    "join": "--groups auto",
    "refit_groups": "--refit",
    "rescale_groups": "--rescale",
    "write": "writing",
    "heal_factors": "healing",
    "evaluate_compressed": "evaluation",
}


def watch_stages() -> dict[str, dict[str, Any]]:
    """What every stage took from now on, by its name as `fermisvd_convert.memory.needs` has it, and printed: seconds,
    growth of the anonymous resident set since now, its height, and on a GPU what torch had allocated at most."""
    found: dict[str, dict[str, Any]] = {}
    start = AnonymousPeak.read()
    for stage, name in STAGES.items():
        setattr(program, stage, _watched(name, getattr(program, stage), start, found))
    return found


def _watched(name: str, run: Callable, start: int, found: dict[str, dict[str, Any]]) -> Callable:
    @wraps(run)
    def watch(*args: Any, **kwargs: Any) -> Any:
        resident = AnonymousPeak()
        resident.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        result = run(*args, **kwargs)
        row = {"seconds": round(time.perf_counter() - begin, 2), "resident_growth_bytes": resident.peak - start}
        row["resident_bytes"] = resident.peak
        resident.stopped.set()
        if torch.cuda.is_available():
            row["device_bytes"] = torch.cuda.max_memory_allocated()
        found[name] = row
        print(name, row, flush=True)
        return result

    return watch
