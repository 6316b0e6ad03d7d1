"""A CPU's products in bfloat16 by vLLM's packed kernel, which is made once for any number of tokens.

oneDNN, which vLLM takes for most layers, makes a kernel for each pair of shape and number of tokens when it first comes
up: about a millisecond, and a MiB that is kept. A dense model has few shapes, a compressed one has two for each group,
and a server's number of tokens changes all the time (benchmarks/NOTES.md, 2026-11-27).
"""

from typing import cast

import torch
from torch import nn

from fermisvd.precision import multiplies_bfloat16
from fermisvd_vllm.versions import has_packed_product

TILE = 32  # inputs of a packed matrix come in multiples of it
OUTPUTS_TILE = 16  # and its outputs in multiples of this


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel runs there. vLLM itself asks for AMX; that of AVX-512 is as fast as oneDNN's."""
    return device.type == "cpu" and dtype == torch.bfloat16 and multiplies_bfloat16() and has_packed_product()


class PackedMethod:
    """A linear method, as vLLM's for dense layers, of matrices (m x n), m and n in whole tiles."""

    def __init__(self):
        self.kernel = torch.ops._C.weight_packed_linear.default

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(torch.ops._C.convert_weight_packed(layer.weight), requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), len(cast(torch.Tensor, layer.weight)))
        self.write(layer, x, y)
        return y

    def write(self, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        """x (tokens, n) weight^T into y (tokens, m), which may both be columns of something wider."""
        if len(x):  # it divides by their number
            self.kernel(y, x, layer.weight, None, True)
