"""A causal language model that holds the weights of one decoder block at a time.

It is an ordinary module: a block's weights are read from the safetensors files when it is called, and dropped
afterwards. `present` keeps a block for as long as it is run over many batches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, PreTrainedModel

from fermisvd.errors import FermiSVDError
from fermisvd.files import TensorInfo, read_headers
from fermisvd.groups import decoder_blocks
from fermisvd.hf import auto_class, compressed_config, replace_groups
from fermisvd.tensors import model_tensors


class StreamingError(FermiSVDError):
    """A checkpoint whose tensors are not the model's one by one, so that only transformers can load it."""


class BlockWeights:
    """Fills one decoder block from the files, and empties it."""

    def __init__(self, block: nn.Module, prefix: str, read: Callable[[str], torch.Tensor]):
        self.block, self.prefix, self.read = block, prefix, read
        self.names = {name: tensor for name, tensor in block.state_dict(keep_vars=True).items() if tensor.is_meta}
        self.held = self.filled_by_call = False
        self.hooks: tuple[RemovableHandle, ...] = ()

    def fill(self) -> bool:
        """Read the block's weights; returns whether it was empty."""
        if self.held:
            return False
        for name in self.names:
            _put(self.block, name, self.read(f"{self.prefix}{name}"))
        self.held = True
        return True

    def empty(self) -> None:
        for name, empty in self.names.items():
            _put(self.block, name, empty)
        self.held = False


def stream_model(
    folder: Path, device: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a folder, dense or compressed, its weights in `dtype`; only what is outside its decoder blocks stays
    in memory.

    Raises StreamingError if a parameter is not a tensor of the files, in the same shape.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, return_dict=True)
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    files, groups = read_headers(folder), compressed_config(model)
    found = model_tensors(model, files) if groups is None else replace_groups(model, groups, files, folder)
    model.requires_grad_(False)
    blocks, headers = decoder_blocks(model), found.whole

    def read(name: str) -> torch.Tensor:
        return _read(headers[name], device, dtype)

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = headers.get(name)
        if tensor.is_meta and (stored is None or stored.shape != tuple(tensor.shape)):
            raise StreamingError(f"{folder}: no tensor {name} of shape {tuple(tensor.shape)}")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta and name not in tied and not name.startswith(f"{blocks}."):
            _put(model, name, read(name))
    model.tie_weights()
    for name, buffer in model.named_buffers():
        if not buffer.is_meta:  # a block's too, which stay; those of the files (Gemma 4's scalars) are no computed ones
            _put(model, name, read(name) if name in headers else buffer.to(device))
    for name, block in model.get_submodule(blocks).named_children():
        vars(block)["stream"] = stream = BlockWeights(block, f"{blocks}.{name}.", read)
        stream.hooks = block.register_forward_pre_hook(_fill), block.register_forward_hook(_empty, always_call=True)
    return model


@contextmanager
def present(block: nn.Module) -> Iterator[None]:
    """Hold a block's weights for the duration; a block of a model that is in memory whole has them anyway."""
    stream: BlockWeights | None = getattr(block, "stream", None)
    if stream is None or not stream.fill():
        yield
        return
    try:
        yield
    finally:
        stream.empty()


def fill_for_good(block: nn.Module) -> None:
    """A block's weights into memory, to stay."""
    stream: BlockWeights | None = vars(block).pop("stream", None)
    if stream is not None:
        stream.fill()
        for hook in stream.hooks:
            hook.remove()


def fill_all(model: PreTrainedModel, shard: bool = False, on_block: Callable[[str], object] = lambda _: None) -> None:
    """All blocks' weights into memory, to stay, one block after the other; shard: each then divided among the processes
    (FSDP2), so that the model may be larger than a device. on_block: called with the name of each block when it is
    filled, before it is divided."""
    blocks = decoder_blocks(model)
    for name, block in model.get_submodule(blocks).named_children():
        fill_for_good(block)
        on_block(f"{blocks}.{name}")
        if shard:
            fully_shard(block, reshard_after_forward=True)


def _fill(block: nn.Module, _) -> None:
    stream: BlockWeights = vars(block)["stream"]
    skipped = "forward" in vars(block)  # another function in its place
    stream.filled_by_call = not skipped and stream.fill()


def _empty(block: nn.Module, *_) -> None:
    stream: BlockWeights = vars(block)["stream"]
    if stream.filled_by_call:
        stream.empty()


def _read(stored: TensorInfo, device: str, dtype: torch.dtype) -> torch.Tensor:
    value = stored.read()
    return value.to(device, dtype if value.is_floating_point() and value.itemsize > 1 else value.dtype)


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
