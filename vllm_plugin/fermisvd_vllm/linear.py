"""The linear method of a compressed layer: loads, checks and multiplies its factors.

Each tensor name of the checkpoint is one flat parameter while loading, since members and groups of a fused layer differ
in shape. After loading the factors are cut out of it, as views, and vLLM's own dense GEMM dispatch runs each of them.
"""

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
from fermisvd_vllm.tuning import most_tokens
from fermisvd_vllm.versions import LORA_DEVICE_NAME, member_of


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
        self.member_names = member_names
        self.layer_name = layer_name
        self.dense_gemm = UnquantizedLinearMethod()
        self.slots: dict[tuple[str, int], Slot] = {}
        self.filled: set[tuple[str, int]] = set()
        self.fused: dict[int, int] = {}  # part -> up to how many tokens its fused kernel is the faster, 0 for never
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
        self.dense_numbers = sum(self.member_rows) * input_size_per_partition
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
        for number, part in enumerate(self.parts):
            matrices = self._matrices(part, flat)
            if part.group and part.group.form == "pivga":
                permutation = matrices.pop(PERMUTATION)
                rank, rest = part.group.rank, len(permutation) - part.group.rank
                self.fused[number] = most_tokens(
                    part.group.side, rank, rest, matrices[SKELETON].dtype, permutation.device
                )
                self._register_permutation(layer, number, part.group, permutation)
            for name, matrix in matrices.items():
                # the fused kernel reads D as it lies, vLLM's GEMMs may lay it out anew
                as_it_lies = name == INTERPOLATION and self.fused[number] > 0
                self._register_factor(layer, f"{name}_{number}", matrix, prepare=not as_it_lies)
        if LOWRANK_B in flat:  # the first products of all svd groups are one
            columns = next(slot.shape[1] for (name, _), slot in self.slots.items() if name == LOWRANK_B)
            self._register_factor(layer, LOWRANK_B, flat[LOWRANK_B].view(-1, columns))
        self.ranks = [part.group.rank for part in self.parts if part.group and part.group.form == "svd"]
        layer.register_buffer(LORA_DEVICE_NAME, next(iter(flat.values())).new_empty(0), persistent=False)
        self.on_ready(self)

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
        """Where each number goes: columns: of each input its place in [x[skel] | x[rest]], rows: of each of [z ; z D^T]
        its output. A fused kernel of columns reads the permutation itself."""
        # persistent: a reload of vLLM's copies no other buffers back into the storage that captured graphs read
        if group.side == "columns" and not self.fused[number]:
            layer.register_buffer(f"inverse_{number}", torch.argsort(permutation.long()))
        else:
            layer.register_buffer(f"permutation_{number}", permutation.long())

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., n) -> (..., m), this rank's share. Nothing here depends on data, so it traces and captures."""
        projected = iter(self._multiply(layer, LOWRANK_B, x).split(self.ranks, dim=-1) if self.ranks else ())
        outputs = []
        for number, part in enumerate(self.parts):
            if part.group is None:
                outputs.append(self._multiply(layer, f"{WEIGHT}_{number}", x))
            elif part.group.form == "svd":
                outputs.append(self._multiply(layer, f"{LOWRANK_A}_{number}", next(projected)))
            elif part.group.side == "columns":
                outputs.append(self._pivga_columns(layer, number, x))
            else:
                outputs.append(self._pivga_rows(layer, number, x))
        y = outputs[0] if len(outputs) == 1 else self._in_member_order(outputs)
        return y if bias is None else y + bias

    def _pivga_columns(self, layer: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
        """t = x[skel] + x[rest] D^T; y = t C_skel^T."""
        if most := self.fused[number]:
            d, permutation = self._weight(layer, f"{INTERPOLATION}_{number}"), getattr(layer, f"permutation_{number}")
            return self._multiply(
                layer, f"{SKELETON}_{number}", torch.ops.fermisvd.pivga_columns(x, d, permutation, most)
            )
        rank = self.parts[number].group.rank
        ordered = torch.empty_like(x, memory_format=torch.contiguous_format)  # [x[skel] | x[rest]]
        put(ordered, getattr(layer, f"inverse_{number}"), x)
        t = ordered[..., :rank]
        if rank < x.shape[-1]:
            t = t + self._multiply(layer, f"{INTERPOLATION}_{number}", ordered[..., rank:])
        return self._multiply(layer, f"{SKELETON}_{number}", t)

    def _pivga_rows(self, layer: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
        """z = x R_skel^T; y = P [z ; z D^T]."""
        z = self._multiply(layer, f"{SKELETON}_{number}", x)
        if most := self.fused[number]:
            d, permutation = self._weight(layer, f"{INTERPOLATION}_{number}"), getattr(layer, f"permutation_{number}")
            return torch.ops.fermisvd.pivga_rows(z, d, permutation, most)
        permutation = getattr(layer, f"permutation_{number}")
        rank, rows = z.shape[-1], len(permutation)
        y = z.new_empty(*z.shape[:-1], rows)
        put(y, permutation[:rank], z)
        if rank < rows:
            put(y, permutation[rank:], self._multiply(layer, f"{INTERPOLATION}_{number}", z))
        return y

    def _weight(self, layer: nn.Module, name: str) -> torch.Tensor:
        return getattr(layer, f"{name}_factor").weight

    def _multiply(self, layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.dense_gemm.apply(getattr(layer, f"{name}_factor"), x.contiguous())

    def _in_member_order(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Parts joined; where a group's members are not neighbours they are put back in the layer's order."""
        order = [member for part in self.parts for member in part.members]
        if order == sorted(order):
            return torch.cat(outputs, dim=-1)
        pieces = {}
        for part, y in zip(self.parts, outputs, strict=True):
            pieces |= dict(zip(part.members, y.split([self.member_rows[i] for i in part.members], dim=-1), strict=True))
        return torch.cat([pieces[member] for member in sorted(pieces)], dim=-1)


def put(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> None:
    """y[..., index] = x, a scatter rather than a gather (docs/decisions.md): the norm before it can store straight
    into y; a gather would be done again in each reader of y on a CPU."""
    if torch.compiler.is_compiling():
        y[..., index] = x
    else:  # eager, scatter_ is three times as fast; compiled it costs a copy of y
        y.scatter_(-1, index.expand(x.shape), x)


def _stored_rows(layer: nn.Module, output_size: int) -> list[int]:
    """Rows of each of a column-parallel layer's members as the checkpoint stores them: each kv head once."""
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [rows // (copies if i else 1) for i, rows in enumerate(getattr(layer, "output_sizes", [output_size]))]
