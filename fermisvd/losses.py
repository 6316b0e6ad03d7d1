"""How far a student is from its teacher: KL(teacher || student), and a student made of replaced weights."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from fermisvd.groups import LinearGroup
from fermisvd.linear import linear_layer, weight_of

M = TypeVar("M", bound=nn.Module)
Pair = tuple[torch.Tensor, torch.Tensor]  # A (m x r) and B (r x n) of a group

KL_SLICE = 1024  # tokens
KEPT_LOGITS = 2**30  # bytes


class _KLDivergence(torch.autograd.Function):
    """Value and gradient, a slice of the tokens at a time: no probabilities of the whole batch are held."""

    @staticmethod
    def forward(ctx, teacher, student):
        total, gradient = 0.0, torch.empty_like(student) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(student), KL_SLICE):
            part = slice(begin, begin + KL_SLICE)
            log_p, log_q = teacher[part].float().log_softmax(-1), student[part].float().log_softmax(-1)
            total += functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
            if gradient is not None:
                gradient[part] = (log_q.exp_() - log_p.exp_()) / len(student)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(ctx, scale):
        return None, ctx.saved_tensors[0] * scale


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student), nats; logits (batch, length, vocabulary). Differentiable once, in
    the student's."""
    return _KLDivergence.apply(teacher.flatten(0, -2), student.flatten(0, -2))


class StudentLoss:
    """KL(teacher || student) on fixed windows, (samples, length). The teacher's logits are kept if they are small."""

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, windows: torch.Tensor, batch_size: int):
        device = next(teacher.parameters()).device
        self.teacher, self.batches = teacher, windows.to(device).split(batch_size)
        first = self._teach(self.batches[0])
        fits = first.nbytes * len(self.batches) <= KEPT_LOGITS
        self.expected = [self._teach(batch) for batch in self.batches] if fits else None

    def _teach(self, batch: torch.Tensor) -> torch.Tensor:
        return self.teacher(input_ids=batch, use_cache=False).logits

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> float:
        total = 0.0
        for i, batch in enumerate(self.batches):
            expected = self.expected[i] if self.expected else self._teach(batch)
            total += kl_divergence(expected, student(input_ids=batch, use_cache=False).logits).item() * len(batch)
        return total / sum(len(batch) for batch in self.batches)


def set_weight(model: nn.Module, group: LinearGroup, weight: torch.Tensor) -> None:
    """Copy the stacked weight (m x n) into the group's dense layers."""
    with torch.no_grad():
        for name, rows in zip(group.members, weight.split(list(group.member_rows)), strict=True):
            weight_of(linear_layer(model, name)).copy_(rows)


def set_products(model: M, factors: Iterable[tuple[LinearGroup, Pair]]) -> M:
    """The model, each group's dense weight replaced by A B: a student that needs no compressed layers."""
    for group, (a, b) in factors:
        set_weight(model, group, a @ b)
    return model
