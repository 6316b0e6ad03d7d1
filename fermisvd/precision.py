"""The type that a model's passes are computed in."""

from typing import Literal, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
Compute = Literal["auto", "float32", "bfloat16"]


def compute_type(compute: Compute, device: torch.device | str) -> torch.dtype:
    """auto: bfloat16 where the device multiplies it several times as fast (GPUs from Ampere on, CPUs with AMX), else
    float32."""
    if compute != "auto":
        return torch.float32 if compute == "float32" else torch.bfloat16
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def with_parameters_in(model: M, dtype: torch.dtype) -> M:
    """The model, its parameters cast in place; buffers, such as rotary frequencies, stay as exact as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
