"""The linear method of a compressed layer: loads the tensors of its parts, checks them, and joins what the parts make.

Each tensor name of the checkpoint is one flat parameter while loading, since members and groups of a fused layer differ
in shape. After loading the parts cut their factors out of it, as views (fermisvd_vllm.parts), and vLLM's own dense GEMM
dispatch runs each of them; or, on a CPU, as copies that its packed kernel takes (fermisvd_vllm.packed).
"""

from collections.abc import Callable, Mapping, Sequence

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

from fermisvd.errors import FormatError
from fermisvd.format import PERMUTATION, WEIGHT, check_finite, check_permutation, check_scales
from fermisvd.schemes import SCALE
from fermisvd_vllm.factors import Factor, Gemm, Products
from fermisvd_vllm.layout import LayerSizes, Loaded, Parallel, Sections, Slot, Slots, in_halves, shard_of, slots_of
from fermisvd_vllm.on_cpu import numbered
from fermisvd_vllm.packed import OUTPUTS_TILE, TILE, PackedMethod, packs
from fermisvd_vllm.parts import Part
from fermisvd_vllm.tuning import OwnOps, noise
from fermisvd_vllm.versions import LORA_DEVICE_NAME, member_of, spans_of


class FermiSVDLinearMethod(LinearMethodBase):
    """One instance a layer: it carries the layer's parts. Names of members and layer are for error messages.

    own_ops: our ops on a GPU; check_model: called before a tensor is taken and before a layer is finished; on_ready:
    when this one is finished; heads: of members whose rows vLLM would have reordered (versions.heads_in_halves).
    """

    def __init__(
        self,
        parts: list[Part],
        member_names: list[str],
        layer_name: str,
        own_ops: OwnOps | None = None,
        check_model: Callable[[], None] = lambda: None,
        on_ready: Callable[["FermiSVDLinearMethod"], None] = lambda _: None,
        heads: Mapping[int, int] | None = None,
    ):
        self.heads = heads or {}
        for part in parts:
            if part.group and part.group.side == "rows" and self.heads.keys() & set(part.members):
                raise FormatError(f"{layer_name}: group {part.group.name}: rows that vLLM reorders; convert again")
        self.own_ops = own_ops or OwnOps()
        self.check_model, self.on_ready = check_model, on_ready
        self.parts = parts
        self.kinds = _by_kind(parts)
        order = [member for part in parts for member in part.members]
        self.in_order = order == sorted(order)
        self.member_names = member_names
        self.layer_name = layer_name
        self.gemm: Gemm = UnquantizedLinearMethod()
        self.slots: Slots = {}
        self.filled: set[tuple[str, int]] = set()
        self.on_cpu = self.joins_outputs = False  # known once the weights are there, and on which device
        self.number = numbered(self)
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
        """Flat parameters, one a tensor name. Raises FormatError if the checkpoint's groups do not fit the layer."""
        self.tp_rank, self.tp_size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        parallel = _parallel(layer)
        full_rows = _stored_rows(layer, output_size) if parallel == "column" else output_partition_sizes
        sizes = LayerSizes(
            self._member_sections(full_rows, output_partition_sizes),
            (input_size, input_size_per_partition),
            parallel,
            self.tp_size,
            self.layer_name,
        )
        self.slots, self.inputs = slots_of(self.parts, sizes), sizes.inputs
        self.dense_numbers = sum(sizes.member_rows) * sizes.inputs
        self.whole_tiles = not (sizes.inputs % TILE or any(rows % OUTPUTS_TILE for rows in sizes.member_rows))
        self.member_places = _member_places(self.parts, sizes.member_rows)
        self.part_rows = [sum(sizes.member_rows[member] for member in part.members) for part in self.parts]
        for name in dict.fromkeys(name for name, _ in self.slots):
            slots = [slot for (other, _), slot in self.slots.items() if other == name]
            layer.register_parameter(name, self._flat_parameter(name, slots, params_dtype))
        layer.register_module("parts", nn.ModuleList(self.parts))

    def _member_sections(self, full_rows: Sequence[int], local_rows: Sequence[int]) -> list[Sections]:
        """(full, local) output rows of each member, several where the checkpoint stores several of vLLM's outputs as
        one. Raises FormatError where members and outputs do not fit."""
        self.spans = spans_of(self.layer_name, self.member_names, len(local_rows))
        return [tuple((full_rows[output], local_rows[output]) for output in span) for span in self.spans]

    def _flat_parameter(self, name: str, slots: list[Slot], params_dtype: torch.dtype) -> nn.Parameter:
        """Room for all tensors of one name. The permutation starts valid: dummy loading leaves integers alone."""
        dtype = slots[0].dtype or params_dtype
        if len({slot.dtype for slot in slots}) > 1:
            raise FormatError(f"{self.layer_name}: {name}: groups of one layer with numbers of several types")
        if name == PERMUTATION:
            data = torch.cat([torch.arange(slot.size, dtype=dtype) for slot in slots])
        else:
            data = torch.empty(sum(slot.size for slot in slots), dtype=dtype)
        parameter = nn.Parameter(data, requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self._loader(name)})
        if all(slot.shard == 0 for slot in slots):  # Falcon reorders q/k/v rows while loading and asks for it
            set_weight_attrs(parameter, {"output_dim": 0})
        return parameter

    def _loader(self, name: str) -> Callable:
        """vLLM's weight_loader of one flat parameter."""

        def load_member(
            param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | int | tuple[int, ...] | None = None
        ) -> None:
            member = member_of(loaded_weight, loaded_shard_id, self.spans)
            where = f"{self.layer_name}: {self.member_names[member]}.{name}"
            if (name, member) not in self.slots:
                raise FormatError(f"{where}: not expected there by the config's groups")
            self.check_model()
            slot = self.slots[name, member]
            check_finite(where, loaded_weight)
            if name == PERMUTATION:
                check_permutation(where, loaded_weight)
            if member in self.heads and slot.shard == 0 and name != WEIGHT:  # which vLLM has reordered itself
                loaded_weight = in_halves(loaded_weight, self.heads[member])
            piece = shard_of(loaded_weight, slot, self.tp_rank, self.tp_size, where).to(param.dtype)
            check_finite(f"{where} as {param.dtype}", piece)  # --dtype float16 may be too narrow for it
            if name.endswith(SCALE):
                check_scales(f"{where} as {param.dtype}", piece)
            param.data[slot.offset : slot.offset + slot.size].view(slot.shape).copy_(piece)
            self.filled.add((name, member))

        return load_member

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Has the parts cut their factors out of the flat parameters. Raises FormatError naming every tensor that was
        never filled.

        A reload comes here again with new flat parameters; the factors then keep their storage.
        """
        self.check_model()
        self.check_filled()
        flat = {name: getattr(layer, name).data for name in dict.fromkeys(name for name, _ in self.slots)}
        for name in flat:
            delattr(layer, name)
        some = next(iter(flat.values()))
        uses_own_ops = self.own_ops.run_on(some.device)
        self.on_cpu = some.device.type == "cpu" and not uses_own_ops
        joined = all(part.one_product and not part.on_grid for part in self.parts)
        self.joins_outputs = uses_own_ops and len(self.parts) > 1 and joined
        packed = self.on_cpu and self.whole_tiles and packs(some.dtype, some.device)
        products = Products(
            gemm=self.gemm,
            of_narrow=PackedMethod() if packed else None,
            uses_own_ops=uses_own_ops,
            joins_outputs=self.joins_outputs,
            measure=self.own_ops.measure,
            tile=TILE if packed else 1,
            # CUDA's products take rows of any stride; what a CPU's or ROCm's may be made of does not always
            any_stride=uses_own_ops and torch.version.hip is None,
            on_cpu=self.on_cpu,
            grid_factor=_grid_factor,
        )
        for kind, parts in self.kinds:
            kind.take_all(parts, Loaded(flat, self.slots, self.inputs), products)
        if self.joins_outputs:
            self._measure_outputs()
        layer.register_buffer(LORA_DEVICE_NAME, some.new_empty(0), persistent=False)
        if self.on_cpu:
            layer.register_buffer("number", self.number, persistent=False)
        self.on_ready(self)

    def check_filled(self) -> None:
        """Raises FormatError naming every tensor that was never filled."""
        missing = self.slots.keys() - self.filled
        if missing and self.loads_checkpoint:
            names = ", ".join(f"{self.member_names[member]}.{name}" for name, member in sorted(missing))
            raise FormatError(
                f"{self.layer_name}: missing from the checkpoint: {names}; convert again or copy the shard again"
            )
        self.filled.clear()

    def _measure_outputs(self) -> None:
        from fermisvd_vllm.kernels import OUTPUTS  # here: there need not be a Triton where there is no GPU

        a = [self._plain(part).weight for part in self.parts]
        self.own_ops.measure(OUTPUTS, [noise(each, each.shape[1]) for each in a], a, *self.member_places)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., n) -> (..., m), in this process. Nothing here depends on data, so it traces and captures."""
        if self.on_cpu:
            y = torch.ops.fermisvd.layer_product(x, layer.number, sum(self.part_rows))
        elif self.joins_outputs:
            t = self._shared(x)
            y = torch.ops.fermisvd.outputs(t, [self._plain(part).weight for part in self.parts], *self.member_places)
        else:
            y = self._joined([part.outputs(t) for part, t in zip(self.parts, self._shared(x), strict=True)])
        return y if bias is None else y + bias

    @staticmethod
    def _plain(part: Part) -> Factor:
        """The second factor of a part, which is on no grid."""
        assert isinstance(part.second, Factor)
        return part.second

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, n) -> (tokens, m), without the bias: what a CPU does, in the op of fermisvd_vllm.on_cpu."""
        t = self._shared(x)
        if len(self.parts) == 1 and self.parts[0].one_product:
            return self.parts[0].outputs(t[0])
        y = x.new_empty(len(x), sum(self.part_rows))
        outputs = y.split(self.part_rows, dim=-1)
        for part, own, columns in zip(self.parts, t, outputs, strict=True):
            part.write(own, columns)
        return y if self.in_order else self._joined(outputs)

    def _shared(self, x: torch.Tensor) -> list[torch.Tensor]:
        """t of each part."""
        if len(self.kinds) == 1:
            [(kind, parts)] = self.kinds
            return list(kind.shared_of_all(parts, x))
        shared: dict[Part, torch.Tensor] = {}
        for kind, parts in self.kinds:
            shared |= zip(parts, kind.shared_of_all(parts, x), strict=True)
        return [shared[part] for part in self.parts]

    def _joined(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Side by side; where a group's members are not neighbours they are put back in the layer's order."""
        if len(outputs) == 1:
            return outputs[0]
        if self.in_order:
            return torch.cat(list(outputs), dim=-1)
        members = zip(*self.member_places, strict=True)
        return torch.cat([outputs[part][..., start : start + size] for part, start, size in members], dim=-1)


def _grid_factor(*arguments):
    from fermisvd_vllm.grid_gemm import grid_factor  # here: vLLM's kernels take a while to import

    return grid_factor(*arguments)


def _by_kind(parts: Sequence[Part]) -> list[tuple[type[Part], list[Part]]]:
    """Each class of parts there is, and its parts."""
    kinds = dict.fromkeys(type(part) for part in parts)
    return [(kind, [part for part in parts if type(part) is kind]) for kind in kinds]


def _member_places(parts: Sequence[Part], member_rows: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Of each member, in the layer's order: its part's number, where its rows begin in that part's, and how many."""
    found = {}
    for number, part in enumerate(parts):
        start = 0
        for member in part.members:
            found[member] = number, start, member_rows[member]
            start += member_rows[member]
    numbers, starts, sizes = zip(*(found[member] for member in sorted(found)), strict=True)
    return list(numbers), list(starts), list(sizes)


def _parallel(layer: nn.Module) -> Parallel:
    if isinstance(layer, RowParallelLinear):
        return "row"
    return "replicated" if isinstance(layer, ReplicatedLinear) else "column"


def _stored_rows(layer: nn.Module, output_size: int) -> list[int]:
    """Rows of each of a column-parallel layer's members as the checkpoint stores them: each kv head once."""
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [rows // (copies if i else 1) for i, rows in enumerate(getattr(layer, "output_sizes", [output_size]))]
