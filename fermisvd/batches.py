"""Calibration windows in batches, for what is trained on them."""

from collections.abc import Iterator

import torch


def step_windows(tokens: int, length: int, batch_size: int, processes: int = 1) -> int:
    """Windows of `length` tokens in a step of so many tokens: one at least for each process, a batch at most."""
    return min(batch_size, max(processes, tokens // length))


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Numbers of the windows of each batch, without end; each pass over all `count` of them is in another order, the
    same for a seed.

    What is left over by whole batches comes first in a pass.
    """
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from reversed(torch.randperm(count, generator=order).split(batch_size))
