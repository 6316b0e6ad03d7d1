"""What the parts of a layer multiply by. No vLLM here: linear.py brings its method for dense layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


class Gemm(Protocol):
    """What a factor asks of vLLM's method for dense layers."""

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Products:
    """What multiplies in a layer.

    gemm: vLLM's method for dense layers; uses_own_ops: whether our ops do what they can (fermisvd_vllm.kernels);
    joins_outputs: whether one of them makes y of t for all parts together; measure: finds up to how many tokens an op's
    kernel is used (fermisvd_vllm.tuning).
    """

    gemm: Gemm
    uses_own_ops: bool
    joins_outputs: bool
    measure: Callable[..., None]


class Factor(nn.Module):
    """A matrix (m x n) for vLLM's method for dense layers: x (..., n) -> x weight^T (..., m).

    packed: whether that method may lay it out anew; our ops read a factor as it lies.
    """

    weight: nn.Parameter

    def __init__(self, matrix: torch.Tensor, products: Products, packed: bool):
        super().__init__()
        self.gemm = products.gemm
        # CUDA's products take rows of any stride; what a CPU's or ROCm's may be made of does not always
        self.any_stride = products.uses_own_ops and torch.version.hip is None
        self.weight = nn.Parameter(matrix, requires_grad=False)
        if matrix.numel() and packed:
            self.gemm.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gemm.apply(self, x if self.any_stride else x.contiguous())
