"""Which layers of a fused one (q, k, v; gate, up) share a group, chosen by measured loss at equal parameters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, product

import torch
from torch import nn

from fermisvd.budget import Budget, RankedGroup, group_parameters
from fermisvd.decomposition import Factors
from fermisvd.groups import LinearGroup, parent_of, stacked_weight
from fermisvd.losses import set_weight


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


def rank_at(group: LinearGroup, parameters: float, budget: Budget) -> int:
    """Largest rank, in the budget's steps, that stores at most `parameters` numbers; k where dense fits, 0 if none."""
    if parameters >= group.dense_parameters:
        return group.full_rank
    step = budget.alignment(group)
    ranks = range(step, group.full_rank + 1, step)
    return max([r for r in ranks if group_parameters(group, r, budget.form) <= parameters], default=0)


def candidates(parts: Sequence[RankedGroup], budget: Budget) -> Iterator[list[RankedGroup]]:
    """Every way to join neighbours of a fused layer's parts at no more parameters than they have apart."""
    for partition in coarser_partitions(len(parts)):
        pieces = [parts[piece] for piece in partition]
        joint = [(joined([part.group for part in piece]), sum(part.parameters for part in piece)) for piece in pieces]
        candidate = [
            piece[0] if len(piece) == 1 else RankedGroup(group, rank_at(group, room, budget), budget.form)
            for piece, (group, room) in zip(pieces, joint, strict=True)
        ]
        if all(each.rank for each in candidate):
            yield candidate


@torch.no_grad()
def join_groups(
    student: nn.Module,
    ranked: Sequence[RankedGroup],
    budget: Budget,
    loss: Callable[[], float],
    weights_of: Callable[[LinearGroup], torch.Tensor],
    factors_of: Callable[[LinearGroup], Factors],
    *,
    on_layer: Callable[[dict], None] = lambda _: None,
) -> list[RankedGroup]:
    """Groups and ranks after joining neighbours of a fused layer wherever that does not raise the loss.

    student: the dense model with the groups' weights replaced by their low-rank products; changed as joints are
    accepted. Parts of a fused layer are joined at no more parameters than they had apart; loss: gives KL(dense ||
    student) of the student as it stands; weights_of: W of a group. A joint group serves faster, so it wins a tie.
    on_layer sees a record of each fused layer.
    """
    current, result = loss(), []
    ranked_of = {each.group: each for each in ranked}
    for groups in fused_layers([each.group for each in ranked]):
        chosen = [ranked_of[group] for group in groups]
        if len(groups) == 1 or all(each.stays_dense for each in chosen):
            result += chosen
            continue
        best, weights = current, [stacked_weight(student, group).clone() for group in groups]
        for candidate in candidates([ranked_of[group] for group in groups], budget):
            for each in candidate:
                a, b = factors_of(each.group).truncated(each.rank)
                set_weight(student, each.group, weights_of(each.group) if each.stays_dense else a @ b)
            kl = loss()
            if kl <= best:
                best, chosen = kl, candidate
                weights = [stacked_weight(student, group).clone() for group in groups]
        for group, weight in zip(groups, weights, strict=True):
            set_weight(student, group, weight)
        on_layer({"layer": groups[0].name, "kl": current, "joined_kl": best, "groups": len(chosen)})
        current = best
        result += chosen
    return result
