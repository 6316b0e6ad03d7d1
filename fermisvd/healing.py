"""Healing: the factors of a compressed model trained on for a while, towards the dense model's predictions.

Ranks, skeleton and permutation stay what they are; PivGa's tensors are trained as they are stored, so the structure is
exact at every step. What is trained is float32 and is rounded once, at the end: in bfloat16 a step of usual size would
be lost in rounding. The model's passes may be narrower, with rounded copies.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fermisvd.batches import shuffled_batches, step_windows
from fermisvd.errors import NumericalError
from fermisvd.factor_adam import stepping_backward
from fermisvd.format import INTERPOLATION, SKELETON, factor_of
from fermisvd.groups import StructureError, decoder_blocks
from fermisvd.losses import StudentLoss, kl_of_states
from fermisvd.modules import CompressedLinear, PivGaColumnsLinear, PivGaRowsLinear
from fermisvd.pivga import refuse_overflow, round_interpolation
from fermisvd.running.blocks import KEPT_ACTIVATIONS, checkpointed
from fermisvd.running.distributed import local, own_passes, process_count, sum_over_processes, whole
from fermisvd.settings import Count, Natural, Settings, option
from fermisvd.straight_through import RATE, grid_tensors, open_grids
from fermisvd.teacher import Taught

BATCH_TOKENS = 2048  # that the learning rate was measured with


class HealingSettings(Settings):
    """Options of the distillation.

    Adam's learning rate is relative to the root mean square of each factor over the root of its longer side, so that a
    step changes its largest singular value by the same part at any width; to the root of the loss at the start (at most
    1): a loss grows as the square of the error, so what there is to mend is as large as its root; and to one over the
    number of decoder blocks, whose steps add up in the hidden state. With batches of fewer than BATCH_TOKENS, whose
    gradients are noisier, it is smaller by the root of the part. It rises over the first twentieth of the steps and
    falls to zero as a cosine.

    Many steps of few tokens gain more than few of many, of the same number of tokens (docs/decisions.md).
    """

    steps: Annotated[Natural, option("Steps of distillation on the calibration text at the end; 0 for none.")] = 512
    step_tokens: Annotated[Count, option("Tokens of a step: one window a process at least, a batch at most.")] = 512
    learning_rate: Annotated[float, option("Relative to each factor's size and width, and to depth.", ge=0)] = 0.5

    def step_windows(self, batch_size: int, length: int, processes: int = 1) -> int:
        """Windows of a step; each of several processes takes one at least."""
        return step_windows(self.step_tokens, length, batch_size, processes)


def trained_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The compressed layers' factors by tensor name, but those on grids: see `opened_factors`."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, layer in model.named_modules()
        if isinstance(layer, CompressedLinear)
        for name, parameter in layer.named_parameters(recurse=False)
        if name != "bias" and factor_of(name) not in layer.schemes
    }


@dataclass(frozen=True)
class HealingState:
    """What a healing goes on from: the records of the steps that are done, and of each factor, by its name, the tensors
    of FactorAdam.state."""

    records: list[dict]
    factors: Mapping[str, Mapping[str, torch.Tensor]]


def heal(
    student: PreTrainedModel,
    taught: Taught,
    aside: Taught,
    settings: HealingSettings,
    *,
    batch_size: int,
    seed: int,
    on_step: Callable[[dict], None] = lambda _: None,
    begun: HealingState | None = None,
    on_progress: Callable[[HealingState], None] = lambda _: None,
    at_once: int | None = None,
    kept_bytes: int = KEPT_ACTIVATIONS,
    factors: Mapping[str, nn.Parameter] | None = None,
) -> dict:
    """Train the student's factors in place, by KL(teacher || student) on windows.

    student: compressed, its factors in float32 or narrower; they are float32 afterwards. factors: matrices to train
    instead, by tensor name; with them any student will do, such as a pruned one. taught: windows to train on, of which
    a step takes batch_size at most; aside: others, not trained on. Where the loss on these is no lower at the end, the
    factors are put back. at_once: windows of a pass, whose gradients are added up to the step's. Of several processes
    each takes its part of every step, and the student may be divided among them (FSDP2). begun: where a healing of the
    same student was interrupted, as on_progress saw it after a step (live tensors, which the next step changes); the
    result is that of an undisturbed one. A factor takes 12 bytes a number beside the model's passes, a bfloat16 one 10.
    Returns {"kl_before", "kl_after" (both on `aside`), "trace": each step's step and kl}.
    Raises StructureError if the student has no compressed layer, NumericalError if the loss is not finite.
    """
    factors = trained_factors(student) if factors is None else factors
    if not factors:
        raise StructureError("the model has no compressed layer to heal")
    student.requires_grad_(False)
    length = taught.windows.shape[1]
    windows = settings.step_windows(batch_size, length, process_count())
    at_once = min(at_once or windows, -(-windows // process_count()))
    scale = process_count() if any(isinstance(each, DTensor) for each in factors.values()) else 1  # FSDP2's mean
    loss = StudentLoss(student, aside, at_once)
    before = loss()
    if not math.isfinite(before):
        raise NumericalError(f"KL is {before} before healing; check the checkpoint and its dense model")
    device, halves = next(student.parameters()).device, loss.halves
    start = {name: local(parameter.detach()).to("cpu", copy=True) for name, parameter in factors.items()}
    height = settings.learning_rate * _height(student, before, min(windows, len(taught)) * length)
    rates = {name: height * _size(each) * getattr(each, RATE, 1.0) for name, each in factors.items()}
    batches = shuffled_batches(len(taught), windows, seed)
    records: list[dict] = []
    with (
        stepping_backward(factors) as adams,
        checkpointed(student, activations(student), at_once * length, kept_bytes),
    ):
        if begun is not None:
            records = list(begun.records)
            for name, factor in adams.items():
                factor.restore(begun.factors[name], len(records))
            for _ in records:
                next(batches)
        for step in range(len(records), settings.steps):
            passes, total = own_passes(next(batches), at_once), torch.zeros((), dtype=torch.float64)
            for number, (mine, weight) in enumerate(passes, 1):
                for name, factor in adams.items():
                    factor.rate = rates[name] * _schedule(step, settings.steps)
                    factor.steps_now = number == len(passes)
                batch, states = taught.batch(mine, device)
                share = kl_of_states(halves.head, states, halves.body(batch)) * weight
                (share * scale).backward()
                total += share.detach().double().cpu()
            kl = sum_over_processes(total).item()
            if not math.isfinite(kl):
                raise NumericalError(f"KL is {kl} at healing step {step}; try a smaller learning rate, or no healing")
            records.append({"step": step, "kl": kl})
            on_step(records[-1])
            on_progress(HealingState(list(records), {name: factor.state() for name, factor in adams.items()}))
    after = loss()
    better = after < before  # not where the last step made it NaN
    for name, parameter in factors.items():
        value = adams[name].master if better else start[name].to(parameter.device, torch.float32)
        _put(student, name, value, parameter)
    return {"kl_before": before, "kl_after": after if better else before, "trace": records}


def _put(student: nn.Module, name: str, value: torch.Tensor, parameter: nn.Parameter) -> None:
    """A float32 value, or this process' part of it, in the place of a factor."""
    if isinstance(parameter, DTensor):
        value = DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    owner, _, leaf = name.rpartition(".")
    setattr(student.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def activations(student: nn.Module) -> int:
    """What the linear layers, compressed or not, read and give for a token."""
    layers = [m for m in student.modules() if isinstance(m, nn.Linear)]
    return sum(layer.in_features + layer.out_features for layer in layers)


def _height(student: nn.Module, loss: float, batch_tokens: int) -> float:
    """What all factors' learning rates have in common."""
    blocks = sum(1 for _ in student.get_submodule(decoder_blocks(student)).children())
    return min(1.0, math.sqrt(loss)) * min(1.0, math.sqrt(batch_tokens / BATCH_TOKENS)) / blocks


def _size(parameter: nn.Parameter) -> float:
    """Root mean square of a factor over the root of its longer side."""
    squares = whole(parameter.detach().float().square().sum())
    return math.sqrt(squares.item() / parameter.numel() / max(parameter.shape))


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def opened_factors(student: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """What is trained of a student: its factors, and of those on grids the parameters that now stand in their place.
    dtype: of scales in the checkpoint."""
    return open_grids(student, dtype) | trained_factors(student)


def stored_factors(student: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a student that was trained, as a checkpoint has them. dtype: of factors and scales."""
    return rounded_factors(student, dtype) | grid_tensors(student)


def rounded_factors(student: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The factors in their storage type. PivGa's interpolation matrix is solved again against the rounded skeleton, as
    when it was made (fermisvd.pivga)."""
    exact = trained_factors(student)
    rounded = {name: whole(parameter.detach()).to(dtype) for name, parameter in exact.items()}
    for tensor in rounded.values():
        refuse_overflow(tensor, dtype)
    layers = {n: m for n, m in student.named_modules() if isinstance(m, (PivGaColumnsLinear, PivGaRowsLinear))}
    for name, layer in layers.items():
        if layer.first is not layer or f"{name}.{INTERPOLATION}" not in exact:  # on a grid
            continue
        skeletons = [whole(member.factor(SKELETON).detach()) for member in layers.values() if member.first is layer]
        skeleton, d = torch.cat(skeletons), whole(layer.factor(INTERPOLATION).detach())
        if isinstance(layer, PivGaRowsLinear):
            skeleton, d = skeleton.T, d.T
        solved = round_interpolation(skeleton.to(dtype), skeleton.double() @ d.double(), dtype)
        rounded[f"{name}.{INTERPOLATION}"] = (solved.T if isinstance(layer, PivGaRowsLinear) else solved).contiguous()
    return rounded
