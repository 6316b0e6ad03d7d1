"""A baseline of `real`: the linear weights of the decoder blocks are rounded to the nearest of 8 or 4 bits.

Symmetric: a weight is a whole number times the scale of its output channel (8 bits) or of its group of neighbours in an
output channel (4 bits). Nothing is calibrated. The weights stay in their type; what they would take is counted.
"""

import torch
from torch import nn

from benchmarks.quality.pruning import linear_weights

GROUPS = (128, 64, 32)  # inputs that share a scale at 4 bits: the first that divides the width
SCALE = torch.bfloat16


def round_linear(model: nn.Module, bits: int) -> int:
    """Round the linear weights in place; gives the bytes that these take, their scales included."""
    size = 0
    with torch.no_grad():
        for weight in linear_weights(model).values():
            group = weight.shape[1] if bits == 8 else group_size(weight.shape[1])
            numbers, scales = rounded(weight, bits, group)
            weight.copy_((numbers * scales.to(weight.dtype)).view_as(weight))
            size += weight.numel() * bits // 8 + scales.numel() * scales.itemsize
    return size


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (m, n / group, group) in the weight's type and their scales (m, n / group, 1), whose products are
    nearest to the weight (m x n): -127 to 127 at 8 bits, -7 to 7 at 4."""
    most = 2 ** (bits - 1) - 1
    parts = weight.unflatten(1, (-1, group))
    scales = (parts.abs().amax(-1, keepdim=True) / most).to(SCALE)
    steps = scales.to(weight.dtype).masked_fill(scales == 0, 1.0)  # a row of zeros
    return (parts / steps).round().clamp(-most, most), scales


def group_size(columns: int) -> int:
    """Raises ValueError where no size divides the width."""
    for size in GROUPS:
        if columns % size == 0:
            return size
    raise ValueError(f"{columns} inputs are no multiple of {GROUPS[-1]}")
