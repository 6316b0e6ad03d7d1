"""The grids that a factor may be stored on beside the floating-point types, in the words of compressed-tensors.

int8, fp8: a number a byte, and a scale for each output channel, a row; activations are rounded a token at a time when
it serves. int4: eight numbers an int32, and a scale for each group of neighbouring inputs; activations stay as they
are. A factor `M.skeleton` on such a grid has its tensors under the library's names, with the factor's in the place of
`weight`: `M.skeleton` or `M.skeleton_packed` and `M.skeleton_shape`, and `M.skeleton_scale`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Weights = Literal["auto", "int8", "fp8", "int4"]  # auto: no grid, but the model's type
WeightsRule = Literal[Weights, "mixed"]  # mixed: each factor COARSE or FINE, as fermisvd.bits chooses
COARSE: Weights = "int4"
FINE: Weights = "int8"
SCALE, PACKED, SHAPE = "_scale", "_packed", "_shape"
PER_INT32 = 8  # numbers of 4 bits
GROUP_SIZES = (128, 64, 32)  # inputs that share a scale: the first that divides the width, else the last


@dataclass(frozen=True)
class Scheme:
    """A grid: the numbers from `least` to `largest` that `code` holds, times a scale.

    format: compressed-tensors' name of how it is stored; group_size: neighbouring inputs that share a scale, None where
    all of an output channel do; step: what ranks are multiples of where kernels like it.
    """

    name: str
    format: str
    least: float
    largest: float
    code: torch.dtype
    group_size: int | None
    step: int

    @property
    def packed(self) -> bool:
        """Whether numbers of less than a byte share an int32."""
        return self.group_size is not None

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The grid's numbers nearest to values in units of the scale, in the values' type."""
        inside = values.clamp(self.least, self.largest)
        return inside.to(self.code).to(values) if self.code.is_floating_point else inside.round()

    def groups(self, columns: int) -> int:
        """Scales of an output channel."""
        return math.ceil(columns / self.group_size) if self.group_size else 1

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """scales (m x groups) -> one for each entry of a row, (m x columns), or (m x 1) where they share it."""
        return scales.repeat_interleave(self.group_size, dim=1)[:, :columns] if self.group_size else scales

    def shapes(self, factor: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors of a factor (rows x columns)."""
        scales = {f"{factor}{SCALE}": (rows, self.groups(columns))}
        if not self.packed:
            return {factor: (rows, columns)} | scales
        return {f"{factor}{PACKED}": (rows, math.ceil(columns / PER_INT32)), f"{factor}{SHAPE}": (2,)} | scales

    def type_of(self, tensor: str) -> torch.dtype | None:
        """Of one of these tensors, by its name; None for a scale's, which is any floating-point type."""
        if tensor.endswith(SCALE):
            return None
        return torch.int64 if tensor.endswith(SHAPE) else torch.int32 if tensor.endswith(PACKED) else self.code

    def described(self) -> dict[str, Any]:
        """It in compressed-tensors' words (QuantizationScheme), JSON-able."""
        numbers = {"num_bits": 4 if self.packed else 8, "type": "float" if self.code.is_floating_point else "int"}
        shared = {"strategy": "group", "group_size": self.group_size} if self.packed else {"strategy": "channel"}
        described: dict[str, Any] = {"targets": ["Linear"], "weights": {**numbers, "symmetric": True, **shared}}
        if not self.packed:
            described["input_activations"] = {**numbers, "symmetric": True, "strategy": "token", "dynamic": True}
        return described | {"format": self.format}


INT8 = Scheme("int8", "int-quantized", -127, 127, torch.int8, None, 16)
FP8 = Scheme("fp8", "float-quantized", -448, 448, torch.float8_e4m3fn, None, 16)
INT4 = [Scheme(f"int4_group{size}", "pack-quantized", -8, 7, torch.int8, size, 32) for size in GROUP_SIZES]
SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (INT8, FP8, *INT4)}


def scheme_for(weights: Weights, columns: int) -> Scheme | None:
    """The grid of a factor with so many inputs; None for `auto`."""
    if weights != "int4":
        return {"auto": None, "int8": INT8, "fp8": FP8}[weights]
    return next((scheme for scheme in INT4 if scheme.group_size and columns % scheme.group_size == 0), INT4[-1])


def stored(scheme: Scheme, factor: str, codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a factor by name. codes: numbers of the grid, (m x n); scales: (m x groups)."""
    scale = {f"{factor}{SCALE}": scales}
    if not scheme.packed:
        return {factor: codes.to(scheme.code)} | scale
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {f"{factor}{PACKED}": pack_to_int32(codes.to(torch.int8), 4), f"{factor}{SHAPE}": shape} | scale


def codes_of(scheme: Scheme, factor: str, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """Numbers of the grid, (m x columns), of what `stored` gave."""
    if not scheme.packed:
        return tensors[factor]
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed = tensors[f"{factor}{PACKED}"]
    return unpack_from_int32(packed, 4, torch.Size((len(packed), columns)))


def dequantised(scheme: Scheme, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The factor (m x n) that codes (m x n) and scales (m x groups) stand for, in the scales' type."""
    return codes.to(scales) * scheme.spread(scales, codes.shape[1])
