"""The whole method in memory, top to bottom: a model and token windows in, the compressed model out.

`fermisvd convert` is the same steps, of the same functions, for models that do not fit several times into memory: a
decoder block at a time, each step's result kept in files and found again.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import BeforeValidator, model_validator
from torch import nn
from transformers import PreTrainedModel

from fermisvd.bits import check_room_for_bits, choose_bits, ranked_within
from fermisvd.budget import Budget, Form, RankedGroup, compressed, stored_in_groups
from fermisvd.byte_budget import ByteBudget, in_type
from fermisvd.calibration import Grams, OutputGrams, calibration_grams
from fermisvd.decomposition import Decomposition, Factors, OutputGram
from fermisvd.dense_choice import choose_dense
from fermisvd.errors import OptionError
from fermisvd.fermigrad import FermiGradSettings, optimise_ranks
from fermisvd.format import checkpoint_config
from fermisvd.gates import install_gates
from fermisvd.groups import LinearGroup, Partition, check_unshared, find_groups, stacked_weight
from fermisvd.healing import HealingSettings, heal, opened_factors, stored_factors
from fermisvd.hf import mark_compressed, vocabulary_of
from fermisvd.joining import join_groups, layers_with_hopes
from fermisvd.linear import linear_layer
from fermisvd.losses import Pair, StudentLoss, set_products
from fermisvd.modules import CompressedLinear, replace_group
from fermisvd.precision import compute_type, width_of, with_parameters_in
from fermisvd.refit import refit
from fermisvd.rescaling import rescale
from fermisvd.schemes import COARSE, Weights, WeightsRule
from fermisvd.settings import Batched, Count, Seeded, nested, option
from fermisvd.storage import config_group, group_tensors
from fermisvd.teacher import Taught, teach

REMOVE = 0.2  # by default, of `compress`
ASIDE_WINDOWS = 32  # windows that decide between measured alternatives, never trained on
RankRule = Literal["fermigrad", "uniform"]
RANK_RULES = get_args(RankRule)
Whitening = Literal["kfac", "input"]
GroupsRule = Literal["auto", "joint", "separate"]


class CompressOptions(Batched, Seeded):
    """The method's options."""

    panel = "Method"

    remove: Annotated[float | None, option("Fraction of the decoder blocks' linear parameters to remove.")] = None
    bytes: Annotated[
        float | None, option("Instead: fraction of their bytes that may stay, as written, scales and all.")
    ] = None
    form: Annotated[Form, option("Stored form of the factors.")] = "pivga"
    weights: Annotated[
        WeightsRule,
        option("Numbers of the factors; auto: the model's type; mixed: int4, and int8 where --bytes has room."),
    ] = "auto"
    ranks: Annotated[RankRule, option("Rule that chooses the ranks.")] = "fermigrad"
    groups: Annotated[
        GroupsRule, option("Layers that read the same input: decomposed jointly, one by one, or as measured.")
    ] = "auto"
    whitening: Annotated[Whitening, option("What weighs an error: the layer's inputs, or also the loss gradient.")] = (
        "kfac"
    )
    refit: Annotated[
        bool | None, option("Fit each group to what compressed layers send it.", shown="where not healed")
    ] = None
    rescale: Annotated[
        bool | None,
        option(
            "Weigh the kept directions of all groups anew, by the loss.",
            shown="with kfac, where not healed",
        ),
    ] = None
    align: Annotated[
        Count | None,
        BeforeValidator(lambda value: None if value == "auto" else value),
        option("Step of the ranks.", shown="auto: a power of two near k/64"),
    ] = Budget.align
    minimum_rank: Annotated[Count, option("Lowest rank of any group.")] = Budget.minimum_rank
    fermigrad: Annotated[FermiGradSettings, nested("FermiGrad")] = FermiGradSettings()
    healing: Annotated[HealingSettings, nested("Healing", prefix="heal_")] = HealingSettings()

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.weights == "mixed" and (self.bytes is None or self.whitening != "kfac"):
            raise ValueError("--weights mixed spends --bytes, and takes its losses from --whitening kfac")
        if self.remove is None and self.bytes is None:
            raise ValueError("give one of --remove and --bytes")
        if self.remove is not None and self.bytes is not None and self.weights != "mixed":
            raise ValueError("give one of --remove and --bytes; both go with --weights mixed alone")
        if self.remove is None and self.fermigrad.count not in (None, self.form):
            raise ValueError("--count is of parameters: it does not go with --bytes")
        return self

    @model_validator(mode="after")
    def _rescale_has_its_curvature(self) -> Self:
        if self.rescale and self.whitening != "kfac":
            raise ValueError("--rescale takes its step lengths from --whitening kfac")
        return self

    @property
    def budget(self) -> Budget:
        """What ranks are chosen on. Raises OptionError unless 0 < remove < 1, or 0 < bytes < 1. Bytes are those of
        bfloat16: see `in_type`."""
        if self.remove is not None:
            return Budget.removing(self.remove, *self._stored)
        assert self.bytes is not None
        return ByteBudget.keeping(self.bytes, *self._stored)

    @property
    def bits(self) -> ByteBudget | None:
        """What `mixed` spends on bits, once ranks are chosen."""
        if self.bytes is None or self.weights != "mixed":
            return None
        return ByteBudget.keeping(self.bytes, *self._stored)

    @property
    def _stored(self) -> tuple[Form, int | None, int, Weights]:
        return self.form, self.align, self.minimum_rank, COARSE if self.weights == "mixed" else self.weights

    @property
    def partition(self) -> Partition:
        """How groups are found first: `auto` begins with separate ones."""
        return "joint" if self.groups == "joint" else "separate"

    @property
    def refits(self) -> bool:
        return self.healing.steps == 0 if self.refit is None else self.refit

    @property
    def rescales(self) -> bool:
        if self.rescale is not None:
            return self.rescale
        return self.refits and self.healing.steps == 0 and self.whitening == "kfac"


def compress(
    model: PreTrainedModel, windows: torch.Tensor, remove: float | None = None, **options: Any
) -> PreTrainedModel:
    """A compressed copy of `model`, in its types, that save_pretrained writes, from_pretrained loads and vLLM serves.

    model: a dense causal language model of transformers, which stays as it is; windows: token ids (samples, length) to
    calibrate and train on, over and over; remove: fraction of the parameters of the decoder blocks' linear layers, 0.2
    unless `bytes` is given; options: those of `CompressOptions` by name, such as form="svd" or heal_steps=0, nested
    ones as on the command line.
    Models, factors and Gram matrices are held at once, in float32 and float64. Raises FermiSVDError for a model,
    windows or options that cannot be used.
    """
    check_windows(model, windows)
    remove = REMOVE if remove is None and options.get("bytes") is None else remove
    work = Compression(model, windows, CompressOptions.named(remove=remove, **options))
    groups = find_groups(work.teacher, work.options.partition)
    work.budget.check(groups)
    if work.bits:
        check_room_for_bits(work.budget, work.bits, groups)
    decomposition = calibrate(work, groups)
    ranked = ranked_within(work.budget, work.bits, groups, ideal_ranks(work, groups, decomposition))
    if work.options.groups == "auto":
        ranked = join(work, ranked, decomposition)
    whole, ranked = ranked, compressed(ranked)
    factors = decomposition.truncated(ranked)
    if work.options.refits and ranked:
        factors |= refitted(work, ranked, factors, decomposition)
    if work.options.rescales and ranked:
        factors = rescaled(work, ranked, factors, decomposition)
    if work.bits:
        whole = choose_bits(whole, factors.__getitem__, decomposition, work.bits, work.windows.numel())
    stored = stored_in_groups(whole)
    student = with_modules(model, stored, factors, decomposition)
    if work.options.healing.steps and stored:
        healed(work, student)
    settings = {name: work.options.by_name()[name] for name in ("remove", "bytes", "form", "weights")}
    mark_compressed(student, checkpoint_config([config_group(each) for each in stored], {"settings": settings}))
    return student


def check_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Raises OptionError unless these are two windows of the model's token ids or more."""
    known = vocabulary_of(model)
    if not isinstance(windows, torch.Tensor) or windows.dtype not in (torch.int32, torch.int64):
        raise OptionError("windows are token ids, (samples, length): give a tensor of int64 or int32")
    if windows.dim() != 2 or len(windows) < 2 or windows.shape[1] < 2:
        raise OptionError(f"windows are token ids, (samples, length), two or more: given {tuple(windows.shape)}")
    if windows.min() < 0 or windows.max() >= known:
        raise OptionError(f"windows hold tokens {windows.min()} to {windows.max()}, the model knows 0 to {known - 1}")


def set_aside(taught: Taught) -> tuple[Taught, Taught]:
    """Windows that decide between alternatives, an eighth of all and at most ASIDE_WINDOWS; and the others."""
    held = min(ASIDE_WINDOWS, -(-len(taught) // 8))
    return taught[:held], taught[held:]


def for_passes(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy for measuring, its weights in `dtype`, in evaluation mode."""
    return with_parameters_in(copy.deepcopy(model), dtype).eval().requires_grad_(False)


class Compression:
    """What the steps share: the model, its copy in the type of the passes (teacher), what that makes of the windows,
    of those to decide on and to train on; the budgets of ranks and of bits. Raises OptionError or StructureError for a
    model that cannot be compressed."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, options: CompressOptions):
        if getattr(model.config, "quantization_config", None) is not None:
            raise OptionError("the model is quantised or compressed already; give the dense one")
        check_unshared(model)
        self.model, self.windows, self.options = model, windows, options
        self.budget = in_type(options.budget, model.dtype)
        self.bits = in_type(options.bits, model.dtype) if options.bits else None
        self.compute = compute_type(options.compute, model.device, width_of(model.config))
        self.teacher = for_passes(model, self.compute)
        self.taught = teach(self.teacher, windows, options.batch_size)
        self.aside, self.training = set_aside(self.taught)


@dataclass
class InMemory(Decomposition):
    """weights_of: the model whose weights are decomposed, in their own type; grams: C of each source; output_grams: G
    of each member, none with `input` whitening."""

    weights_of: PreTrainedModel
    grams: Grams
    output_grams: OutputGrams
    kept: dict[tuple[str, ...], Factors] = field(default_factory=dict)

    def factors(self, group: LinearGroup) -> Factors:
        if group.members not in self.kept:
            self.kept[group.members] = self.made(group)
        return self.kept[group.members]

    def weights(self, group: LinearGroup) -> torch.Tensor:
        return stacked_weight(self.weights_of, group)

    def gram(self, source: str) -> torch.Tensor:
        return self.grams[source]

    def outputs(self, group: LinearGroup, device: torch.device) -> list[OutputGram] | None:
        return [self.output_grams[name] for name in group.members] if self.output_grams else None

    def truncated(self, ranked: Sequence[RankedGroup]) -> dict[LinearGroup, Pair]:
        """The groups' A (m x r) and B (r x n)."""
        return {each.group: self.factors(each.group).truncated(each.rank) for each in ranked}


def calibrate(work: Compression, groups: Sequence[LinearGroup]) -> InMemory:
    """One pass over the windows."""
    sources = list(dict.fromkeys(group.source for group in groups))
    members = [name for group in groups for name in group.members] if work.options.whitening == "kfac" else []
    batches = work.windows.split(work.options.batch_size)
    return InMemory(work.model, *calibration_grams(work.teacher, sources, members, batches, work.options.seed))


def ideal_ranks(work: Compression, groups: Sequence[LinearGroup], decomposition: InMemory) -> list[float]:
    """Real ranks on the budget; FermiGrad's in svd form are k or at most where factors are smaller than W."""
    if work.budget.holds_all(groups):
        return [group.full_rank for group in groups]
    if work.options.ranks == "uniform":
        return work.budget.uniform_ranks(groups)
    model = copy.deepcopy(work.teacher)
    gated = install_gates(model, groups, decomposition.whole)
    batch_size, seed = work.options.batch_size, work.options.seed
    mus, _ = optimise_ranks(
        model, groups, gated, work.taught, work.budget, work.options.fermigrad, batch_size=batch_size, seed=seed
    )
    if work.options.form == "svd":
        mus, _ = choose_dense(model, groups, gated, mus, work.budget, work.aside, batch_size=batch_size)
    return mus


def join(work: Compression, ranked: Sequence[RankedGroup], decomposition: InMemory) -> list[RankedGroup]:
    """Groups joined where the measured loss allows; what that leaves of the budget is spent again."""
    student = low_rank(work.teacher, decomposition.truncated(compressed(ranked)))
    loss = StudentLoss(student, work.aside, work.options.batch_size)
    layers = layers_with_hopes(ranked, work.budget, decomposition)
    found, _ = join_groups(student, layers, decomposition, loss)
    return ranked_within(work.budget, work.bits, [each.group for each in found], [each.rank for each in found])


def refitted(
    work: Compression, ranked: Sequence[RankedGroup], factors: Mapping[LinearGroup, Pair], decomposition: InMemory
) -> dict[LinearGroup, Pair]:
    """New factors of the groups that fit better to what compressed layers send them."""
    student, windows = low_rank(work.teacher, factors), work.training.windows
    fit, batch_size = decomposition.fit, work.options.batch_size
    better = refit(work.teacher, student, ranked, windows, work.aside, fit, batch_size=batch_size)
    return {each.group: better[each.group.name] for each in ranked if each.group.name in better}


def rescaled(
    work: Compression, ranked: Sequence[RankedGroup], factors: Mapping[LinearGroup, Pair], decomposition: InMemory
) -> dict[LinearGroup, Pair]:
    """The factors, A's columns weighed anew."""
    student, groups = copy.deepcopy(work.teacher), [each.group for each in ranked]
    gated = install_gates(student, groups, lambda group: factors[group])
    sigmas = [decomposition.sigma(each.group)[: each.rank] for each in ranked]
    tokens, batch_size = work.windows.numel(), work.options.batch_size
    weights = rescale(student, gated, sigmas, tokens, work.training, work.aside, batch_size=batch_size)
    scaled = dict(factors)
    for group, own in zip(groups, weights, strict=True):
        a, b = factors[group]
        scaled[group] = a * own.to(a), b
    return scaled


def low_rank(teacher: PreTrainedModel, factors: Mapping[LinearGroup, Pair]) -> PreTrainedModel:
    """A copy whose groups have A B for their weights."""
    return set_products(copy.deepcopy(teacher), factors.items())


def with_modules(
    model: PreTrainedModel,
    stored: Sequence[RankedGroup],
    factors: Mapping[LinearGroup, Pair],
    decomposition: Decomposition,
) -> PreTrainedModel:
    """A copy of the model with compressed layers, in its weights' type or on a grid, in place of the groups' dense
    ones. factors: of those that do not stay dense."""
    student = copy.deepcopy(model)
    for each in stored:
        group, dtype = each.group, linear_layer(model, each.group.name).weight.dtype
        biases = {name: linear_layer(student, name).bias for name in group.members}
        replace_group(student, config_group(each))
        made = group_tensors(each, factors.__getitem__, decomposition, dtype, model.device)
        for name, tensor in made.items():
            put(student, name, tensor)
        for name, bias in biases.items():
            if bias is not None:
                put(student, f"{name}.bias", bias.detach())
    return student.eval()


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """A tensor's values into the parameter or buffer of that name."""
    with torch.no_grad():
        model.state_dict(keep_vars=True)[name].copy_(tensor)


def healed(work: Compression, student: PreTrainedModel) -> None:
    """Distil the student's factors, and round them to its own type."""
    options, types = work.options, factor_types(student)
    trained = for_passes(student, reduce(torch.promote_types, types.values(), work.compute))  # no digit is lost
    stored = max(set(types.values()), key=list(types.values()).count)  # of scales, where factors are on grids
    heal(
        trained,
        work.training,
        work.aside,
        options.healing,
        batch_size=options.batch_size,
        seed=options.seed,
        factors=opened_factors(trained, stored),
    )
    for dtype in set(types.values()):
        for name, tensor in stored_factors(trained, dtype).items():
            if types.get(name, dtype) == dtype:
                put(student, name, tensor)


def factor_types(student: nn.Module) -> dict[str, torch.dtype]:
    """Floating-point type of each factor, or of its scales, by tensor name."""
    return {
        f"{prefix}.{name}": parameter.dtype
        for prefix, layer in student.named_modules()
        if isinstance(layer, CompressedLinear)
        for name, parameter in layer.named_parameters(recurse=False)
        if name != "bias" and parameter.is_floating_point() and parameter.itemsize > 1
    }
