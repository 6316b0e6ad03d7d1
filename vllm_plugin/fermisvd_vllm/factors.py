"""What the parts of a layer multiply by. No vLLM here: linear.py brings its method for dense layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

MOST_INPUTS = 4096  # inputs; with 6,144 vLLM's packed kernel takes 1.5 times as long as oneDNN's (docs/decisions.md)


class Gemm(Protocol):
    """What a factor asks of vLLM's method for dense layers."""

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class WritingGemm(Gemm, Protocol):
    """One whose operands, x and y, may be columns of something wider."""

    def write(self, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None: ...


class Multiplies(Protocol):
    """A factor: x (..., n) -> x W^T (..., m), or that written into y (tokens, m)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def write(self, x: torch.Tensor, y: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Products:
    """What multiplies in a layer.

    gemm: vLLM's method for dense layers; of_narrow: one for matrices of at most MOST_INPUTS inputs, if there is one;
    uses_own_ops: whether our ops do what they can (fermisvd_vllm.kernels); joins_outputs: whether one of them makes y
    of t for all parts together; measure: finds up to how many tokens an op's kernel is used (fermisvd_vllm.tuning);
    tile: what a rank is filled up to a multiple of, with zeros; any_stride: whether gemm takes rows of x that are not
    side by side; on_cpu: whether layers are computed in an op (fermisvd_vllm.on_cpu), not in a compiled graph;
    grid_factor: makes a factor on a grid (fermisvd_vllm.grid_gemm).
    """

    gemm: Gemm
    of_narrow: WritingGemm | None
    uses_own_ops: bool
    joins_outputs: bool
    measure: Callable[..., None]
    tile: int
    any_stride: bool
    on_cpu: bool
    grid_factor: Callable[..., Any]

    def filled(self, size: int) -> int:
        """The next multiple of the tile."""
        return -(-size // self.tile) * self.tile


class Factor(nn.Module):
    """A matrix (m x n) for vLLM's method for dense layers: x (..., n) -> x weight^T (..., m).

    packed: whether that method may lay it out anew; our ops read a factor as it lies.
    """

    weight: nn.Parameter

    def __init__(self, matrix: torch.Tensor, products: Products, packed: bool):
        super().__init__()
        narrow = products.of_narrow if matrix.shape[1] <= MOST_INPUTS else None
        self.gemm = narrow or products.gemm
        self.any_stride = products.any_stride or narrow is not None
        self.weight = nn.Parameter(matrix, requires_grad=False)
        if matrix.numel() and packed:
            self.gemm.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gemm.apply(self, x if self.any_stride else x.contiguous())

    def write(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x (tokens, n) weight^T, into y (tokens, m), which may be columns of something wider."""
        if isinstance(self.gemm, WritingGemm):
            self.gemm.write(self, x, y)
        else:
            y.copy_(self(x))


def filled_up(matrix: torch.Tensor, rows: int, columns: int, before: bool = False) -> torch.Tensor:
    """The matrix itself, or with zeros below, and right of it or left of it, to that shape."""
    more = columns - matrix.shape[1]
    sides = (more, 0) if before else (0, more)
    return nn.functional.pad(matrix, (*sides, 0, rows - len(matrix))) if matrix.shape != (rows, columns) else matrix
