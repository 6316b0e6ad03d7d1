"""transformers: after `import fermisvd`, AutoModelForCausalLM.from_pretrained loads a FermiSVD checkpoint.

The reference modules take the place of the compressed layers; a broken checkpoint is refused; save_pretrained
writes the model at its small size again.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fermisvd.errors import FermiSVDError
from fermisvd.format import (
    MEND,
    QUANT_METHOD,
    FermiSVDConfig,
    FormatError,
    expected_tensors,
    parse_config,
    read_config,
    read_headers,
    validate_checkpoint,
)
from fermisvd.linear import Linear, weight_of
from fermisvd.modules import CompressedLinear, replace_group

logger = logging.getLogger("fermisvd")


class ParallelismError(FermiSVDError):
    """A way of dividing the model that the compressed layers cannot follow."""


@register_quantization_config(QUANT_METHOD)
class FermiSVDQuantizationConfig(QuantizationConfigMixin):
    """transformers' view of fermisvd.format.FermiSVDConfig; to_dict gives back the validated entry."""

    def __init__(self, **entry: Any):
        self.quant_method = QUANT_METHOD
        self.fermisvd = parse_config({"quant_method": QUANT_METHOD, **entry})

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.fermisvd.model_dump(mode="json", exclude_none=True)


@register_quantizer(QUANT_METHOD)
class FermiSVDQuantizer(HfQuantizer):
    """Puts reference modules in place of the compressed layers before the weights are loaded."""

    requires_calibration = True  # a dense model is compressed by `fermisvd convert`, not while it loads

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        config = self.quantization_config.fermisvd
        if (getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1) > 1:
            # its plans know one weight a layer: they would split shared factors, and what a member gets of its first
            raise ParallelismError(
                "tp_plan, tp_size: transformers' tensor parallelism does not fit shared factors; "
                "use fsdp_size or a device_map, or serve with vLLM"
            )
        if checkpoint_files:
            # transformers fills what a checkpoint lacks with random numbers; so everything is checked beforehand
            folder = Path(checkpoint_files[0]).parent
            validate_checkpoint(folder)
            _check_against_model(model, config, folder)
        nothing = torch.empty(0)
        nothing._is_hf_initialized = True  # pyright: ignore
        for group in config.groups:
            replace_group(model, group)
            for member in group.members:  # while it loads: GPT-2's _init_weights reaches for its children's weights
                model.get_submodule(member).weight = nothing

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        for layer in model.modules():
            if isinstance(layer, CompressedLinear):
                del layer.weight

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def check_architecture(folder: Path) -> None:
    """The check of from_pretrained without the weights: does the model that config.json names fit groups and tensors?

    Raises FormatError if not. A model that transformers cannot build without foreign code is not checked, and said so.
    Overrides of the config on vLLM's command line are not considered.
    """
    path = folder / "config.json"
    if json.loads(path.read_text(encoding="utf-8")).get("model_type") not in CONFIG_MAPPING:
        logger.warning("%s: a model_type unknown to transformers; structure is checked layer by layer only", path)
        return
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever strange values make transformers raise
        raise FormatError(f"{path}: transformers cannot read it: {_first_line(error)}; {MEND}") from None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # not a causal language model of transformers' own
        logger.warning("%s: structure is checked layer by layer only: %s", path, _first_line(error))
        return
    _check_against_model(model, read_config(folder), folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _check_against_model(model: nn.Module, config: FermiSVDConfig, folder: Path) -> None:
    """Raises FormatError if a group or a tensor that the model needs is not there, or not in the model's shape."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for group in config.groups:
        for member in group.members:
            if member not in linear:
                raise FormatError(
                    f"{folder / 'config.json'}: group {group.name}: {type(model).__name__} has no linear layer "
                    f"{member}; groups and model are not of one checkpoint, convert again"
                )
    headers = read_headers(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for group in config.groups:
        for member in group.members:
            if expected.pop(f"{member}.weight", None) is None:
                raise FormatError(
                    f"{folder / 'config.json'}: group {group.name}: {member} shares its weight with another layer and "
                    "cannot be compressed alone; convert again"
                )
        rows = [len(weight_of(linear[name])) for name in group.members]
        expected |= expected_tensors(group, rows, weight_of(linear[group.name]).shape[1])
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    loaded = {parameter for parameter, _ in parameters_of(model, headers).values()}
    for name, shape in expected.items():
        if name not in headers and name not in tied and name not in loaded:
            raise FormatError(f"{folder}: {name}: missing from the checkpoint; {MEND}")
        if name in headers and headers[name].shape != shape:
            raise FormatError(
                f"{headers[name].file}: {name}: shape {headers[name].shape}, {type(model).__name__} needs {shape}; "
                "config.json and weights are not of one model, convert again"
            )


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
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


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """A causal language model, dense or compressed, for evaluation; never from pickles. kwargs: from_pretrained's."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **kwargs).eval()
