"""Up to how many tokens a fused kernel beats plain operations: measured on this GPU while the model loads, never while
it serves."""

import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

logger = logging.getLogger("vllm.fermisvd")

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS, CALLS = 5, 10
COARSE = 128  # ranks are measured in steps of it
TOLERANCE = 2**-6  # of the largest value: a wrong kernel is off by far more, another order of summing by far less


@dataclass
class Op:
    """An operation that is done in two ways: by one kernel where that is faster, for few tokens, else by its reference.

    Both are called with x, one tensor (tokens x width) a part; weights, one matrix a part; and what else they take.
    keyed_by_width: whether the widths of x count, beside the weights' shapes, when layers share a measurement.
    """

    name: str
    kernel: Callable
    reference: Callable
    keyed_by_width: bool
    limits: dict[tuple, int] = field(default_factory=dict)  # key of a layer's shapes -> most tokens for the kernel

    def __call__(self, x: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], *more: Any) -> Any:
        few = len(x[0]) <= self.limits.get(self.key(x, weights), 0)  # never, if it was not measured
        return (self.kernel if few else self.reference)(x, weights, *more)

    def key(self, x: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> tuple:
        """What layers must share to share a measurement: all but the exact ranks, of which each model has many."""
        widths = [own.shape[-1] if self.keyed_by_width else 0 for own in x]
        shapes = tuple((width, *map(coarse, each.shape)) for width, each in zip(widths, weights, strict=True))
        return weights[0].dtype, weights[0].device, shapes


def coarse(size: int) -> tuple[int, bool]:
    """Rounded up, and whether loads can be wide."""
    return -(-size // COARSE), size % 16 == 0


def measure(op: Op, x: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], *more) -> None:
    """Remember the largest token count, of BUCKETS, up to which the op's kernel always beats its reference.

    x: of the largest count. Where the kernel does not run, or its result is not the reference's, that is said in a
    warning and it is used for fewer tokens, if any.
    """
    from triton.runtime.errors import TritonError

    key, begin, best = op.key(x, weights), time.perf_counter(), 0
    if key in op.limits:
        return
    try:
        for tokens in BUCKETS:
            few = [own[:tokens] for own in x]
            check_agreement(op, few, weights, *more)
            kernel, reference = (
                seconds(lambda few=few, way=way: way(few, weights, *more)) for way in (op.kernel, op.reference)
            )
            if kernel >= reference:
                break
            best = tokens
    except (RuntimeError, TritonError) as error:
        logger.warning(
            "FermiSVD: the kernel for %s is used up to %d tokens: %s: %s", op.name, best, type(error).__name__, error
        )
    torch._C._cuda_clearCublasWorkspaces()  # one a stream: the KV cache is to have the memory
    op.limits[key] = best
    taken = time.perf_counter() - begin
    logger.info("FermiSVD: kernel for %s %s up to %d tokens, measured in %.1f s", op.name, key[-1], best, taken)


@dataclass(frozen=True)
class OwnOps:
    """Where our ops run, and what finds the token count up to which one's kernel is used."""

    devices: frozenset[str] = frozenset({"cuda"})
    measure: Callable[..., None] = measure

    def run_on(self, device: torch.device) -> bool:
        """Whether they do there: not where vLLM is to give the same result for any number of tokens."""
        return device.type in self.devices and os.environ.get("VLLM_BATCH_INVARIANT", "0") in ("", "0")


def noise(weight: torch.Tensor, width: int) -> torch.Tensor:
    """As many tokens as kernels are measured for, of that width."""
    return weight.new_empty(BUCKETS[-1], width).normal_(std=0.1)


def check_agreement(op: Op, x: Sequence[torch.Tensor], *more) -> None:
    """Raises RuntimeError where the kernel's result, or what it makes of x, is not the reference's."""

    def result(call: Callable) -> list[torch.Tensor]:
        copies = [own.clone() for own in x]
        found = call(copies, *more)
        return copies if found is None else [found]

    for found, expected in zip(result(op.kernel), result(op.reference), strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            raise RuntimeError(f"its result is off by {error:.1e} of the largest value")


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the median over replays of a CUDA graph of several: as decoding runs it, without launch costs."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(times[1:])


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
