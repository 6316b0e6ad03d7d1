"""Reference torch modules of the forms: short and plain, the ground truth for the serving kernels."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, MATRIX, PERMUTATION, SKELETON, Group
from fermisvd.linear import Linear, weight_of
from fermisvd.schemes import SCALE, SCHEMES, SHAPE, codes_of, dequantised

NO_WEIGHT = (
    "a compressed layer has factors, and no weight to read or change; an adapter is not merged into factors, but kept "
    "beside them: PeftModel.from_pretrained, or vllm serve OUT --enable-lora"
)


class Weight:
    """What may be asked of the weight of a layer that has factors instead: shape (m, n), type, device; no values.

    That is what peft asks before it puts an adapter beside a linear layer. Whatever reads or writes values, as merging
    an adapter does, gets an AttributeError that says what to do.
    """

    _is_hf_initialized = True  # GPT-2's _init_weights reaches for its children's weights while a checkpoint loads

    def __init__(self, layer: "CompressedLinear"):
        self._layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self._layer.out_features, self._layer.in_features])

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer computes in: of its factors, or of their scales."""
        return self._computed_in.dtype

    @property
    def device(self) -> torch.device:
        return self._computed_in.device

    @property
    def _computed_in(self) -> nn.Parameter:
        return next(p for p in self._layer.parameters(recurse=False) if p.is_floating_point() and p.itemsize > 1)

    def __getattr__(self, name: str):
        raise AttributeError(f"weight.{name}: {NO_WEIGHT}")


class CompressedLinear(nn.Linear):
    """Base of the layers: y = t, the group's shared part of x, seen through this member's rows.

    A linear layer to whatever looks for those, as peft does; but `weight` has no values.
    `first` is the group's first member, which holds the shared tensors; kept in a tuple, so that torch does not
    register them a second time. A forward touches its own parameters alone: a further member gets t by calling
    `first`, since wrappers (accelerate's offloading, FSDP2, DeepSpeed) bring a layer's parameters for its call only.
    schemes: the grid of each factor, by names, if they lie on any.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        first: "CompressedLinear | None" = None,
        schemes: Mapping[str, str] | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's makes a dense weight
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._first = () if first is None else (first,)
        self.schemes = {factor: SCHEMES[name] for factor, name in (schemes or {}).items()}
        self.widths: dict[str, int] = {}  # inputs of the factors that this layer holds
        self.bias = _parameter(out_features) if bias else None

    @property
    def weight(self) -> Weight:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Weight(self)

    @weight.setter
    def weight(self, value: Weight) -> None:
        """Nothing to do: peft puts back what it read when it takes its adapters away. AttributeError for values."""
        if not isinstance(value, Weight):
            raise AttributeError(f"weight: {NO_WEIGHT}")

    def add_factor(self, factor: str, rows: int, columns: int) -> None:
        """Room for the tensors of a factor (rows x columns), as they are stored."""
        self.widths[factor] = columns
        if factor not in self.schemes:
            setattr(self, factor, _parameter(rows, columns))
            return
        scheme = self.schemes[factor]
        for name, shape in scheme.shapes(factor, rows, columns).items():
            value = torch.ones(shape, dtype=scheme.type_of(name))  # of packed numbers any will do
            if name.endswith(SHAPE):
                value = torch.tensor([rows, columns], device=value.device)
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def factor(self, name: str) -> torch.Tensor:
        """A factor (rows x columns), to multiply by; of a grid's numbers and scales what they stand for."""
        if name not in self.schemes:
            return getattr(self, name)
        scheme, tensors = self.schemes[name], dict(self.named_parameters(recurse=False))
        return dequantised(scheme, codes_of(scheme, name, tensors, self.widths[name]), tensors[f"{name}{SCALE}"])

    @property
    def first(self) -> "CompressedLinear":
        return self._first[0] if self._first else self

    def forward(self, x: torch.Tensor, shared_only: bool = False) -> torch.Tensor:
        """x: (..., n) -> (..., m); of a group's first member, with `shared_only`, t: (..., r)."""
        # .to: a device_map may split a group
        t = self.shared(x) if self.first is self else self.first(x, shared_only=True).to(x.device)
        return t if shared_only else self.outputs(t)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """t of x, on the device of the shared tensors."""
        raise NotImplementedError

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        """y of t."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """svd form: y = (x B^T) A^T. x: (..., n); B: (r, n), shared; A: (m, r)."""

    def __init__(self, in_features, out_features, rank, bias=False, first=None, schemes=None):
        super().__init__(in_features, out_features, rank, bias, first, schemes)
        self.add_factor(LOWRANK_A, out_features, rank)
        if first is None:
            self.add_factor(LOWRANK_B, rank, in_features)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        b = self.factor(LOWRANK_B)
        return functional.linear(x.to(b.device), b)

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        return functional.linear(t, self.factor(LOWRANK_A), self.bias)


class PivGaColumnsLinear(CompressedLinear):
    """pivga form, columns: t = x[skel] + x[rest] D^T; y = t C_skel^T. D: (r, n-r) and P shared; C_skel: (m, r)."""

    permutation: torch.Tensor

    def __init__(self, in_features, out_features, rank, bias=False, first=None, schemes=None):
        super().__init__(in_features, out_features, rank, bias, first, schemes)
        self.add_factor(SKELETON, out_features, rank)
        if first is None:
            self.add_factor(INTERPOLATION, rank, in_features - rank)
            self.register_buffer(PERMUTATION, torch.arange(in_features, dtype=torch.int32))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        d = self.factor(INTERPOLATION)
        permuted = gather(x.to(d.device), self.permutation)
        kept, rest = permuted[..., : self.rank], permuted[..., self.rank :]
        return kept + functional.linear(rest, d)

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        return functional.linear(t, self.factor(SKELETON), self.bias)


class PivGaRowsLinear(CompressedLinear):
    """pivga form, rows: z = x R_skel^T; y = P [z ; z D^T]. R_skel: (r, n); D: (m-r, r)."""

    permutation: torch.Tensor

    def __init__(self, in_features, out_features, rank, bias=False, first=None, schemes=None):
        super().__init__(in_features, out_features, rank, bias, first, schemes)
        self.add_factor(SKELETON, rank, in_features)
        self.add_factor(INTERPOLATION, out_features - rank, rank)
        self.register_buffer(PERMUTATION, torch.arange(out_features, dtype=torch.int32))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.factor(SKELETON))

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        y = torch.cat([t, functional.linear(t, self.factor(INTERPOLATION))], dim=-1)
        y = gather(y, torch.argsort(self.permutation))
        return y if self.bias is None else y + self.bias


class DenseGridLinear(CompressedLinear):
    """dense form: y = x W^T, W: (m, n) on a grid. Nothing is shared: t is x."""

    def __init__(self, in_features, out_features, rank, bias=False, first=None, schemes=None):
        super().__init__(in_features, out_features, rank, bias, first, schemes)
        self.add_factor(MATRIX, out_features, in_features)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        return functional.linear(t, self.factor(MATRIX), self.bias)


class _Gather(torch.autograd.Function):
    """The gradient of a permutation is gathered too: that of an index adds one by one, as if there were repetitions."""

    @staticmethod
    def forward(ctx, x, permutation):
        ctx.save_for_backward(permutation)
        return _permuted(x, permutation)

    @staticmethod
    def backward(ctx, gradient):
        return _permuted(gradient, torch.argsort(ctx.saved_tensors[0])), None


def gather(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """x (..., n) with its last axis in the order of the permutation (n,)."""
    return _Gather.apply(x, permutation) if x.requires_grad else _permuted(x, permutation)


def _permuted(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """On a CPU torch's gather is twice as fast as its index along the last axis."""
    return x.gather(-1, permutation.expand(x.shape)) if x.is_cpu else x[..., permutation]


def module_class(group: Group) -> type[CompressedLinear]:
    """The layer class of a group's form and side."""
    if group.form != "pivga":
        return LowRankLinear if group.form == "svd" else DenseGridLinear
    return PivGaRowsLinear if group.side == "rows" else PivGaColumnsLinear


def replace_group(model: nn.Module, group: Group) -> None:
    """Replace the members' linear layers by empty compressed layers, on their device and in their type.

    Raises KeyError naming a member that the model does not have as a linear layer.
    """
    first = None
    for name in group.members:
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            dense = None
        if not isinstance(dense, Linear):
            raise KeyError(f"group {group.name}: the model has no linear layer {name}")
        with dense.weight.device:
            rows, columns = weight_of(dense).shape
            layer = module_class(group)(columns, rows, group.rank, dense.bias is not None, first, group.schemes)
        model.set_submodule(name, in_type(layer, dense.weight.dtype))
        first = first or layer


def in_type(layer: CompressedLinear, dtype: torch.dtype) -> CompressedLinear:
    """The layer, its floating-point parameters but a grid's numbers in `dtype`."""
    for parameter in layer.parameters(recurse=False):
        if parameter.is_floating_point() and parameter.dtype != torch.float8_e4m3fn:
            parameter.data = parameter.data.to(dtype)
    return layer


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)
