"""Where the checkpoint's tensors lie in one layer of vLLM: pure arithmetic, no vLLM.

A vLLM layer (qkv_proj, gate_up_proj, o_proj, ...) holds one or more members of the checkpoint (q_proj, k_proj, v_proj).
Which tensors its members have is for their parts to say (fermisvd_vllm.parts).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch

from fermisvd.errors import FormatError
from fermisvd.format import MEND, PERMUTATION
from fermisvd.schemes import PACKED, PER_INT32, SCALE, SHAPE

Parallel = Literal["column", "row", "replicated"]
Sections = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer, whole and in this process.

    member_sections: (full, local) output rows of each member, several where the checkpoint stores several layers as one
    (Phi-3's qkv_proj); width: (full, local) number of inputs; parallel: how vLLM splits the layer, in its words:
    "column" its outputs, "row" its inputs; layer: its name, for error messages.
    """

    member_sections: Sequence[Sections]
    width: tuple[int, int]
    parallel: Parallel
    tp_size: int
    layer: str

    @property
    def inputs(self) -> int:
        """Inputs in this process."""
        return self.width[1]

    @property
    def member_rows(self) -> list[int]:
        """Output rows of each member in this process."""
        return [sum(local for _, local in sections) for sections in self.member_sections]

    def smaller_side(self, members: Iterable[int]) -> int:
        """Of the whole matrix of some members: no rank is larger."""
        return min(self.width[0], sum(full for i in members for full, _ in self.member_sections[i]))


@dataclass(frozen=True)
class Stored:
    """A tensor that the checkpoint stores for a part, under the layer's member of that position.

    shape: in this process; outputs, inputs: the dimension that runs over the member's outputs, or over the layer's
    inputs, if any: tensor parallelism splits it where it splits those; dtype: None for the model's own; per: how many
    inputs an entry along `inputs` is of: those that share a scale, or an int32.
    """

    name: str
    member: int
    shape: tuple[int, ...]
    outputs: int | None = None
    inputs: int | None = None
    dtype: torch.dtype | None = None
    per: int = 1


class Stores(Protocol):
    """What slots_of asks a part."""

    def check(self, sizes: LayerSizes) -> None: ...

    def stored(self, sizes: LayerSizes) -> Iterable[Stored]: ...


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lies in the flat parameter of its name.

    shape: in this process; shard: the dimension that tensor parallelism splits, None where every process holds all of
    it; sections: (full, local) sizes along it, one for each layer that the checkpoint stores as one, split by itself;
    dtype: None for the model's own.
    """

    offset: int
    shape: tuple[int, ...]
    shard: int | None
    sections: Sections = ()
    dtype: torch.dtype | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)


Slots = dict[tuple[str, int], Slot]  # by tensor name and member position


def slots_of(parts: Iterable[Stores], sizes: LayerSizes) -> Slots:
    """A slot for every tensor of a layer's parts.

    Tensors of one name lie one after the other in the order of the parts, so that a group's A, or all B together, are
    one matrix. Raises FormatError for a part that does not fit the layer.
    """
    slots: Slots = {}
    filled: dict[str, int] = {}
    for part in parts:
        part.check(sizes)
        for tensor in part.stored(sizes):
            shard, sections = None, ()
            if sizes.parallel == "column" and tensor.outputs is not None:
                shard, sections = tensor.outputs, sizes.member_sections[tensor.member]
            elif sizes.parallel == "row" and tensor.inputs is not None:
                shard, sections = tensor.inputs, (shared_sizes(tensor, sizes),)
            slot = Slot(filled.get(tensor.name, 0), tensor.shape, shard, sections, tensor.dtype)
            slots[tensor.name, tensor.member] = slot
            filled[tensor.name] = slot.offset + slot.size
    return slots


def shared_sizes(tensor: Stored, sizes: LayerSizes) -> tuple[int, int]:
    """(full, local) entries along the inputs of a row-parallel layer. Raises FormatError where processes would have to
    share one."""
    full, local = sizes.width
    if local < full and local % tensor.per:
        raise FormatError(
            f"{sizes.layer}: {tensor.name}: {local} inputs of a process, of which {tensor.per} each share a number; "
            "serve with a smaller --tensor-parallel-size, or convert with --weights int8"
        )
    return -(-full // tensor.per), -(-local // tensor.per)


@dataclass(frozen=True)
class Loaded:
    """The tensors of a layer once they are loaded: by name, flat, and where in them each lies; inputs: of the layer in
    this process."""

    flat: Mapping[str, torch.Tensor]
    slots: Slots
    inputs: int

    def stacked(self, name: str, members: Iterable[int]) -> torch.Tensor:
        """The tensors of that name of these members, on top of each other: a view. Raises ValueError unless they are
        neighbours, as those of a part are, or of all parts of a kind."""
        own = [self.slots[name, member] for member in members if (name, member) in self.slots]
        start, size = own[0].offset, sum(slot.size for slot in own)
        if own[-1].offset + own[-1].size != start + size:
            raise ValueError(f"{name}: not side by side")
        return self.flat[name][start : start + size].view(sum(slot.shape[0] for slot in own), *own[0].shape[1:])


def shard_of(whole: torch.Tensor, slot: Slot, tp_rank: int, tp_size: int, name: str) -> torch.Tensor:
    """This process's piece, of the slot's shape, of a whole checkpoint tensor.

    Where kv heads are fewer than processes, a section has fewer shards than there are processes, and neighbours hold
    the same. Raises FormatError if the tensor is not as large as the model's layer, or does not split.
    """
    shape = tuple(whole.shape)
    if slot.shard is None:
        if shape != slot.shape:
            raise FormatError(f"{name}: shape {shape}, expected {slot.shape}; {MEND}")
        return whole
    full = list(slot.shape)
    full[slot.shard] = sum(section for section, _ in slot.sections)
    if shape != tuple(full):
        raise FormatError(f"{name}: shape {shape}, expected {tuple(full)}; {MEND}")
    pieces = []
    for piece, (section, local) in zip(
        whole.split([s for s, _ in slot.sections], slot.shard), slot.sections, strict=True
    ):
        shards = section // local if local else 0
        if section != shards * local or not shards or tp_size % shards:
            raise FormatError(
                f"{name}: {section} rows or columns do not split over {tp_size} processes into {local} each"
            )
        pieces.append(piece.narrow(slot.shard, tp_rank * shards // tp_size * local, local))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=slot.shard)


def in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads x pairs x 2, ...) with the first of all pairs of a head before the second of all."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def numbers_held(slots: Slots) -> tuple[int, int]:
    """Numbers in this process that tensor parallelism splits, and those that every process holds in full; no
    permutations, nor what lies beside the numbers of a grid."""
    counted = [
        (slot.shard is not None, slot.size * (PER_INT32 if name.endswith(PACKED) else 1))
        for (name, _), slot in slots.items()
        if name != PERMUTATION and not name.endswith((SCALE, SHAPE))
    ]
    sharded = sum(size for split, size in counted if split)
    return sharded, sum(size for _, size in counted) - sharded
