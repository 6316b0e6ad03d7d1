"""Factors on grids, each multiplied by the kernel that vLLM itself would choose for it on this device.

A kernel keeps what it makes of its weights, so there is one for each factor. Where there is none, a FormatError says
what to do instead. What vLLM's kernels ask of their layer differs between schemes; where it does between releases, from
0.26 to 0.32, fermisvd_vllm.versions says so.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import (
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from fermisvd.errors import FormatError
from fermisvd.schemes import PER_INT32, Scheme
from fermisvd_vllm.versions import int4_options, keep_onednn, run_eagerly

INT4_TILE = 32  # rows and columns of an int4 factor come in multiples of it
FP8_TILE = 16  # and columns of an fp8 factor on a GPU, of which one kernel reads four at a time


def grid_factor(scheme: Scheme, numbers: torch.Tensor, scales: torch.Tensor, width: int) -> "GridFactor":
    """A factor (m x width) for x (tokens, width). numbers: as stored, packed or not; scales: (m x groups), in the type
    of x. Raises FormatError if vLLM has no kernel for it here."""
    make = Int4Factor if scheme.packed else Fp8Factor if scheme.code.is_floating_point else Int8Factor
    try:
        return make(scheme, numbers, scales, width)
    except (ValueError, NotImplementedError) as error:
        kind = f"{scheme.name} with {str(scales.dtype).removeprefix('torch.')} on {scales.device.type}"
        raise FormatError(
            f"vLLM has no kernel for {kind}: {str(error).splitlines()[-1].strip()}; serve it on another device or with "
            "another --dtype, or convert with --weights int8 or auto"
        ) from None


class GridFactor(nn.Module):
    """x (tokens, n) -> x W^T (tokens, m), W on a grid. A kernel's own names for numbers and scales are those of
    compressed-tensors."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.rows, self.width, self.filled = rows, width, width
        self.bias = self.input_scale = None  # which kernels ask for
        self.logical_widths = [rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def filled_up(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, n), contiguous, with zeros to the width that the kernel takes."""
        more = self.filled - self.width
        return nn.functional.pad(x, (0, more)) if more else x.contiguous()

    def write(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The same into y (tokens, m), which may be columns of something wider."""
        y.copy_(self(x))

    def take_over(self, other: "GridFactor") -> None:
        """The weights of another factor of the same shape, into the storage of this one, which captured graphs read."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data)


class Int8Factor(GridFactor):
    """W8A8: x is rounded to int8 a token at a time."""

    def __init__(self, scheme: Scheme, numbers: torch.Tensor, scales: torch.Tensor, width: int):
        super().__init__(len(numbers), width)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.weight_scale = nn.Parameter(scales.float(), requires_grad=False)
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="fermisvd"
        )
        if numbers.device.type == "cpu" and scales.dtype == torch.float32:
            keep_onednn(self.kernel, self)
        else:
            self.kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply_weights(self, x.contiguous(), None)


class Fp8Factor(GridFactor):
    """W8A8 in e4m3: x is rounded a token at a time."""

    def __init__(self, scheme: Scheme, numbers: torch.Tensor, scales: torch.Tensor, width: int):
        super().__init__(len(numbers), width)
        self.filled = width if numbers.device.type == "cpu" else -(-width // FP8_TILE) * FP8_TILE
        if self.filled > width:
            numbers = nn.functional.pad(numbers.view(torch.uint8), (0, self.filled - width)).view(numbers.dtype)
        self.output_size_per_partition, self.input_size_per_partition = len(numbers), self.filled  # for Marlin
        self.orig_dtype = scales.dtype
        self.kernel = init_fp8_linear_kernel(
            activation_quant_key=kFp8DynamicTokenSym,
            weight_quant_key=kFp8StaticChannelSym,
            input_dtype=scales.dtype,
            out_dtype=scales.dtype,
            weight_shape=(len(numbers), self.filled),
            module_name="fermisvd",
        )
        self.weight = nn.Parameter(numbers.t(), requires_grad=False)
        self.weight_scale = nn.Parameter(scales.float(), requires_grad=False)
        self.kernel.process_weights_after_loading(self)
        if numbers.device.type == "cpu":
            run_eagerly(self.kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply_weights(self, self.filled_up(x), None)


class Int4Factor(GridFactor):
    """W4A16: filled up to whole tiles with numbers that meet zeros, or make outputs that are cut off."""

    def __init__(self, scheme: Scheme, numbers: torch.Tensor, scales: torch.Tensor, width: int):
        super().__init__(len(numbers), width)
        if scales.device.type == "cpu" and scales.dtype == torch.float32:
            raise ValueError("its kernel for int4 takes bfloat16 and float16")
        assert scheme.group_size is not None
        rows = -(-self.rows // INT4_TILE) * INT4_TILE
        self.filled = scheme.groups(width) * scheme.group_size
        packed = nn.functional.pad(numbers, (0, self.filled // PER_INT32 - numbers.shape[1], 0, rows - self.rows))
        scales = nn.functional.pad(scales, (0, 0, 0, rows - self.rows), value=1.0)
        self.weight_packed = PackedvLLMParameter(
            data=packed,
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=PER_INT32,
            weight_loader=_loaded_already,
        )
        self.weight_scale = GroupQuantScaleParameter(
            data=scales, input_dim=1, output_dim=0, weight_loader=_loaded_already
        )
        more: dict[str, Any] = int4_options(MPLinearLayerConfig)
        config = MPLinearLayerConfig(
            full_weight_shape=(self.filled, rows),
            partition_weight_shape=(self.filled, rows),
            weight_type=scalar_types.uint4b8,
            act_type=scales.dtype,
            group_size=scheme.group_size,
            zero_points=False,
            **more,
        )
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        self.kernel = choose_mp_linear_kernel(config)(
            config, w_q_param_name=names[0], w_s_param_name=names[1], w_zp_param_name=names[2]
        )
        self.kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply_weights(self, self.filled_up(x), None)[..., : self.rows]


def _loaded_already(*_: object) -> None:
    """What vLLM's parameters ask for."""
