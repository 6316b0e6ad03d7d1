"""transformers: after `import fermisvd`, from_pretrained loads a FermiSVD checkpoint.

The reference modules take the place of the compressed layers; a broken checkpoint is refused; save_pretrained
writes the model at its small size again.
"""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fermisvd.errors import FormatError, OptionError, reason
from fermisvd.files import MEND, TensorInfo, read_headers
from fermisvd.format import (
    PERMUTATION,
    QUANT_METHOD,
    CheckpointConfig,
    expected_tensors,
    parse_config,
    read_config,
    validate_checkpoint,
)
from fermisvd.groups import decoder_blocks
from fermisvd.linear import Linear, weight_of
from fermisvd.modules import replace_group
from fermisvd.tensors import ModelTensors, model_tensors, module_names, parameters_of, saved_names

logger = logging.getLogger("fermisvd")


@register_quantization_config(QUANT_METHOD)
class FermiSVDQuantizationConfig(QuantizationConfigMixin):
    """transformers' view of fermisvd.format.CheckpointConfig; to_dict gives back the validated entry."""

    def __init__(self, **entry: Any):
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]: an enum of transformers' own methods
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

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **kwargs) -> None:
        config: CheckpointConfig = vars(self.quantization_config)["fermisvd"]
        if (getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1) > 1:
            # its plans know one weight a layer: they would split shared factors, and what a member gets of its first
            raise OptionError(
                "tp_plan, tp_size: transformers' tensor parallelism does not fit shared factors; "
                "use fsdp_size or a device_map, or serve with vLLM"
            )
        if checkpoint_files:
            # transformers fills what a checkpoint lacks with random numbers; so everything is checked beforehand
            folder = Path(checkpoint_files[0]).parent
            validate_checkpoint(folder)
            replace_groups(model, config, read_headers(folder), folder)
        else:
            for group in in_modules(model, config).groups:
                replace_group(model, group)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters beside the layers; the Trainer refuses a model without."""
        return True


def mark_compressed(model: PreTrainedModel, config: CheckpointConfig) -> None:
    """A model whose layers are in place already: save_pretrained writes its config's groups from now on."""
    names = saved_names(model, config.group_of())
    config = config.renamed(names.__getitem__)
    entry = FermiSVDQuantizationConfig(**config.model_dump(mode="json", exclude_none=True, exclude={"quant_method"}))
    model.config.quantization_config = entry
    vars(model)["hf_quantizer"] = FermiSVDQuantizer(entry)  # as from_pretrained does


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
        raise FormatError(f"{path}: transformers cannot read it: {reason(error)}; {MEND}") from None
    try:
        with torch.device("meta"):
            model = auto_class(hf_config).from_config(hf_config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # not a causal language model of transformers' own
        logger.warning("%s: structure is checked layer by layer only: %s", path, reason(error))
        return
    replace_groups(model, read_config(folder), read_headers(folder), folder)


def replace_groups(
    model: PreTrainedModel, config: CheckpointConfig, headers: dict[str, TensorInfo], folder: Path
) -> ModelTensors:
    """Puts reference modules in place of the config's layers, and says which tensors are the model's.

    Raises FormatError if groups, tensors and model do not fit each other, in both directions.
    """
    stored, config = config, in_modules(model, config)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    own = {name for name, _ in model.named_parameters()}
    for group, in_files in zip(config.groups, stored.groups, strict=True):
        for member in group.members:
            if member not in linear:
                raise FormatError(
                    f"{folder / 'config.json'}: group {in_files.name}: {type(model).__name__} has no linear layer "
                    f"{member}; groups and model are not of one checkpoint, convert again"
                )
            if f"{member}.weight" not in own:
                raise FormatError(
                    f"{folder / 'config.json'}: group {in_files.name}: {member} shares its weight with another layer "
                    "and cannot be compressed alone; convert again"
                )
        rows = [len(weight_of(linear[name])) for name in group.members]
        expected_tensors(group, rows, weight_of(linear[group.name]).shape[1])  # refuses a rank that is too large
    for group in config.groups:
        replace_group(model, group)
    found = model_tensors(model, headers)
    permutations = [name for name, _ in model.named_buffers() if name.endswith(f".{PERMUTATION}")]
    if missing := found.missing or [name for name in permutations if name not in found.whole]:
        raise FormatError(f"{folder}: {missing[0]}: missing from the checkpoint; {MEND}")
    for name, tensor in model.state_dict(keep_vars=True).items():
        info = found.whole.get(name)
        if info is not None and info.shape != tuple(tensor.shape):
            raise FormatError(
                f"{info.file}: {info.name}: shape {info.shape}, {type(model).__name__} needs "
                f"{tuple(tensor.shape)}; config.json and weights are not of one model, convert again"
            )
    # a checkpoint of an earlier version lists among its dense tensors some that transformers never took
    strangers = set(found.left_out) - set(config.provenance.get("dense_tensors", []))
    if type(model).__name__ not in (model.config.architectures or [type(model).__name__]):
        # a language model is loaded alone, from its wrapper's files: what is beside its blocks is passed over
        blocks, parameters = decoder_blocks(model), parameters_of(model, strangers)
        strangers = {name for name in strangers if parameters[name][0].startswith(f"{blocks}.")}
    if strangers:
        name = min(strangers)
        raise FormatError(
            f"{headers[name].file}: {name}: {type(model).__name__} has no such parameter; config.json and weights are "
            "not of one model, convert again"
        )
    return found


def in_modules(model: PreTrainedModel, config: CheckpointConfig) -> CheckpointConfig:
    """The config with the modules of a model, which is still dense, for members."""
    names = module_names(model, config.group_of())
    return config.renamed(names.__getitem__)


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes the model that `architectures` names: a causal language model, or a wrapper
    of one that takes images or sounds as well."""
    for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            made: Any = auto._model_mapping[type(config)]
            if made.__name__ in (config.architectures or [made.__name__]):
                return auto
    return AutoModelForCausalLM


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, **kwargs) -> PreTrainedModel:
    """A causal language model, dense or compressed, for evaluation; never from pickles. kwargs: from_pretrained's.

    Raises FormatError for a folder that transformers and vLLM would not read alike (fermisvd.files, fermisvd.tensors).
    """
    folder = Path(path)
    if folder.is_dir():
        headers = read_headers(folder)
        empty = empty_model(folder, kwargs.get("trust_remote_code", False))
        if compressed_config(empty) is None:  # else the quantizer looks
            model_tensors(empty, headers)
    kwargs = {"return_dict": True} | kwargs  # whatever config.json says: the stages ask for .logits
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code", False))
    return auto_class(config).from_pretrained(path, dtype=dtype, use_safetensors=True, **kwargs).eval()


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The language model that a folder's config.json describes, or a wrapper of one, dense, without weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens a model can read."""
    return len(cast(torch.Tensor, model.get_input_embeddings().weight))


def compressed_config(model: PreTrainedModel) -> CheckpointConfig | None:
    """The groups that a model's config says are compressed; None for a dense model."""
    entry = getattr(model.config, "quantization_config", None)
    return parse_config(entry) if isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD else None
