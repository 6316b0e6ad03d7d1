"""--load-format fermisvd: the whole checkpoint is checked before any weight is copied."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from fermisvd.errors import FormatError
from fermisvd.format import validate_checkpoint
from fermisvd_vllm.versions import checkpoint_folder


class FermiSVDModelLoader(DefaultModelLoader):
    """vLLM's default loader behind fermisvd.format.validate_checkpoint, every value included."""

    def __init__(self, load_config):
        load_config.load_format = "safetensors"  # from here on it is the default loader; pickles are never read
        super().__init__(load_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises FormatError if the checkpoint is not what its config says, or leaves a parameter unfilled."""
        folder = checkpoint_folder(self, model_config)
        validate_checkpoint(folder)
        load_all(model, self.get_all_weights(model_config, model), folder)


def load_all(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path | str) -> None:
    """Gives the model the tensors. Raises FormatError for parameters that none of them filled."""
    # vLLM's models have it, torch's type does not
    loaded = model.load_weights(tensors)  # pyright: ignore[reportCallIssue]
    if loaded is not None:
        missing = sorted({name for name, _ in model.named_parameters()} - loaded)
        if missing:
            raise FormatError(f"{folder}: parameters that no tensor filled: {', '.join(missing[:5])}")
