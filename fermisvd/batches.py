"""Calibration windows in batches, for what is trained on them."""

from collections.abc import Iterator

import torch


def shuffled_batches(windows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of windows (samples, length) without end, each pass over them in another order; the same for a seed.

    What is left over by whole batches comes first in a pass.
    """
    order = torch.Generator().manual_seed(seed)
    while True:
        for batch in reversed(torch.randperm(len(windows), generator=order).split(batch_size)):
            yield windows[batch]
