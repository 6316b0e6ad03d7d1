"""Healing: the factors of a compressed model trained on for a while, towards the dense model's predictions.

Ranks, skeleton and permutation stay what they are; PivGa's tensors are trained as they are stored, so the structure is
exact at every step. Training is in float32 and the result is rounded once, at the end: in bfloat16 a step of usual size
would be lost in rounding.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from torch import nn
from transformers import PreTrainedModel

from fermisvd.batches import shuffled_batches
from fermisvd.errors import NumericalError
from fermisvd.format import INTERPOLATION
from fermisvd.groups import StructureError
from fermisvd.losses import StudentLoss, kl_of_states
from fermisvd.modules import CompressedLinear, PivGaColumnsLinear, PivGaRowsLinear
from fermisvd.pivga import refuse_overflow, round_interpolation
from fermisvd.settings import Natural, Settings, option
from fermisvd.teacher import Taught

BETAS = (0.9, 0.95)


class HealingSettings(Settings):
    """Options of the distillation.

    Adam's learning rate is relative to the root mean square of each factor over the root of its longer side, so that a
    step changes its largest singular value by the same part at any width, and to the root of the loss at the start (at
    most 1): a loss grows as the square of the error, so what there is to mend is as large as its root. It rises over
    the first twentieth of the steps and falls to zero as a cosine.
    """

    steps: Annotated[Natural, option("Steps of distillation on the calibration windows at the end; 0 for none.")] = 128
    learning_rate: Annotated[float, option("Relative to each factor's size and width.", ge=0)] = 0.1


def trained_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The compressed layers' factors by tensor name: all they hold but biases and permutations."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, layer in model.named_modules()
        if isinstance(layer, CompressedLinear)
        for name, parameter in layer.named_parameters(recurse=False)
        if name != "bias"
    }


def heal(
    student: PreTrainedModel,
    taught: Taught,
    aside: Taught,
    settings: HealingSettings,
    *,
    batch_size: int,
    seed: int,
    on_step: Callable[[dict], None] = lambda _: None,
) -> dict:
    """Train the student's factors in place, by KL(teacher || student) on windows.

    student: compressed, float32; taught: windows to train on; aside: others, not trained on. Where the loss on these is
    no lower at the end, the factors are put back. Returns {"kl_before", "kl_after" (both on `aside`), "trace": each
    step's step and kl}. Raises StructureError if the student has no compressed layer, NumericalError if the loss is not
    finite.
    """
    factors = trained_factors(student)
    if not factors:
        raise StructureError("the model has no compressed layer to heal")
    student.requires_grad_(False)
    loss = StudentLoss(student, aside, batch_size)
    before, start = loss(), {name: parameter.detach().clone() for name, parameter in factors.items()}
    if not math.isfinite(before):
        raise NumericalError(f"KL is {before} before healing; check the checkpoint and its dense model")
    optimizer = torch.optim.Adam(_scaled(factors, settings.learning_rate * min(1.0, math.sqrt(before))), betas=BETAS)
    device, halves = next(student.parameters()).device, loss.halves
    batches = shuffled_batches(len(taught), batch_size, seed)
    records: list[dict] = []
    for step in range(settings.steps):
        batch, states = taught.batch(next(batches), device)
        kl = kl_of_states(halves.head, states, halves.body(batch))
        if not kl.isfinite():
            raise NumericalError(
                f"KL is {kl.item()} at healing step {step}; try a smaller learning rate, or no healing"
            )
        optimizer.zero_grad()
        kl.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * _schedule(step, settings.steps)
        optimizer.step()
        records.append({"step": step, "kl": kl.item()})
        on_step(records[-1])
    student.requires_grad_(False)
    after = loss()
    if not after < before:  # also where the last step made it NaN
        for name, parameter in factors.items():
            parameter.copy_(start[name])
        after = before
    return {"kl_before": before, "kl_after": after, "trace": records}


def _scaled(factors: Mapping[str, nn.Parameter], rate: float) -> list[dict]:
    """Adam's parameter groups, one a factor, with its learning rate at full height as `scale`."""
    groups = []
    for parameter in factors.values():
        parameter.requires_grad_()
        size = parameter.detach().square().mean().sqrt().item() / math.sqrt(max(parameter.shape))
        groups.append({"params": [parameter], "scale": rate * size})
    return groups


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def rounded_factors(student: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The factors in their storage type. PivGa's interpolation matrix is solved again against the rounded skeleton, as
    when it was made (fermisvd.pivga)."""
    rounded = {name: parameter.detach().to(dtype) for name, parameter in trained_factors(student).items()}
    for tensor in rounded.values():
        refuse_overflow(tensor, dtype)
    layers = {n: m for n, m in student.named_modules() if isinstance(m, (PivGaColumnsLinear, PivGaRowsLinear))}
    for name, layer in layers.items():
        if layer.first is not layer:
            continue
        skeletons = [member.skeleton.detach() for member in layers.values() if member.first is layer]
        skeleton, d = torch.cat(skeletons), layer.interpolation.detach()
        if isinstance(layer, PivGaRowsLinear):
            skeleton, d = skeleton.T, d.T
        solved = round_interpolation(skeleton.to(dtype), skeleton.double() @ d.double(), dtype)
        rounded[f"{name}.{INTERPOLATION}"] = (solved.T if isinstance(layer, PivGaRowsLinear) else solved).contiguous()
    return rounded
