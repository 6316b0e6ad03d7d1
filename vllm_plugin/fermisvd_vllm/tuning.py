"""Up to how many tokens a fused kernel beats plain operations: measured on this GPU while the model loads, never while
it serves."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

logger = logging.getLogger("vllm.fermisvd")

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS, CALLS = 5, 10
COARSE = 128  # ranks are measured in steps of it
TOLERANCE = 2**-6  # of the largest value: a wrong kernel is off by far more, another order of summing by far less

limits: dict[tuple, int] = {}  # key of a layer's shapes -> most tokens


def key_of(side: str, x: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> tuple:
    """What layers must share to share a measurement: all but the exact ranks, of which each model has many."""
    widths = [own.shape[-1] if side == "columns" else 0 for own in x]
    shapes = tuple((width, *map(coarse, each.shape)) for width, each in zip(widths, weights, strict=True))
    return side, weights[0].dtype, weights[0].device, shapes


def coarse(size: int) -> tuple[int, bool]:
    """Rounded up, and whether loads can be wide."""
    return -(-size // COARSE), size % 16 == 0


def limit(side: str, x: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> int:
    """Most tokens for which the kernel of `columns` (s, D) or `outputs` (t, A) is to be used; 0 if never measured."""
    return limits.get(key_of(side, x, weights), 0)


def measure(side: str, kernel: Callable, reference: Callable, x: Sequence[torch.Tensor], *more) -> None:
    """Remember the largest token count, of BUCKETS, up to which the kernel always beats its reference.

    x, more: its operands for the largest count, weights first among `more`. Where the kernel does not run, or its
    result is not the reference's, that is said in a warning and it is used for fewer tokens, if any.
    """
    from triton.runtime.errors import TritonError

    key, begin, best = key_of(side, x, more[0]), time.perf_counter(), 0
    if key in limits:
        return
    try:
        for tokens in BUCKETS:
            few = [own[:tokens] for own in x]
            check_agreement(kernel, reference, few, *more)
            if seconds(lambda few=few: kernel(few, *more)) >= seconds(lambda few=few: reference(few, *more)):
                break
            best = tokens
    except (RuntimeError, TritonError) as error:
        logger.warning(
            "FermiSVD: the kernel for %s is used up to %d tokens: %s: %s", side, best, type(error).__name__, error
        )
    torch._C._cuda_clearCublasWorkspaces()  # one a stream: the KV cache is to have the memory
    limits[key] = best
    taken = time.perf_counter() - begin
    logger.info("FermiSVD: kernel for %s %s up to %d tokens, measured in %.1f s", side, key[-1], best, taken)


def check_agreement(kernel: Callable, reference: Callable, x: Sequence[torch.Tensor], *more) -> None:
    """Raises RuntimeError where the kernel's result, or what it makes of x, is not the reference's."""

    def result(call: Callable) -> list[torch.Tensor]:
        copies = [own.clone() for own in x]
        found = call(copies, *more)
        return copies if found is None else [found]

    for found, expected in zip(result(kernel), result(reference), strict=True):
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
