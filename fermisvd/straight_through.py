"""Training through a grid: what is stored is rounded in every forward pass, and gradients pass the rounding by.

A factor's numbers and scales become two float32 parameters, w and s, and the layer multiplies by s round(w / s). The
gradient of w is that of the product where w is inside the grid, that of s what the rounding leaves of it (straight
through, arXiv 1308.3432; trained scales, arXiv 1902.08153). s is rounded to the type it is stored in, so that what was
trained is what is written.
"""

from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fermisvd.modules import CompressedLinear
from fermisvd.rounding import smallest
from fermisvd.schemes import SCALE, Scheme, codes_of, stored

SMALLEST = 1e-15  # a trained scale stays above it, or what its type holds: its square is a number of float32
RATE = "relative_rate"  # what parameters here carry: their learning rate over a floating-point factor's
# By bits of a number (docs/decisions.md): where there are few, the next number is far
RATES = {8: 1.0, 4: 4.0}
SCALES_RATE = 0.1  # of their numbers': all that share a scale move with it


class OnGrid(nn.Module):
    """w (m x n) -> its nearest point on a grid, in the type that the layer multiplies in.

    scale: s (m x groups), trained; stored: its type in a checkpoint.
    """

    def __init__(self, scheme: Scheme, scale: torch.Tensor, stored: torch.dtype, product: torch.dtype):
        super().__init__()
        self.scheme, self.stored, self.product = scheme, stored, product
        self.scale = nn.Parameter(scale.float(), requires_grad=False)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        steps = self.scheme.spread(_passed_by(self.scale, self.stored_scale()), w.shape[1])
        inside = (w / steps).clamp(self.scheme.least, self.scheme.largest)
        return (_passed_by(inside, self.scheme.nearest(inside.detach())) * steps).to(self.product)

    def stored_scale(self) -> torch.Tensor:
        """s as a checkpoint has it, in float32."""
        least = max(SMALLEST, smallest(self.stored))
        return self.scale.detach().clamp(min=least).to(self.stored).float()

    def codes(self, w: torch.Tensor) -> torch.Tensor:
        """The grid's numbers, (m x n)."""
        return self.scheme.nearest(w / self.scheme.spread(self.stored_scale(), w.shape[1]))


def _passed_by(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of `rounded`, with the gradient of x."""
    return rounded + (x - x.detach())  # exactly `rounded`: the other order would round the sum


def open_grids(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Put trainable parameters in the place of all factors that lie on grids; gives them by name.

    dtype: of scales in the checkpoint. The layers multiply in the type that scales have in the model, which is that of
    its passes.
    """
    for layer in model.modules():
        if isinstance(layer, CompressedLinear):
            for factor in sorted(layer.schemes.keys() & layer.widths.keys()):
                _open(layer, factor, dtype)
    return {
        name: parameter
        for prefix, layer in model.named_modules()
        if isinstance(layer, CompressedLinear) and parametrize.is_parametrized(layer)
        for name, parameter in layer.named_parameters(prefix)
        if ".parametrizations." in name
    }


def _open(layer: CompressedLinear, factor: str, dtype: torch.dtype) -> None:
    scheme, tensors = layer.schemes.pop(factor), dict(layer.named_parameters(recurse=False))
    scale = tensors[f"{factor}{SCALE}"].data
    codes = codes_of(scheme, factor, tensors, layer.widths[factor])
    for name in scheme.shapes(factor, *codes.shape):
        delattr(layer, name)
    grid = OnGrid(scheme, scale, dtype, scale.dtype)
    values = codes.float() * scheme.spread(grid.stored_scale(), codes.shape[1])
    setattr(layer, factor, nn.Parameter(values, requires_grad=False))
    parametrize.register_parametrization(layer, factor, grid, unsafe=True)  # its output may have another type
    rate = RATES[4 if scheme.packed else 8]
    vars(layer.get_parameter(f"parametrizations.{factor}.original"))[RATE] = rate
    vars(grid.scale)[RATE] = rate * SCALES_RATE


def grid_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of all factors that `open_grids` opened, by name, as a checkpoint stores them."""
    tensors = {}
    for prefix, layer in model.named_modules():
        if not isinstance(layer, CompressedLinear) or not parametrize.is_parametrized(layer):
            continue
        for factor, found in cast(nn.ModuleDict, layer.parametrizations).items():
            found = cast(parametrize.ParametrizationList, found)
            grid, w = cast(OnGrid, found[0]), cast(torch.Tensor, found.original)
            own = stored(grid.scheme, factor, grid.codes(w.detach()), grid.stored_scale().to(grid.stored))
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in own.items()}
    return tensors
