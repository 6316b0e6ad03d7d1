"""vLLM's quantization config for quant_method fermisvd."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from fermisvd.errors import FormatError
from fermisvd.files import holds_weights
from fermisvd.format import Group, parse_config, validate_before_serving
from fermisvd_vllm.kinds import parts_of
from fermisvd_vllm.layout import numbers_held
from fermisvd_vllm.linear import FermiSVDLinearMethod
from fermisvd_vllm.tuning import OwnOps
from fermisvd_vllm.versions import (
    DRAFT_PREFIX,
    check_factors_are_read,
    check_loading_order,
    check_online_quantization,
    heads_in_halves,
    name_in_files,
)

logger = init_logger("vllm.fermisvd")


class FermiSVDConfig(QuantizationConfig):
    """The groups of a checkpoint, looked up by the names of vLLM's layers. own_ops: which its layers are to use."""

    def __init__(self, entry: dict[str, Any], own_ops: OwnOps | None = None):
        super().__init__()
        self.own_ops = own_ops or OwnOps()
        self.checkpoint = parse_config(entry)
        self.groups: dict[str, Group] = self.checkpoint.group_of()
        self.layers: dict[str, FermiSVDLinearMethod] = {}  # by prefix; filled while vLLM builds the model
        self.unprocessed: set[str] = set()  # prefixes of layers whose weights are not there yet
        self.folder_checked = self.model_checked = False

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

    def maybe_update_config(self, model_name: str, hf_config=None, **kwargs) -> None:
        """Refuses a broken folder before any process is started for it; vLLM passes over a missing tensor in silence.

        A folder without weights is one for --load-format dummy. A hub model, which may not be here yet, is checked
        before its first tensor is taken. Raises FormatError, also for options that do not go with compressed layers.
        """
        check_online_quantization(self)
        folder = Path(model_name)
        if folder.is_dir() and holds_weights(folder):
            self._check_folder(folder)

    def _check_folder(self, folder: Path) -> None:
        from fermisvd.hf import check_architecture  # here, so that registering stays light

        validate_before_serving(folder)
        check_architecture(folder)
        self.folder_checked = True

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Renames members as vLLM renames the model's modules."""
        self.checkpoint = self.checkpoint.renamed(lambda name: (hf_to_vllm_mapper.apply_list([name]) or [name])[0])
        self.groups = self.checkpoint.group_of()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        self.vllm_config = get_current_vllm_config()
        members = self.member_names(prefix.removeprefix(DRAFT_PREFIX))
        parts = parts_of(members, self.groups, prefix)
        if parts is None:
            return DenseLinearMethod(self.check_model)
        check_loading_order(self.vllm_config.model_config, prefix)
        check_factors_are_read(layer, prefix)
        self.unprocessed.add(prefix)
        heads = heads_in_halves(self.vllm_config.model_config, prefix)
        method = FermiSVDLinearMethod(
            parts, members, prefix, self.own_ops, self.check_model, self._layer_is_ready, heads
        )
        self.layers[prefix] = method
        return method

    def member_names(self, prefix: str) -> list[str]:
        """Checkpoint names of a layer's members: a fused layer is expanded, unless it is fused on disk already."""
        prefix = name_in_files(prefix, self.groups)
        parent, dot, name = prefix.rpartition(".")
        if prefix in self.groups or name not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}{dot}{member}" for member in self.packed_modules_mapping[name]]

    def check_model(self) -> None:
        """Once, when vLLM has built the model and, of a hub model, downloaded the weights: do they belong together?

        Raises FormatError if no layer asked for a group, or for what is wrong with the downloaded folder.
        """
        if self.model_checked:
            return
        self.check_claimed()
        self._check_download()
        self.model_checked = True

    def check_claimed(self) -> None:
        """Raises FormatError for a group that no layer of the built model has."""
        claimed = {name for method in self.layers.values() for name in method.member_names}
        unclaimed = [group.name for group in self.checkpoint.groups if group.name not in claimed]
        stages = self.vllm_config.parallel_config.pipeline_parallel_size
        if unclaimed and (stages == 1 or not claimed):  # a pipeline stage has some of the layers
            raise FormatError(
                f"config.json: group {unclaimed[0]}: the model that vLLM built has no layer for it; "
                "config.json and the groups in it are not of one model, convert again"
            )

    def _check_download(self) -> None:
        model, load = self.vllm_config.model_config, self.vllm_config.load_config
        if self.folder_checked or model is None or load.load_format == "dummy" or Path(model.model).is_dir():
            return
        cached = try_to_load_from_cache(
            model.model, "config.json", cache_dir=load.download_dir, revision=model.revision
        )
        if isinstance(cached, str):
            self._check_folder(Path(cached).parent)
        else:
            logger.warning("%s: not in the hub's cache, so its dense tensors are not checked", model.model)

    def numbers_held(self) -> tuple[int, int, int]:
        """In this process' compressed layers: numbers that tensor parallelism splits, those that it does not, and what
        the dense layers would have."""
        held = [(*numbers_held(method.slots), method.dense_numbers) for method in self.layers.values()]
        sharded, replicated, dense = map(sum, zip(*held, strict=True))
        return sharded, replicated, dense

    def serve_dense(self) -> None:
        """Forgets all groups."""
        self.checkpoint = self.checkpoint.model_copy(update={"groups": ()})
        self.groups, self.layers = {}, {}

    def _layer_is_ready(self, method: FermiSVDLinearMethod) -> None:
        """When the last layer is: says what this process holds."""
        if method.layer_name not in self.unprocessed:
            return  # a reload
        self.unprocessed.remove(method.layer_name)
        if not self.unprocessed:
            sharded, replicated, dense = self.numbers_held()
            logger.info(
                "FermiSVD: %d compressed layers; this process (tensor parallel %d of %d) holds %s numbers of which %s "
                "replicated; dense %s",
                len(self.layers),
                method.tp_rank,
                method.tp_size,
                f"{sharded + replicated:,}",
                f"{replicated:,}",
                f"{dense:,}",
            )


class DenseLinearMethod(UnquantizedLinearMethod):
    """vLLM's own method, for a layer in no group. It too asks for check_model: there may be no other kind of layer."""

    def __init__(self, check_model: Callable[[], None]):
        super().__init__()
        self.check_model = check_model

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.check_model()
        super().process_weights_after_loading(layer)
