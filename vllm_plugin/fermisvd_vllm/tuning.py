"""Up to how many tokens a fused kernel beats plain operations: measured on this GPU while the model loads, never while
it serves."""

import logging
import statistics
from collections.abc import Callable
from functools import cache

import torch

logger = logging.getLogger("fermisvd")

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS, CALLS = 5, 10
COARSE = 128  # ranks are measured in steps of it
TOLERANCE = 2**-6  # of the largest value: a wrong kernel is off by far more, another order of summing by far less


def columns_most_tokens(width: int, ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many tokens `columns_kernel` is the faster. width: n; ranks: r of each group."""
    ranks = tuple(coarse(rank, width) for rank in ranks)
    return most_tokens("columns", (width, ranks), dtype, device) if min(ranks) < width else 0


def outputs_most_tokens(
    ranks: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    """Up to how many tokens `outputs_kernel` is the faster. ranks, sizes: r and m of each member."""
    return most_tokens("outputs", (tuple(coarse(rank) for rank in ranks), sizes), dtype, device)


def coarse(rank: int, most: int | None = None) -> int:
    """The rank to measure in the place of this one: layers of a model differ in rank, and few shapes are measured.
    A rank that loads cannot be wide at is measured as it is."""
    near = rank if rank % 16 else -(-rank // COARSE) * COARSE
    return near if most is None else min(near, most)


def most_tokens(side: str, shape: tuple, dtype: torch.dtype, device: torch.device) -> int:
    """Largest token count, of BUCKETS, up to which a kernel always beats its reference.

    side, shape: columns, (n, ranks); outputs, (ranks, sizes). 0 without a GPU, and, with a warning, where the kernel
    does not run or its result is not the reference's.
    """
    return _measured(side, shape, dtype, device) if device.type == "cuda" else 0


def operands(side: str, shape: tuple, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Random ones of a kernel."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=dtype, device=device) / sizes[-1] ** 0.5

    if side == "columns":
        width, ranks = shape
        return [random(tokens, width) for _ in ranks], [random(rank, width - rank) for rank in ranks]
    ranks, sizes = shape
    return [random(tokens, rank) for rank in ranks], [random(*size) for size in zip(sizes, ranks, strict=True)]


@cache
def _measured(side: str, shape: tuple, dtype: torch.dtype, device: torch.device) -> int:
    from fermisvd_vllm import kernels

    kernel, reference = getattr(kernels, f"{side}_kernel"), getattr(kernels, f"{side}_reference")
    best = 0
    try:
        for tokens in BUCKETS:
            given = operands(side, shape, tokens, dtype, device)
            check_agreement(kernel, reference, given)
            if seconds(lambda given=given: kernel(*given)) >= seconds(lambda given=given: reference(*given)):
                break
            best = tokens
    except Exception as error:
        logger.warning("the fused kernel for %s %s is not used: %s: %s", side, shape, type(error).__name__, error)
        return 0
    return best


def check_agreement(kernel: Callable, reference: Callable, given: tuple) -> None:
    """Raises RuntimeError where the kernel's result, or what it makes of its first operand, is not the reference's."""

    def result(call: Callable) -> list[torch.Tensor]:
        first = [x.clone() for x in given[0]]
        found = call(first, *given[1:])
        return first if found is None else [found]

    for found, expected in zip(result(kernel), result(reference), strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            raise RuntimeError(f"its result is off by {error:.1e} of the largest value")


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the median over replays of a CUDA graph of several: as decoding runs it, without launch costs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
