"""How far a student is from its teacher: KL(teacher || student), and a student made of replaced weights."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from fermisvd.groups import LinearGroup
from fermisvd.linear import linear_layer, weight_of
from fermisvd.running.distributed import own_passes, put_part, sum_over_processes
from fermisvd.running.halves import Split, compared_tokens, few_tokens, halves_of
from fermisvd.teacher import Taught

M = TypeVar("M", bound=nn.Module)
Head = Callable[[torch.Tensor], torch.Tensor]  # states -> logits, see running/halves.py
Pair = tuple[torch.Tensor, torch.Tensor]  # A (m x r) and B (r x n) of a group


class _KLOfStates(torch.autograd.Function):
    """Value and gradient, a few tokens at a time through the head: no logits of a whole batch are held."""

    @staticmethod
    def forward(ctx, student, teacher, head, tokens):
        total, count = 0.0, student.shape[:2].numel()
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        parts = few_tokens(student, tokens), few_tokens(teacher, tokens)
        gradients = None if gradient is None else few_tokens(gradient, tokens)
        for states, taught in zip(*parts, strict=True):
            log_p = head(taught.to(states.dtype)).float().log_softmax(-1)
            states = states.detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                logits = head(states)
            log_q = logits.detach().float().log_softmax(-1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if gradients is not None:
                error = log_q.exp_().sub_(p).div_(count)
                next(gradients).copy_(torch.autograd.grad(logits, states, error.to(logits.dtype))[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale, None, None, None


def kl_of_states(head: Head, teacher: torch.Tensor, student: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student), nats, float32, of states (windows, length, width) whose logits the
    head makes, so many tokens at a time, or as many as suit the device. Differentiable once, in the student's states.
    """
    return _KLOfStates.apply(student, teacher, head, tokens or compared_tokens(student.device))


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The same of logits (windows, length, vocabulary)."""
    return kl_of_states(lambda logits: logits, teacher, student)


class StudentLoss:
    """KL(teacher || student) of a student as it stands, on fixed windows; of several processes each takes its part."""

    def __init__(self, student: nn.Module, taught: Taught, batch_size: int):
        self.halves, self.taught, self.batch_size = halves_of(student), taught, batch_size
        self.device = next(student.parameters()).device

    def __call__(self) -> float:
        return self.from_a_block()()

    def from_a_block(self, windows: int | None = None) -> "LossFromABlock":
        """On the first so many windows, or all, for trials in one block after the other."""
        return LossFromABlock(self, len(self.taught) if windows is None else windows)


class LossFromABlock:
    """The same of a student that changes in one block after the other: blocks before that one are not run again, but
    those of a model that cannot be resumed at a block."""

    def __init__(self, loss: StudentLoss, windows: int):
        self.loss, self.passes = loss, own_passes(torch.arange(windows), loss.batch_size)
        self.first, self.before = 0, self._nothing()  # states before block `first`

    def _nothing(self) -> list[torch.Tensor | None]:
        return [None] * len(self.passes)

    @torch.no_grad()
    def begin_at(self, layer: str) -> None:
        """From now on only the block of this layer changes, and those behind it; all before it are as they stand."""
        halves = self.loss.halves
        if not isinstance(halves, Split) or not halves.resumes:
            return
        block = halves.number_of(layer)
        if block < self.first:
            self.first, self.before = 0, self._nothing()
        if block > self.first:
            for i, (mine, _) in enumerate(self.passes):
                batch = self.loss.taught.windows[mine].to(self.loss.device)
                self.before[i] = halves.through(batch, range(self.first, block), self.before[i])
            self.first = block

    @torch.no_grad()
    def __call__(self) -> float:
        total, halves = torch.zeros((), dtype=torch.float64), self.loss.halves
        for (mine, weight), before in zip(self.passes, self.before, strict=True):
            batch, taught = self.loss.taught.batch(mine, self.loss.device)
            if isinstance(halves, Split) and self.first:
                states = halves.through(batch, range(self.first, len(halves.blocks)), before)
            else:
                states = halves.body(batch)
            total += kl_of_states(halves.head, taught, states).double().cpu() * weight
        return sum_over_processes(total).item()


def set_weight(model: nn.Module, group: LinearGroup, weight: torch.Tensor) -> None:
    """Copy the stacked weight (m x n) into the group's dense layers, which may be divided (FSDP2)."""
    with torch.no_grad():
        for name, rows in zip(group.members, weight.split(list(group.member_rows)), strict=True):
            put_part(weight_of(linear_layer(model, name)), rows)


def set_products(model: M, factors: Iterable[tuple[LinearGroup, Pair]]) -> M:
    """The model, each group's dense weight replaced by A B: a student that needs no compressed layers."""
    for group, (a, b) in factors:
        set_weight(model, group, a @ b)
    return model
