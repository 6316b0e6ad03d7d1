"""Which layers of a fused one (q, k, v; gate, up) share a group, chosen by measured loss at equal parameters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, product

import torch
from torch import nn

from fermisvd.budget import Form, group_parameters, stays_dense
from fermisvd.decomposition import Factors
from fermisvd.groups import LinearGroup, parent_of, stacked_weight
from fermisvd.losses import StudentLoss, set_weight


def joined(groups: Sequence[LinearGroup]) -> LinearGroup:
    """One group of all members of groups that read the same input."""
    members = tuple(name for group in groups for name in group.members)
    rows = tuple(count for group in groups for count in group.member_rows)
    return replace(groups[0], members=members, member_rows=rows)


def fused_layers(groups: Sequence[LinearGroup]) -> list[list[LinearGroup]]:
    """Groups that read the same input, in a row: each list is one fused layer of vLLM."""
    return [list(parts) for _, parts in groupby(groups, key=lambda g: (g.source, parent_of(g.name), g.side))]


def coarser_partitions(count: int) -> Iterator[list[slice]]:
    """All ways to join neighbours among `count` groups, but for joining none: {0, 1} + {2}, ..., {0, 1, 2}."""
    for joints in product((False, True), repeat=count - 1):
        if any(joints):
            cuts = [0, *[i for i, joint in enumerate(joints, 1) if not joint], count]
            yield [slice(begin, end) for begin, end in pairwise(cuts)]


def rank_at(group: LinearGroup, parameters: float, form: Form, align: int) -> int:
    """Largest rank, in steps of `align`, that stores at most `parameters` numbers; k where dense fits."""
    if parameters >= group.dense_parameters:
        return group.full_rank
    ranks = range(align, group.full_rank + 1, align)
    return max([r for r in ranks if group_parameters(group, r, form) <= parameters], default=0)


@torch.no_grad()
def join_groups(
    dense: nn.Module,
    student: nn.Module,
    groups: Sequence[LinearGroup],
    ranks: Sequence[int],
    form: Form,
    aside: torch.Tensor,
    factors_of: Callable[[LinearGroup], Factors],
    align_of: Callable[[LinearGroup], int],
    batch_size: int = 8,
    on_layer: Callable[[dict], None] = lambda _: None,
) -> list[tuple[LinearGroup, int]]:
    """Groups and ranks after joining neighbours of a fused layer wherever that does not raise the loss.

    student: the dense model with the groups' weights replaced by their low-rank products; changed as joints are
    accepted. Parts of a fused layer are joined at no more parameters than they had apart; the loss is KL(dense ||
    student) on the windows kept aside, (samples, length). A joint group serves faster, so it wins a tie.
    """
    loss = StudentLoss(dense, aside, batch_size)
    current, result = loss(student), []
    rank_of = dict(zip(groups, ranks, strict=True))
    for parts in fused_layers(groups):
        chosen = [(group, rank_of[group]) for group in parts]
        if len(parts) == 1 or all(stays_dense(group, rank, form) for group, rank in chosen):
            result += chosen
            continue
        best, weights = current, [stacked_weight(student, group).clone() for group in parts]
        for partition in coarser_partitions(len(parts)):
            candidate = []
            for piece in partition:
                group = joined(parts[piece])
                room = sum(group_parameters(g, rank_of[g], form) for g in parts[piece])
                alone = piece.stop - piece.start == 1
                candidate.append((group, rank_of[group] if alone else rank_at(group, room, form, align_of(group))))
            if any(rank == 0 for _, rank in candidate):
                continue
            for group, rank in candidate:
                a, b = factors_of(group).truncated(rank)
                set_weight(student, group, stacked_weight(dense, group) if stays_dense(group, rank, form) else a @ b)
            kl = loss(student)
            if kl <= best:
                best, chosen = kl, candidate
                weights = [stacked_weight(student, group).clone() for group in parts]
        for group, weight in zip(parts, weights, strict=True):
            set_weight(student, group, weight)
        on_layer({"layer": parts[0].name, "kl": current, "joined_kl": best, "groups": len(chosen)})
        current = best
        result += chosen
    return result
