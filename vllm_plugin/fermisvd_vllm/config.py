"""vLLM's quantization config for quant_method fermisvd."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from fermisvd.format import PICKLE_SUFFIXES, FormatError, Group, parse_config, validate_before_serving
from fermisvd_vllm.layout import numbers_held, parts_of
from fermisvd_vllm.linear import FermiSVDLinearMethod
from fermisvd_vllm.versions import DRAFT_PREFIX

logger = init_logger("vllm.fermisvd")


class FermiSVDConfig(QuantizationConfig):
    """The groups of a checkpoint, looked up by the names of vLLM's layers."""

    def __init__(self, entry: dict[str, Any]):
        super().__init__()
        self.checkpoint = parse_config(entry)
        self.groups: dict[str, Group] = self.checkpoint.group_of()
        self.layers: dict[str, FermiSVDLinearMethod] = {}  # by prefix; filled while vLLM builds the model
        self.waiting: set[str] = set()  # prefixes whose weights are not there yet

    def __repr__(self) -> str:
        return f"FermiSVDConfig({len(self.checkpoint.groups)} groups)"

    @classmethod
    def get_name(cls) -> str:
        return "fermisvd"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70  # as vLLM itself: the factors are plain matrices

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FermiSVDConfig":
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None, **kwargs) -> None:
        """Refuses a broken checkpoint before any process is started for it.

        vLLM passes over a missing tensor in silence. A folder without weights is one for --load-format dummy. A hub
        model is checked here if it has been downloaded; layers check their own tensors in any case.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            cached = try_to_load_from_cache(model_name, "config.json", revision=revision)
            folder = Path(cached).parent if isinstance(cached, str) else folder
        if folder.is_dir() and any(p.suffix in {".safetensors", *PICKLE_SUFFIXES} for p in folder.iterdir()):
            from fermisvd.hf import check_architecture  # here, so that registering stays light

            validate_before_serving(folder)
            check_architecture(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Renames members as vLLM renames the model's modules."""
        renamed = []
        for group in self.checkpoint.groups:
            members = tuple((hf_to_vllm_mapper.apply_list([name]) or [name])[0] for name in group.members)
            renamed.append(group.model_copy(update={"members": members}))
        self.checkpoint = self.checkpoint.model_copy(update={"groups": tuple(renamed)})
        self.groups = self.checkpoint.group_of()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        members = self.member_names(prefix.removeprefix(DRAFT_PREFIX))
        parts = parts_of(members, self.groups, prefix)
        if parts is None:
            return UnquantizedLinearMethod()
        self.pipelined = get_current_vllm_config().parallel_config.pipeline_parallel_size > 1
        self.waiting.add(prefix)
        self.layers[prefix] = FermiSVDLinearMethod(parts, members, prefix, self._check_groups, self._layer_is_ready)
        return self.layers[prefix]

    def _check_groups(self) -> None:
        """Raises FormatError if no layer of the model asked for a group; a pipeline stage has only some of them."""
        claimed = {part.group.name for method in self.layers.values() for part in method.parts if part.group}
        strangers = [group for group in self.checkpoint.groups if group.name not in claimed]
        if strangers and not self.pipelined:
            raise FormatError(
                f"group {strangers[0].name}: the model that vLLM built has no layer for it; "
                "config.json and the groups in it are not of one model, convert again"
            )

    def _layer_is_ready(self, method: FermiSVDLinearMethod) -> None:
        """When the last layer is: says what this rank holds."""
        if method.layer_name not in self.waiting:
            return  # a reload
        self.waiting.remove(method.layer_name)
        if not self.waiting:
            sharded, replicated = map(sum, zip(*(numbers_held(m.slots) for m in self.layers.values()), strict=True))
            dense = sum(m.dense_numbers for m in self.layers.values())
            logger.info(
                "FermiSVD: %d compressed layers; this rank (tensor parallel %d of %d) holds %s numbers of which %s "
                "replicated; dense %s",
                len(self.layers),
                method.tp_rank,
                method.tp_size,
                f"{sharded + replicated:,}",
                f"{replicated:,}",
                f"{dense:,}",
            )

    def member_names(self, prefix: str) -> list[str]:
        """Checkpoint names of a layer's members: a fused layer is expanded, unless it is fused on disk already."""
        parent, dot, name = prefix.rpartition(".")
        if prefix in self.groups or name not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}{dot}{member}" for member in self.packed_modules_mapping[name]]
