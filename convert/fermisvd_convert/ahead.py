"""Work on the next pieces while one is written, so that GPU, LAPACK on the CPU and disks are at work at once."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from fermisvd.budget import RankedGroup

T = TypeVar("T")
R = TypeVar("R")
GPU_WORKERS = 8  # at most: cores that find pivots beside a GPU; reckoned, no GPU was at hand (docs/decisions.md)
GAUGE_BYTES = 28  # that PivGa takes for each number of W: 24 measured (docs/results.md), and the factors


def workers_beside(device: str, room: int, ranked: Sequence[RankedGroup]) -> int:
    """How many groups to work on at once: one on a CPU, whose cores torch and LAPACK share out themselves; beside a GPU
    as many of the largest as half of its room (bytes) holds."""
    if not device.startswith("cuda"):
        return 1
    largest = max((GAUGE_BYTES * each.group.dense_parameters for each in ranked), default=1)
    return max(1, min(GPU_WORKERS, room // 2 // largest))


def in_order(work: Callable[[T], R], items: Iterable[T], device: str, workers: int) -> Generator[R]:
    """work(item) of every item, in order. One worker works when it is asked; several work ahead, each a thread with a
    stream of its own on a GPU, and at most `workers` results wait beside the one that is taken.

    What `work` raises is raised where its result would be taken; then, and where the caller closes this, nothing
    further is begun and what has begun is waited for.
    """
    if workers == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, initializer=_own_stream, initargs=(device,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _own_stream(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_stream(torch.cuda.Stream(device))
