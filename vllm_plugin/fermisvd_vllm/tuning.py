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
TOLERANCE = 2**-6  # of the largest value: a wrong kernel is off by far more, another order of summing by far less


def most_tokens(side: str, rank: int, rest: int, dtype: torch.dtype, device: torch.device) -> int:
    """Largest token count, of BUCKETS, up to which the kernel of a `columns` or `rows` layer is always the faster.

    rank: r; rest: rows or columns that are no skeleton, n - r or m - r; dtype, device: of D.
    0 without a GPU, and, with a warning, where the kernel does not run or its result is not the plain operations'.
    """
    return _measured(side, rank, rest, dtype, device) if device.type == "cuda" and rank and rest else 0


@cache
def _measured(side: str, rank: int, rest: int, dtype: torch.dtype, device: torch.device) -> int:
    from fermisvd_vllm import kernels

    kernel, reference = getattr(kernels, f"{side}_kernel"), getattr(kernels, f"{side}_reference")
    shape = (rank, rest) if side == "columns" else (rest, rank)
    d = torch.randn(shape, dtype=dtype, device=device) / rank
    permutation = torch.arange(rank + rest, device=device).roll(rest // 2)
    best = 0
    try:
        for tokens in BUCKETS:
            x = torch.randn(tokens, rank + rest if side == "columns" else rank, dtype=dtype, device=device)
            expected = reference(x, d, permutation)
            error = (kernel(x, d, permutation) - expected).abs().max() / expected.abs().max()
            if not error <= TOLERANCE:
                raise RuntimeError(f"its result is off by {error:.1e} of the largest value")
            if seconds(lambda x=x: kernel(x, d, permutation)) >= seconds(lambda x=x: reference(x, d, permutation)):
                break
            best = tokens
    except Exception as error:
        logger.warning("the fused kernel for rank %d is not used: %s: %s", rank, type(error).__name__, error)
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
