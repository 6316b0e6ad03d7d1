"""Which tensors of a model's files are the parameters of the model that transformers makes of its config.

Names are mapped as from_pretrained maps them, in both directions: a parameter without a tensor and a tensor without a
parameter are both found. Tied parameters are looked at from every end. A checkpoint keeps the names of its files, which
vLLM maps by tables of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from fermisvd.errors import FormatError
from fermisvd.files import TensorInfo

ROWS = 2**14  # compared together


@dataclass
class ModelTensors:
    """A model's files seen from its parameters.

    whole: parameter or buffer -> the tensor that it is, as it is; tied ones share theirs.
    made: parameters that transformers makes of several tensors, or of one in another shape (stacked experts).
    own: the tensors of all that belong to the model, once each, by parameter, or by their names where a parameter is
    made of several. stored_names: of those that a file calls otherwise than the model (a wrapper's), how; both
    transformers and vLLM look for that. missing: parameters without a tensor. left_out: tensors without a parameter.
    """

    whole: dict[str, TensorInfo] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    own: dict[str, TensorInfo] = field(default_factory=dict)
    stored_names: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def model_tensors(model: PreTrainedModel, headers: Mapping[str, TensorInfo]) -> ModelTensors:
    """headers: name -> TensorInfo of the files (fermisvd.files); model: on any device, its weights are not looked at.

    Raises FormatError, naming both, for two stored tensors of one parameter that differ, by their names or because
    config.json ties them: which one is taken depends on who reads.
    """
    found, state = ModelTensors(), model.state_dict(keep_vars=True)
    parameter_of = {}
    for name, (parameter, as_it_is) in parameters_of(model, headers).items():
        if parameter not in state:
            found.left_out.append(name)
            continue
        if as_it_is and parameter in found.whole:
            check_equal(found.whole[parameter], headers[name], f"both are {parameter}", "remove the one that is stale")
            continue  # once is enough
        parameter_of[name] = parameter
        if as_it_is:
            found.whole[parameter] = headers[name]
        else:
            found.made.add(parameter)
    names = {parameter: name for name, parameter in parameter_of.items()}
    rename: dict[str, str | None] = {}
    for source, members in ties(model).items():
        stored = [member for member in (source, *members) if member in found.whole]
        if not stored:
            continue
        first = found.whole[stored[0]]
        for other in stored[1:]:
            check_equal(
                first,
                found.whole[other],
                f"config.json ties them (tie_word_embeddings): transformers would use each, vLLM {first.name} for both",
                f"set tie_word_embeddings to false, or remove {found.whole[other].name}, whichever the model was "
                "trained with",
            )
            rename[names[other]] = None  # once is enough
        if stored[0] != source:
            rename[names[stored[0]]] = source
        found.whole |= dict.fromkeys((source, *members), first)
    prefix = f"{model.base_model_prefix}."
    as_they_are = [(name, parameter) for name, parameter in parameter_of.items() if parameter in found.whole]
    # saved without the prefix of the model below the head, as GPT-2 is: a checkpoint of ours has it
    bare = all(parameter in (name, prefix + name) for name, parameter in as_they_are)
    for name, parameter in parameter_of.items():
        stored = rename.get(name, name)
        if stored is None:
            continue
        own = name if parameter in found.made else rename.get(name) or parameter
        found.own[own] = headers[name]
        if own != stored and not bare:
            found.stored_names[own] = stored
    parameters = (name for name, tensor in state.items() if isinstance(tensor, nn.Parameter))
    found.missing = [name for name in parameters if name not in found.whole and name not in found.made]
    return found


def ties(model: PreTrainedModel) -> dict[str, list[str]]:
    """Parameter -> those that are to be one with it: as transformers ties them by config.json, or as the model's own
    code made them."""
    found: dict[str, list[str]] = {}
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        found.setdefault(source, []).append(target)
    covered, first = found.keys() | declared.keys(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = first.setdefault(id(tensor), name)
        if source != name and name not in covered:
            found.setdefault(source, []).append(name)
    return found


def parameters_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Tensor name -> the parameter that transformers fills from it, and whether it is taken as it is, be it under
    another name, or made into another (stacked experts)."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    prefix, meta = model.base_model_prefix, model.state_dict()
    found = {}
    for name in names:
        parameter, converter = rename_source_key(name, renamings, converters, prefix, meta)
        found[name] = parameter, converter is None
    return found


def module_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Linear layer as a checkpoint names it -> the dense model's module; itself where it is none."""
    found = parameters_of(model, weights := [f"{name}.weight" for name in names])
    return {name.removesuffix(".weight"): found[name][0].removesuffix(".weight") for name in weights}


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Module -> its name in a checkpoint that save_pretrained writes."""
    modules = list(names)
    weights = {f"{name}.weight": torch.tensor(number) for number, name in enumerate(modules)}
    saved = revert_weight_conversion(model, weights)
    return {modules[int(number)]: name.removesuffix(".weight") for name, number in saved.items()}


def check_equal(one: TensorInfo, other: TensorInfo, why: str, remedy: str) -> None:
    """Raises FormatError if two tensors that are to be one have different values."""
    a, b = one.read(), other.read()
    equal = a.shape == b.shape and all(
        torch.equal(x.float(), y.float()) for x, y in zip(a.split(ROWS), b.split(ROWS), strict=True)
    )
    if not equal:
        raise FormatError(f"{other.file}: {other.name} is not {one.name}, but {why}; {remedy}")
