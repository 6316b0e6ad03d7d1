"""Up to how many tokens a fused kernel beats plain operations: measured on this GPU while the model loads, never while
it serves."""

import logging
import statistics
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch

logger = logging.getLogger("fermisvd")

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS, CALLS = 5, 10
COARSE = 128  # ranks are measured in steps of it
TOLERANCE = 2**-6  # of the largest value: a wrong kernel is off by far more, another order of summing by far less


def columns_most_tokens(width: int, ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many tokens `columns_kernel` is the faster. width: n; ranks: r of each group."""
    ranks = tuple(coarse(rank, width) for rank in ranks)
    return most_tokens("columns", width, (ranks,), dtype, device) if min(ranks) < width else 0


def outputs_most_tokens(
    ranks: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    """Up to how many tokens `outputs_kernel` is the faster. ranks, starts, sizes: of each member, as the kernel's."""
    groups = dict(sorted(zip(starts, (coarse(rank) for rank in ranks), strict=True)))  # where it starts -> its rank
    begins = dict(zip(groups, accumulate(groups.values(), initial=0), strict=False))
    shape = tuple(groups[start] for start in starts), tuple(begins[start] for start in starts), sizes
    return most_tokens("outputs", sum(groups.values()), shape, dtype, device)


def rows_most_tokens(rank: int, height: int, dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many tokens `rows_kernel` is the faster. height: m."""
    rank = coarse(rank, height)
    return most_tokens("rows", rank, (height,), dtype, device) if rank < height else 0


def coarse(rank: int, most: int | None = None) -> int:
    """The rank to measure in the place of this one: layers of a model differ in rank, and few shapes are measured.
    A rank that loads cannot be wide at is measured as it is."""
    near = rank if rank % 16 else -(-rank // COARSE) * COARSE
    return near if most is None else min(near, most)


def most_tokens(side: str, inner: int, shape: tuple, dtype: torch.dtype, device: torch.device) -> int:
    """Largest token count, of BUCKETS, up to which a kernel always beats its reference; side: columns, outputs, rows.

    inner: width of the kernel's first argument. 0 without a GPU, and, with a warning, where the kernel does not run or
    its result is not the reference's.
    """
    return _measured(side, inner, shape, dtype, device) if device.type == "cuda" else 0


def operands(side: str, inner: int, shape: tuple, dtype: torch.dtype, device: torch.device) -> tuple:
    """What the kernel takes after x, with random weights."""

    def weights(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=dtype, device=device) / inner**0.5

    if side == "columns":
        (ranks,) = shape
        permutation = torch.arange(inner, device=device).roll(inner // 3).expand(len(ranks), -1).contiguous()
        return weights(sum(r * (inner - r) for r in ranks)), permutation, ranks
    if side == "outputs":
        ranks, starts, sizes = shape
        return weights(sum(m * r for m, r in zip(sizes, ranks, strict=True))), ranks, starts, sizes
    (height,) = shape
    return weights(height - inner, inner), torch.arange(height, device=device).roll(height // 3)


@cache
def _measured(side: str, inner: int, shape: tuple, dtype: torch.dtype, device: torch.device) -> int:
    from fermisvd_vllm import kernels

    kernel, reference = getattr(kernels, f"{side}_kernel"), getattr(kernels, f"{side}_reference")
    more = operands(side, inner, shape, dtype, device)
    best = 0
    try:
        for tokens in BUCKETS:
            x = torch.randn(tokens, inner, dtype=dtype, device=device)
            expected = reference(x, *more)
            error = (kernel(x, *more) - expected).abs().max() / expected.abs().max()
            if not error <= TOLERANCE:
                raise RuntimeError(f"its result is off by {error:.1e} of the largest value")
            if seconds(lambda x=x: kernel(x, *more)) >= seconds(lambda x=x: reference(x, *more)):
                break
            best = tokens
    except Exception as error:
        logger.warning("the fused kernel for %s %s is not used: %s: %s", side, shape, type(error).__name__, error)
        return 0
    return best


def seconds(call: Callable[[], torch.Tensor]) -> float:
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
