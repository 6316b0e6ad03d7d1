"""How the groups of a checkpoint lie in one layer of vLLM: pure arithmetic, no vLLM.

A vLLM layer (qkv_proj, gate_up_proj, o_proj, ...) holds one or more members of the checkpoint (q_proj, k_proj, v_proj).
Its members fall into parts: one a group, and one for each member that stayed dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, PERMUTATION, SKELETON, FormatError, Group

WEIGHT = "weight"  # of a member that stayed dense beside compressed ones
Kind = Literal["column", "row", "replicated"]


@dataclass(frozen=True)
class Part:
    """members: positions in the layer; group: None for a dense member."""

    members: tuple[int, ...]
    group: Group | None


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor lies in the flat parameter of its name.

    shape: on this rank; shard: the dimension that tensor parallelism splits, None where every rank holds all of it.
    sections: (full, local) rows of the layers that the checkpoint stores as one, each of which is split by itself.
    """

    offset: int
    shape: tuple[int, ...]
    shard: int | None
    sections: tuple[tuple[int, int], ...] = ()

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
    member_rows: Sequence[int],
    columns: int,
    full_columns: int,
    kind: Kind,
    tp_size: int,
    layer: str,
    sections: tuple[tuple[int, int], ...] = (),
) -> dict[tuple[str, int], Slot]:
    """(tensor name, member position) -> Slot. Shared tensors go under the group's first member.

    member_rows, columns: sizes on this rank; full_columns: the whole input width; kind: how vLLM splits the layer;
    sections: (full, local) rows of what the checkpoint stores as one member, such as Phi-3's qkv_proj.
    Parts of one name lie one after the other, so that a group's A, or all B together, are one matrix.
    Raises FormatError for a skeleton on the side that tensor parallelism splits, and for a rank above the matrix.
    """
    slots: dict[tuple[str, int], Slot] = {}
    filled: dict[str, int] = {}

    def place(
        name: str, member: int, shape: tuple[int, ...], output: int | None = None, inputs: int | None = None
    ) -> None:
        shard = output if kind == "column" else inputs if kind == "row" else None
        slots[name, member] = Slot(filled.get(name, 0), shape, shard, sections if shard == 0 else ())
        filled[name] = filled.get(name, 0) + prod(shape)

    for part in parts:
        first, group = part.members[0], part.group
        if group is None:
            place(WEIGHT, first, (member_rows[first], columns), output=0, inputs=1)
            continue
        split = "columns" if kind == "row" else "rows"
        if tp_size > 1 and kind != "replicated" and group.side == split:
            raise FormatError(
                f"{layer}: skeleton of {group.name} is on {group.side}, the side that tensor parallelism splits; "
                "serve with --tensor-parallel-size 1 or convert again"
            )
        rank, rows = group.rank, sum(member_rows[i] for i in part.members)
        limit = full_columns if kind == "column" else rows if kind == "row" else min(full_columns, rows)
        if rank > limit:
            raise FormatError(f"{layer}: rank {rank} of group {group.name} is larger than the matrix, side {limit}")
        if group.form == "svd":
            place(LOWRANK_B, first, (rank, columns), inputs=1)
            for i in part.members:
                place(LOWRANK_A, i, (member_rows[i], rank), output=0)
        elif group.side == "columns":
            place(INTERPOLATION, first, (rank, columns - rank))
            place(PERMUTATION, first, (columns,))
            for i in part.members:
                place(SKELETON, i, (member_rows[i], rank), output=0)
        else:
            place(SKELETON, first, (rank, columns), inputs=1)
            place(INTERPOLATION, first, (rows - rank, rank))
            place(PERMUTATION, first, (rows,))
    return slots


def shard_of(loaded: torch.Tensor, slot: Slot, tp_rank: int, tp_size: int, name: str) -> torch.Tensor:
    """This rank's piece of a checkpoint tensor.

    Where kv heads are fewer than ranks, a tensor has fewer shards than ranks, and neighbouring ranks hold the same one.
    Raises FormatError if the tensor's shape does not fit the slot.
    """
    shape = tuple(loaded.shape)
    if slot.shard is None:
        if shape != slot.shape:
            raise FormatError(f"{name}: shape {shape}, expected {slot.shape}")
        return loaded
    full = shape[slot.shard] if len(shape) == 2 else 0
    sections = slot.sections or ((full, slot.shape[slot.shard]),)
    splits = all(local and section // local and section % local == 0 for section, local in sections) and not any(
        tp_size % (section // local) for section, local in sections
    )
    if (
        full == 0
        or not splits
        or sum(s for s, _ in sections) != full
        or shape[1 - slot.shard] != slot.shape[1 - slot.shard]
    ):
        raise FormatError(f"{name}: shape {shape} does not split over {tp_size} ranks into {slot.shape}")
    pieces = [
        piece.narrow(slot.shard, tp_rank * (section // local) // tp_size * local, local)
        for piece, (section, local) in zip(loaded.split([s for s, _ in sections], slot.shard), sections, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=slot.shard)


def numbers_held(slots: Mapping[tuple[str, int], Slot]) -> tuple[int, int]:
    """Numbers on this rank that tensor parallelism splits, and those that every rank holds in full; no permutations."""
    sharded = sum(slot.size for slot in slots.values() if slot.shard is not None)
    everywhere = sum(slot.size for (name, _), slot in slots.items() if slot.shard is None and name != PERMUTATION)
    return sharded, everywhere
