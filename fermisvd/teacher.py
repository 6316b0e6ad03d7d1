"""What the dense model, the teacher, makes of token windows: asked once, and kept for all that compares a student.

Kept are its states behind the last decoder block. The head is left as it is by compression, so that the student's own
makes the teacher's logits of them: no step holds a second model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fermisvd.running.halves import halves_of


@dataclass(frozen=True)
class Taught:
    """windows: token ids (samples, length); states: of each window, (length, width), wherever they lie."""

    windows: torch.Tensor
    states: Sequence[torch.Tensor]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, part: slice) -> "Taught":
        return Taught(self.windows[part], self.states[part])

    def batch(self, numbers: Sequence[int] | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (windows, length) and states (windows, length, width) of the windows of these numbers."""
        states = torch.stack([self.states[int(number)] for number in numbers])
        return self.windows[numbers].to(device), states.to(device)


@torch.no_grad()
def teach(
    teacher: nn.Module, windows: torch.Tensor, batch_size: int, on_batch: Callable[[], object] = lambda: None
) -> Taught:
    """What a model that is in memory makes of windows (samples, length); on_batch: called after each batch."""
    halves, device, states = halves_of(teacher), next(teacher.parameters()).device, []
    for batch in windows.split(batch_size):
        states += halves.body(batch.to(device)).cpu().unbind()
        on_batch()
    return Taught(windows, states)
