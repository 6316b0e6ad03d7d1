"""How the groups of a checkpoint lie in one layer of vLLM: pure arithmetic, no vLLM.

A vLLM layer (qkv_proj, gate_up_proj, o_proj, ...) holds one or more members of the checkpoint (q_proj, k_proj, v_proj).
Its members fall into parts: one a group, and one for each member that stayed dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, MEND, PERMUTATION, SKELETON, FormatError, Group

WEIGHT = "weight"  # of a member that stayed dense beside compressed ones
Kind = Literal["column", "row", "replicated"]
Sections = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """members: positions in the layer; group: None for a dense member."""

    members: tuple[int, ...]
    group: Group | None


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lies in the flat parameter of its name.

    shape: on this rank; shard: the dimension that tensor parallelism splits, None where every rank holds all of it;
    sections: (full, local) sizes along it, one for each layer that the checkpoint stores as one, split by itself.
    """

    offset: int
    shape: tuple[int, ...]
    shard: int | None
    sections: Sections = ()

    @property
    def size(self) -> int:
        return prod(self.shape)


def parts_of(member_names: Sequence[str], groups: Mapping[str, Group], layer: str) -> list[Part] | None:
    """Parts of a layer with these members, in order of their first member; None if all of them are dense.

    groups: member name -> its group. Raises FormatError if a group reaches out of the layer.
    """
    position = {name: i for i, name in enumerate(member_names)}
    parts: dict[str, Part] = {}
    for name in member_names:
        group = groups.get(name)
        if group is None:
            parts[name] = Part((position[name],), None)
            continue
        strangers = [member for member in group.members if member not in position]
        if strangers:
            raise FormatError(f"group {group.name}: {strangers[0]} is no part of {layer}, the layer vLLM fuses it into")
        parts.setdefault(group.name, Part(tuple(position[member] for member in group.members), group))
    return list(parts.values()) if any(part.group for part in parts.values()) else None


def slots_of(
    parts: Sequence[Part],
    member_sections: Sequence[Sections],
    columns: tuple[int, int],
    kind: Kind,
    tp_size: int,
    layer: str,
) -> dict[tuple[str, int], Slot]:
    """(tensor name, member position) -> Slot. Shared tensors go under the group's first member.

    member_sections: (full, local) output rows of each member, several where the checkpoint stores several layers as one
    (Phi-3's qkv_proj); columns: (full, local) input width; kind: how vLLM splits the layer: "column" the rows of A and
    C_skel, "row" the columns of B and R_skel. Parts of one name lie one after the other, so that a group's A, or all B
    together, are one matrix.
    Raises FormatError for a skeleton on the side that tensor parallelism splits, and for a rank above the matrix.
    """
    slots: dict[tuple[str, int], Slot] = {}
    filled: dict[str, int] = {}
    member_rows = [sum(local for _, local in sections) for sections in member_sections]
    full_columns, local_columns = columns

    def place(
        name: str, member: int, shape: tuple[int, ...], output: int | None = None, inputs: int | None = None
    ) -> None:
        shard, sections = None, ()
        if kind == "column" and output is not None:
            shard, sections = output, member_sections[member]
        elif kind == "row" and inputs is not None:
            shard, sections = inputs, (columns,)
        slots[name, member] = Slot(filled.get(name, 0), shape, shard, sections)
        filled[name] = filled.get(name, 0) + prod(shape)

    for part in parts:
        first, group = part.members[0], part.group
        if group is None:
            place(WEIGHT, first, (member_rows[first], local_columns), output=0, inputs=1)
            continue
        split = "columns" if kind == "row" else "rows"
        if tp_size > 1 and kind != "replicated" and group.side == split:
            raise FormatError(
                f"{layer}: skeleton of {group.name} is on {group.side}, the side that tensor parallelism splits; "
                "serve with --tensor-parallel-size 1 or convert again"
            )
        rank, rows = group.rank, sum(member_rows[i] for i in part.members)
        limit = min(full_columns, sum(full for i in part.members for full, _ in member_sections[i]))
        if rank > limit:
            raise FormatError(f"{layer}: rank {rank} of group {group.name} is larger than the matrix, side {limit}")
        if group.form == "svd":
            place(LOWRANK_B, first, (rank, local_columns), inputs=1)
            for i in part.members:
                place(LOWRANK_A, i, (member_rows[i], rank), output=0)
        elif group.side == "columns":
            place(INTERPOLATION, first, (rank, local_columns - rank))
            place(PERMUTATION, first, (local_columns,))
            for i in part.members:
                place(SKELETON, i, (member_rows[i], rank), output=0)
        else:
            place(SKELETON, first, (rank, local_columns), inputs=1)
            place(INTERPOLATION, first, (rows - rank, rank))
            place(PERMUTATION, first, (rows,))
    return slots


def shard_of(loaded: torch.Tensor, slot: Slot, tp_rank: int, tp_size: int, name: str) -> torch.Tensor:
    """This rank's piece, of the slot's shape, of a whole checkpoint tensor.

    Where kv heads are fewer than ranks, a section has fewer shards than ranks, and neighbouring ranks hold the same.
    Raises FormatError if the tensor is not as large as the model's layer, or does not split.
    """
    shape = tuple(loaded.shape)
    if slot.shard is None:
        if shape != slot.shape:
            raise FormatError(f"{name}: shape {shape}, expected {slot.shape}; {MEND}")
        return loaded
    full = list(slot.shape)
    full[slot.shard] = sum(section for section, _ in slot.sections)
    if shape != tuple(full):
        raise FormatError(f"{name}: shape {shape}, expected {tuple(full)}; {MEND}")
    pieces = []
    for piece, (section, local) in zip(
        loaded.split([s for s, _ in slot.sections], slot.shard), slot.sections, strict=True
    ):
        shards = section // local if local else 0
        if section != shards * local or not shards or tp_size % shards:
            raise FormatError(f"{name}: {section} rows or columns do not split over {tp_size} ranks into {local} each")
        pieces.append(piece.narrow(slot.shard, tp_rank * shards // tp_size * local, local))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=slot.shard)


def numbers_held(slots: Mapping[tuple[str, int], Slot]) -> tuple[int, int]:
    """Numbers on this rank that tensor parallelism splits, and those that every rank holds in full; no permutations."""
    sharded = sum(slot.size for slot in slots.values() if slot.shard is not None)
    everywhere = sum(slot.size for (name, _), slot in slots.items() if slot.shard is None and name != PERMUTATION)
    return sharded, everywhere
