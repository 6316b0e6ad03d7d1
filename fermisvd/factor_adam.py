"""Adam for one factor: it steps as soon as the factor's gradient is there and frees it, so that there is never more
than one; the state is small, and can be kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from fermisvd.running.distributed import local, sum_over_processes

BETAS = (0.9, 0.95)  # forget fast enough for moments of bfloat16 (measured, docs/decisions.md)


class FactorAdam:
    """Adam's state of a factor, or of a process' part of it, and its step, which is torch's.

    master: the factor's value in float32, of which a narrower parameter is the rounded working copy; a float32
    parameter is its own master. The moments have the parameter's type. rate: the next step's learning rate; steps_now:
    whether a backward pass ends in a step, or leaves its gradient for the next to add to.
    """

    def __init__(self, parameter: torch.Tensor):
        self.parameter, self.rate, self.steps, self.steps_now = parameter, 0.0, 0, True
        self.own = local(parameter.detach())
        self.master = self.own.float()
        self.first, self.second = torch.zeros_like(self.own), torch.zeros_like(self.own)

    def step(self, _: torch.Tensor) -> None:
        """By the parameter's gradient, which is freed; nothing while it waits for further passes'."""
        if not self.steps_now:
            return
        assert self.parameter.grad is not None
        gradient = local(self.parameter.grad)
        if not isinstance(self.parameter, DTensor):  # FSDP2 has added it up, and divided by the number of processes
            sum_over_processes(gradient)
        adam(
            [self.master],
            [gradient],
            [self.first],
            [self.second],
            [],
            [torch.tensor(float(self.steps))],
            foreach=False,  # which asks for one type of all
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        self.steps += 1
        self.parameter.grad = None
        self._copy_master()

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes to go on from here; not copied."""
        return {"master": self.master, "first": self.first, "second": self.second}

    def restore(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """steps: done until then."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.steps = steps
        self._copy_master()

    def _copy_master(self) -> None:
        if self.own.dtype != self.master.dtype:
            self.own.copy_(self.master)


@contextmanager
def stepping_backward(factors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, FactorAdam]]:
    """An Adam for each factor, by its name, which steps in every backward pass of the block."""
    adams = {name: FactorAdam(parameter.requires_grad_()) for name, parameter in factors.items()}
    hooks = [each.parameter.register_post_accumulate_grad_hook(each.step) for each in adams.values()]
    try:
        yield adams
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in factors.values():
            parameter.requires_grad_(False)
