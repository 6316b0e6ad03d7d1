"""The whole method in memory, top to bottom: a model and token windows in, the compressed model out.

`fermisvd convert` is the same steps, of the same functions, for models that do not fit several times into memory: a
decoder block at a time, each step's result kept in files and found again.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from fermisvd.budget import (
    Form,
    auto_alignment,
    check_budget,
    kept_parameters,
    round_to_budget,
    stays_dense,
    uniform_rank,
)
from fermisvd.calibration import Grams, OutputGrams, calibration_grams
from fermisvd.decomposition import Factors, group_factors
from fermisvd.errors import FermiSVDError
from fermisvd.fermigrad import FermiGradSettings, install_gates, optimise_ranks
from fermisvd.format import FermiSVDConfig
from fermisvd.groups import LinearGroup, check_unshared, find_groups, stacked_weight
from fermisvd.healing import HealingSettings, heal, rounded_factors, trained_factors
from fermisvd.hf import mark_compressed
from fermisvd.jump import settle_jump
from fermisvd.linear import linear_layer
from fermisvd.losses import set_weight
from fermisvd.modules import replace_group
from fermisvd.partition import join_groups
from fermisvd.refit import refit
from fermisvd.storage import compressed_tensors, config_group

ASIDE_WINDOWS = 32  # windows that decide between measured alternatives, never trained on
Whitening = Literal["input", "kfac"]
GroupsRule = Literal["auto", "joint", "separate"]
Pair = tuple[torch.Tensor, torch.Tensor]  # A (m x r) and B (r x n) of a group


class CompressError(FermiSVDError):
    """The model or the windows are not what can be compressed."""


def compress(
    model: nn.Module,
    windows: torch.Tensor,
    remove: float = 0.2,
    form: Form = "pivga",
    *,
    whitening: Whitening = "kfac",
    groups: GroupsRule = "auto",
    ranks: FermiGradSettings | None = FermiGradSettings(),
    healing: HealingSettings | None = HealingSettings(),
    align: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> nn.Module:
    """A compressed copy of `model`, in its types, that save_pretrained writes, from_pretrained loads and vLLM serves.

    model: a dense causal language model of transformers, which stays as it is; windows: token ids (samples, length) to
    calibrate and train on; remove: fraction of the parameters of the decoder blocks' linear layers; ranks: settings of
    FermiGrad, None for uniform ranks; healing: settings of the closing distillation, None for a sequential refit
    instead; align: step of the ranks, None for a power of two near k/64; seed: of calibration, ranks and healing.
    Models, factors and Gram matrices are held at once, in float32 and float64. Raises FermiSVDError for a model or
    windows that cannot be used.
    """
    check_windows(windows)
    if getattr(model.config, "quantization_config", None) is not None:
        raise CompressError("the model is quantised or compressed already; give the dense one")
    check_unshared(model)
    aside, training = set_aside(windows)
    teacher = in_float32(model)

    found = find_groups(teacher, "joint" if groups == "joint" else "separate")
    budget, minimum = kept_parameters(found, remove), ranks.minimum_rank if ranks else 1
    check_budget(found, budget, form, align, minimum)
    decomposition = calibrated(model, teacher, found, windows, whitening, batch_size, seed)

    ideal = [uniform_rank(group, remove, form) for group in found]
    if ranks is not None:
        settings = replace(ranks, seed=seed)
        ideal = fermigrad_ranks(teacher, found, decomposition, windows, aside, remove, form, settings, align)
    chosen = round_to_budget(found, ideal, budget, form, align, minimum)

    def compressed() -> dict[LinearGroup, int]:
        return {g: r for g, r in zip(found, chosen, strict=True) if not stays_dense(g, r, form)}

    def truncated() -> dict[LinearGroup, Pair]:
        return {group: decomposition.factors(group).truncated(rank) for group, rank in compressed().items()}

    if groups == "auto":
        student, align_of = low_rank(teacher, truncated()), lambda group: align or auto_alignment(group)
        joined = join_groups(teacher, student, found, chosen, form, aside, decomposition.factors, align_of, batch_size)
        found, chosen = [group for group, _ in joined], [rank for _, rank in joined]
        chosen = round_to_budget(found, chosen, budget, form, align, minimum)  # a step may be left unspent

    ranked, factors = compressed(), truncated()
    if healing is None and len(training):
        student, members, kept = low_rank(teacher, factors), list(ranked), list(ranked.values())
        better = refit(teacher, student, members, kept, training, aside, decomposition.fit, batch_size=batch_size)
        factors |= {group: better[group.name] for group in ranked if group.name in better}
    student = with_modules(model, ranked, factors, form)
    if healing is not None and ranked and len(training):
        healed(teacher, student, training, aside, replace(healing, seed=seed))
    entries = tuple(config_group(group, rank, form) for group, rank in ranked.items())
    mark_compressed(student, FermiSVDConfig(groups=entries, provenance={"settings": {"remove": remove, "form": form}}))
    return student


def check_windows(windows: torch.Tensor) -> None:
    """Raises CompressError unless these are two windows of token ids or more."""
    if windows.dim() != 2 or len(windows) < 2 or windows.is_floating_point():
        raise CompressError(f"windows are token ids, (samples, length), two or more: given {tuple(windows.shape)}")


def set_aside(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows that decide between alternatives, an eighth of all and at most ASIDE_WINDOWS; and the others."""
    held = min(ASIDE_WINDOWS, -(-len(windows) // 8))
    return windows[:held], windows[held:]


def in_float32(model: nn.Module) -> nn.Module:
    """A copy for measuring, in evaluation mode."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


@dataclass
class Decomposition:
    """The groups' factors, each made once: those found, and those that they are joined to.

    weights: the model whose weights are decomposed, in their own type; grams: C of each source; outputs: G of each
    member, none with `input` whitening.
    """

    weights: nn.Module
    grams: Grams
    outputs: OutputGrams
    made: dict[tuple[str, ...], Factors] = field(default_factory=dict)

    def factors(self, group: LinearGroup) -> Factors:
        """A (m x k), B (k x n), float32, and sigma (k,)."""
        if group.members not in self.made:
            exact = self.fit(group, None, self.grams[group.source])
            self.made[group.members] = Factors(exact.a.float(), exact.b.float(), exact.sigma)
        return self.made[group.members]

    def fit(self, group: LinearGroup, change: torch.Tensor | None, gram: torch.Tensor) -> Factors:
        """Factors of W, or of W M where `change` is M (n x n), for inputs with this Gram matrix (n x n)."""
        weights = stacked_weight(self.weights, group).split(list(group.member_rows))
        outputs = [self.outputs[name] for name in group.members] if self.outputs else None
        return group_factors(weights, gram, outputs, change)


def calibrated(
    model: nn.Module,
    teacher: nn.Module,
    groups: Sequence[LinearGroup],
    windows: torch.Tensor,
    whitening: Whitening,
    batch_size: int,
    seed: int,
) -> Decomposition:
    """One pass over the windows; teacher: the model in float32."""
    sources = list(dict.fromkeys(group.source for group in groups))
    members = [name for group in groups for name in group.members] if whitening == "kfac" else []
    return Decomposition(model, *calibration_grams(teacher, sources, members, windows.split(batch_size), seed))


def fermigrad_ranks(
    teacher: nn.Module,
    groups: Sequence[LinearGroup],
    decomposition: Decomposition,
    windows: torch.Tensor,
    aside: torch.Tensor,
    remove: float,
    form: Form,
    settings: FermiGradSettings,
    align: int | None,
) -> list[float]:
    """Real ranks on the budget; in svd form each group is k or at most where its factors are smaller than W."""

    def whole(group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        factors = decomposition.factors(group)
        return factors.a, factors.b

    gated_model = copy.deepcopy(teacher)
    gated = install_gates(gated_model, groups, whole)
    budget = kept_parameters(groups, remove)
    kept = budget / sum(group.dense_parameters for group in groups)
    mus, _ = optimise_ranks(gated_model, groups, gated, windows, kept, form, settings)
    if form == "svd":
        mus, _ = settle_jump(
            gated_model, groups, gated, mus, budget, aside, align, settings.minimum_rank, settings.batch_size
        )
    return mus


def low_rank(teacher: nn.Module, factors: Mapping[LinearGroup, Pair]) -> nn.Module:
    """A copy whose groups have A B for their weights."""
    student = copy.deepcopy(teacher)
    for group, (a, b) in factors.items():
        set_weight(student, group, a @ b)
    return student


def with_modules(
    model: nn.Module, ranked: Mapping[LinearGroup, int], factors: Mapping[LinearGroup, Pair], form: Form
) -> nn.Module:
    """A copy of the model with compressed layers, in its weights' type, in place of the groups' dense ones."""
    student = copy.deepcopy(model)
    for group, rank in ranked.items():
        dtype = linear_layer(model, group.name).weight.dtype
        biases = {name: student.get_submodule(name).bias for name in group.members}
        replace_group(student, config_group(group, rank, form))
        for name, tensor in compressed_tensors(group, *factors[group], form, dtype).items():
            put(student, name, tensor)
        for name, bias in biases.items():
            if bias is not None:
                put(student, f"{name}.bias", bias.detach())
    return student.eval()


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """A tensor's values into the parameter or buffer of that name."""
    with torch.no_grad():
        model.state_dict(keep_vars=True)[name].copy_(tensor)


def healed(
    teacher: nn.Module, student: nn.Module, training: torch.Tensor, aside: torch.Tensor, settings: HealingSettings
) -> None:
    """Distil the student's factors in float32, and round them to its own type."""
    trained = in_float32(student)
    heal(teacher, trained, training, aside, settings)
    types = {name: parameter.dtype for name, parameter in trained_factors(student).items()}
    for dtype in set(types.values()):
        for name, tensor in rounded_factors(trained, dtype).items():
            if types[name] == dtype:
                put(student, name, tensor)
