"""The linear method of a compressed layer: loads, checks and multiplies its factors.

Each tensor name of the checkpoint is one flat parameter while loading, since members and groups of a fused layer differ
in shape. After loading the factors are cut out of it, as views, and vLLM's own dense GEMM dispatch runs each of them.
"""

import os
from collections.abc import Callable

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from fermisvd.format import (
    INTERPOLATION,
    LOWRANK_A,
    LOWRANK_B,
    PERMUTATION,
    SKELETON,
    FormatError,
    Group,
    check_finite,
    check_permutation,
)
from fermisvd_vllm.layout import WEIGHT, Part, Slot, shard_of, slots_of
from fermisvd_vllm.tuning import BUCKETS, measure
from fermisvd_vllm.versions import LORA_DEVICE_NAME, member_of

SECOND = {"svd": LOWRANK_A, "pivga": SKELETON}  # the factor that t is multiplied by
GPU_DEVICES = {"cuda"}


class FermiSVDLinearMethod(LinearMethodBase):
    """One instance a layer: it carries the layer's parts. Names of members and layer are for error messages.

    check_model: called before a tensor is taken and before a layer is finished; on_ready: when this one is finished.
    """

    def __init__(
        self,
        parts: list[Part],
        member_names: list[str],
        layer_name: str,
        check_model: Callable[[], None] = lambda: None,
        on_ready: Callable[["FermiSVDLinearMethod"], None] = lambda _: None,
    ):
        self.check_model, self.on_ready = check_model, on_ready
        self.parts = parts
        self.ranks = {number: part.group.rank for number, part in enumerate(parts) if part.group}
        self.svd = [number for number, part in enumerate(parts) if part.group and part.group.form == "svd"]
        self.columns = [number for number, part in enumerate(parts) if part.group and part.group.side == "columns"]
        self.member_names = member_names
        self.layer_name = layer_name
        self.dense_gemm = UnquantizedLinearMethod()
        self.slots: dict[tuple[str, int], Slot] = {}
        self.filled: set[tuple[str, int]] = set()
        self.kept: dict[str, torch.Tensor] = {}  # what captured graphs read; a reload writes into it
        # --load-format dummy fills nothing through our loaders, and that is right
        self.loads_checkpoint = get_current_vllm_config().load_config.load_format != "dummy"

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Flat parameters, one a tensor name. The permutation starts valid: dummy loading leaves integers alone."""
        kind = (
            "row"
            if isinstance(layer, RowParallelLinear)
            else "replicated"
            if isinstance(layer, ReplicatedLinear)
            else "column"
        )
        self.tp_rank, self.tp_size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        full_rows = _stored_rows(layer, output_size) if kind == "column" else output_partition_sizes
        if len(self.member_names) not in (1, len(output_partition_sizes)):
            raise FormatError(
                f"{self.layer_name}: vLLM splits it in {len(output_partition_sizes)}, the checkpoint stores "
                f"{', '.join(self.member_names)}; this layer is not served yet, convert again without it"
            )
        sections = tuple(zip(full_rows, output_partition_sizes, strict=True))
        # all in one section if the checkpoint has one layer for them, as in Phi-3
        member_sections = [sections] if len(self.member_names) == 1 else [(section,) for section in sections]
        self.member_rows = [sum(local for _, local in member) for member in member_sections]
        self.slots = slots_of(
            self.parts, member_sections, (input_size, input_size_per_partition), kind, self.tp_size, self.layer_name
        )
        self.width = input_size_per_partition
        self.dense_numbers = sum(self.member_rows) * self.width
        for name in dict.fromkeys(name for name, _ in self.slots):
            own = {member: slot for (other, member), slot in self.slots.items() if other == name}
            if name == PERMUTATION:
                data = torch.cat([torch.arange(slot.size, dtype=torch.int32) for slot in own.values()])
            else:
                data = torch.empty(sum(slot.size for slot in own.values()), dtype=params_dtype)
            parameter = nn.Parameter(data, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader(name)})
            if all(slot.shard == 0 for slot in own.values()):
                set_weight_attrs(
                    parameter, {"output_dim": 0}
                )  # Falcon reorders q/k/v rows while loading and asks for it
            layer.register_parameter(name, parameter)

    def _loader(self, name: str) -> Callable:
        """vLLM's weight_loader of one flat parameter."""

        def load_member(
            param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | int | None = None
        ) -> None:
            member = member_of(loaded_weight, loaded_shard_id)
            where = f"{self.layer_name}: {self.member_names[member]}.{name}"
            if (name, member) not in self.slots:
                raise FormatError(f"{where}: not expected there by the config's groups")
            self.check_model()
            slot = self.slots[name, member]
            check_finite(where, loaded_weight)
            if name == PERMUTATION:
                check_permutation(where, loaded_weight)
            piece = shard_of(loaded_weight, slot, self.tp_rank, self.tp_size, where).to(param.dtype)
            check_finite(f"{where} as {param.dtype}", piece)  # --dtype float16 may be too narrow for it
            param.data[slot.offset : slot.offset + slot.size].view(slot.shape).copy_(piece)
            self.filled.add((name, member))

        return load_member

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Cuts the factors out of the flat parameters. Raises FormatError naming every tensor that was never filled.

        A reload comes here again with new flat parameters; the factors then keep their storage.
        """
        self.check_model()
        missing = self.slots.keys() - self.filled
        if missing and self.loads_checkpoint:
            names = ", ".join(f"{self.member_names[member]}.{name}" for name, member in sorted(missing))
            raise FormatError(
                f"{self.layer_name}: missing from the checkpoint: {names}; convert again or copy the shard again"
            )
        self.filled.clear()
        flat = {name: getattr(layer, name).data for name in dict.fromkeys(name for name, _ in self.slots)}
        for name in flat:
            delattr(layer, name)
        if LOWRANK_B in flat:  # the first products of all svd groups are one
            self._register_factor(layer, LOWRANK_B, flat[LOWRANK_B].view(-1, self.width))
        on_gpu = self.on_gpu(next(iter(flat.values())).device)
        for number, part in enumerate(self.parts):
            for name, matrix in self._matrices(part, flat).items():
                if name == PERMUTATION:
                    self._register_permutation(layer, number, part.group, matrix)
                    continue
                # our ops read D as it lies, vLLM's GEMMs may lay it out anew
                as_it_lies = on_gpu and ((number in self.columns and name == INTERPOLATION) or self._by_outputs(name))
                self._register_factor(layer, f"{name}_{number}", matrix, prepare=not as_it_lies)
        if on_gpu:
            self._measure(layer)
        layer.register_buffer(LORA_DEVICE_NAME, next(iter(flat.values())).new_empty(0), persistent=False)
        self.on_ready(self)

    def on_gpu(self, device: torch.device) -> bool:
        """Whether our ops run, which take another kernel for few tokens: not where vLLM is to give the same for any."""
        return device.type in GPU_DEVICES and os.environ.get("VLLM_BATCH_INVARIANT", "0") in ("", "0")

    def _by_outputs(self, name: str) -> bool:
        """Whether the `outputs` op multiplies by the factor of that name: in a layer of several parts."""
        rows = any(part.group and part.group.side == "rows" for part in self.parts)
        return len(self.parts) > 1 and not rows and name in (LOWRANK_A, SKELETON, WEIGHT)

    def _measure(self, layer: nn.Module) -> None:
        """Up to how many tokens the kernels that this layer may use are to be used."""
        from fermisvd_vllm import kernels

        def like(width: int, weights: list[torch.Tensor]) -> list[torch.Tensor]:
            return [each.new_empty(BUCKETS[-1], width or each.shape[1]).normal_(std=0.1) for each in weights]

        d = [self._weight(layer, f"{INTERPOLATION}_{number}") for number in self.columns]
        if d and min(each.numel() for each in d):
            measure("columns", kernels.columns_kernel, kernels.columns_reference, like(self.width, d), d)
        if a := self._second_factors(layer):
            measure("outputs", kernels.outputs_kernel, kernels.outputs_reference, like(0, a), a, *self._members())

    def _second_factors(self, layer: nn.Module) -> list[torch.Tensor]:
        """What `outputs` multiplies each part's t by, or a dense part's x: (m, r) or (m, n); none if it is not used."""
        if not self._by_outputs(WEIGHT):
            return []
        names = [SECOND[part.group.form] if part.group else WEIGHT for part in self.parts]
        return [self._weight(layer, f"{name}_{number}") for number, name in enumerate(names)]

    def _members(self) -> tuple[list[int], list[int], list[int]]:
        """Of each member, in the layer's order: its part, and where its rows begin in that part's, and their number."""
        found = {}
        for number, part in enumerate(self.parts):
            start = 0
            for member in part.members:
                found[member] = number, start, self.member_rows[member]
                start += self.member_rows[member]
        parts, starts, sizes = zip(*(found[member] for member in sorted(found)), strict=True)
        return list(parts), list(starts), list(sizes)

    def _matrices(self, part: Part, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part's own tensors, members stacked by rows, as views of the flat parameters."""
        matrices = {}
        for name in flat.keys() - {LOWRANK_B}:
            own = [self.slots[name, member] for member in part.members if (name, member) in self.slots]
            if own:
                start, size = own[0].offset, sum(slot.size for slot in own)
                shape = (sum(slot.shape[0] for slot in own), *own[0].shape[1:])
                matrices[name] = flat[name][start : start + size].view(shape)
        return matrices

    def _register_factor(self, layer: nn.Module, name: str, matrix: torch.Tensor, prepare: bool = True) -> None:
        """A submodule that vLLM's dense method can prepack and multiply."""
        factor = nn.Module()
        factor.register_parameter("weight", nn.Parameter(matrix, requires_grad=False))
        layer.register_module(f"{name}_factor", factor)
        if matrix.numel() and prepare:
            self.dense_gemm.process_weights_after_loading(factor)
        old = self.kept.setdefault(name, factor.weight)
        if old is not factor.weight:
            old.data.copy_(factor.weight)
            factor.weight = old

    def _register_permutation(self, layer: nn.Module, number: int, group: Group, permutation: torch.Tensor) -> None:
        """columns: of each input its place in [x[skel] | x[rest]]; rows: of each of [z | z D^T] its output, or where
        that is loaded, of each output its place."""
        # persistent: a reload of vLLM's copies no other buffers back into the storage that captured graphs read
        if group.side == "rows" and not self.on_gpu(permutation.device):
            layer.register_buffer(f"{PERMUTATION}_{number}", permutation.long())
        else:
            layer.register_buffer(f"places_{number}", torch.argsort(permutation.long()))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., n) -> (..., m), this rank's share. Nothing here depends on data, so it traces and captures."""
        t = self._first_products(layer, x)
        if self.on_gpu(x.device) and (a := self._second_factors(layer)):
            inner = [t.get(number, x) for number in range(len(self.parts))]
            y = torch.ops.fermisvd.outputs(inner, a, *self._members())
            return y if bias is None else y + bias
        outputs = []
        for number, part in enumerate(self.parts):
            if part.group is None:
                outputs.append(self._multiply(layer, f"{WEIGHT}_{number}", x))
            elif part.group.side == "rows":
                outputs.append(self._pivga_rows(layer, number, x))
            else:
                outputs.append(self._multiply(layer, f"{SECOND[part.group.form]}_{number}", t[number]))
        y = outputs[0] if len(outputs) == 1 else self._in_member_order(outputs)
        return y if bias is None else y + bias

    def _first_products(self, layer: nn.Module, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Part -> t, (..., r): x B^T of the svd ones, in one product, and x[skel] + x[rest] D^T of the columns ones."""
        t = {}
        if self.svd:
            ranks = [self.ranks[number] for number in self.svd]
            t |= dict(zip(self.svd, self._multiply(layer, LOWRANK_B, x).split(ranks, dim=-1), strict=True))
        s = {}  # [x[skel] | x[rest]]
        for number in self.columns:
            s[number] = torch.empty_like(x, memory_format=torch.contiguous_format)
            put(s[number], getattr(layer, f"places_{number}"), x)
        on_gpu = self.on_gpu(x.device)
        if self.columns and on_gpu:
            d = [self._weight(layer, f"{INTERPOLATION}_{number}") for number in self.columns]
            torch.ops.fermisvd.columns(list(s.values()), d)
        for number in self.columns:
            rank = self.ranks[number]
            t[number] = s[number][..., :rank]
            if rank < self.width and not on_gpu:  # vLLM's CPU product has nothing to accumulate into
                t[number] = t[number] + self._multiply(layer, f"{INTERPOLATION}_{number}", s[number][..., rank:])
        return t

    def _pivga_rows(self, layer: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
        """z = x R_skel^T; y = P [z ; z D^T]."""
        z = self._multiply(layer, f"{SKELETON}_{number}", x)
        rank = self.ranks[number]
        rows = sum(self.member_rows[member] for member in self.parts[number].members)
        p = self._multiply(layer, f"{INTERPOLATION}_{number}", z) if rank < rows else z[..., :1]
        if self.on_gpu(x.device):
            return loaded(z, p, getattr(layer, f"places_{number}"))
        permutation = getattr(layer, f"{PERMUTATION}_{number}")
        y = z.new_empty(*z.shape[:-1], rows)
        put(y, permutation[:rank], z)
        if rank < rows:
            put(y, permutation[rank:], p)
        return y

    def _weight(self, layer: nn.Module, name: str) -> torch.Tensor:
        return getattr(layer, f"{name}_factor").weight

    def _multiply(self, layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        # CUDA's products take rows of any stride; what a CPU's or ROCm's may be made of does not always
        x = x if self.on_gpu(x.device) and torch.version.hip is None else x.contiguous()
        return self.dense_gemm.apply(getattr(layer, f"{name}_factor"), x)

    def _in_member_order(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Parts joined; where a group's members are not neighbours they are put back in the layer's order."""
        order = [member for part in self.parts for member in part.members]
        if order == sorted(order):
            return torch.cat(outputs, dim=-1)
        members = zip(*self._members(), strict=True)
        return torch.cat([outputs[part][..., start : start + size] for part, start, size in members], dim=-1)


def put(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> None:
    """y[..., index] = x: a compiled norm stores x straight into y, where a gather is done apart (docs/decisions.md)."""
    if torch.compiler.is_compiling():
        y[..., index] = x
    else:  # eager, scatter_ is three times as fast; compiled it costs a copy of y
        y.scatter_(-1, index.expand(x.shape), x)


def loaded(z: torch.Tensor, p: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[z | p][..., places], without joining the two: a compiled residual add or norm loads from both."""
    rank = z.shape[-1]
    return torch.where(places < rank, z[..., places.clamp(max=rank - 1)], p[..., (places - rank).clamp(min=0)])


def _stored_rows(layer: nn.Module, output_size: int) -> list[int]:
    """Rows of each of a column-parallel layer's members as the checkpoint stores them: each kv head once."""
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [rows // (copies if i else 1) for i, rows in enumerate(getattr(layer, "output_sizes", [output_size]))]
