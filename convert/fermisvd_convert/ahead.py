"""Work on the next pieces while one is kept or written: GPU, LAPACK on the CPU and disks are at work at once."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
GPU_WORKERS = 8  # at most: cores that find pivots beside a GPU; reckoned (docs/decisions.md)


def workers_beside(device: str, room: int, each: int) -> int:
    """How many pieces to work on at once: one on a CPU, whose cores torch and LAPACK share out themselves; beside a GPU
    as many as half of its room holds. room, each: bytes of the device, and that a piece takes."""
    if not device.startswith("cuda"):
        return 1
    return max(1, min(GPU_WORKERS, room // 2 // max(1, each)))


def in_order(work: Callable[[T], R], items: Iterable[T], device: str, workers: int) -> Generator[R]:
    """work(item) of every item, in order. One worker works when it is asked; several work ahead, each a thread with a
    stream of its own on a GPU, and at most `workers` results wait beside the one that is taken.

    What `work` raises is raised where its result would be taken; then, and where the caller closes this, nothing
    further is begun and what has begun is waited for.
    """
    if workers == 1:
        yield from map(work, items)
        return
    if device.startswith("cuda"):  # torch loads its linear algebra once, and not in several threads together
        torch.linalg.inv(torch.eye(1, device=device))
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
