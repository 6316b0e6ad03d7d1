"""The types that a model's passes and products are computed in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

M = TypeVar("M", bound=nn.Module)
Compute = Literal["auto", "float32", "bfloat16"]
NARROW = 128  # channels; fewer gain nothing by bfloat16 on a CPU (docs/decisions.md)


def compute_type(compute: Compute, device: torch.device | str, width: int) -> torch.dtype:
    """auto: bfloat16 where the device is faster at it (GPUs from Ampere on, CPUs with instructions for it and models
    that are not narrow), else float32. width: of the model's hidden states."""
    if compute != "auto":
        return torch.float32 if compute == "float32" else torch.bfloat16
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = width >= NARROW and multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers: AMX, or those of AVX-512."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def width_of(config: PretrainedConfig) -> int:
    """Channels of a model's hidden states; NARROW where its config, which may be code of its own, does not say."""
    return getattr(config.get_text_config(), "hidden_size", None) or NARROW


def with_parameters_in(model: M, dtype: torch.dtype) -> M:
    """The model, its parameters cast in place; buffers, such as rotary frequencies, stay as exact as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:  # a grid's numbers stay on it
            parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def bfloat16_products(allowed: bool) -> Iterator[None]:
    """Where that is allowed, products of float32 matrices on a CPU with AMX take them as bfloat16 and add up in
    float32, which is several times as fast: for numbers that are bfloat16, which it does not change. The setting is the
    process's, so no other thread may multiply meanwhile."""
    if not (allowed and torch.cpu._is_amx_tile_supported()):
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]: the module makes it
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
