"""Which layers of a fused one (q, k, v; gate, up) share a group: their spectra say what may help, measured losses
settle it, at equal parameters."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise, product

import torch
from torch import nn

from fermisvd.budget import Budget, RankedGroup, group_parameters
from fermisvd.decomposition import Decomposition
from fermisvd.fused import fused_with
from fermisvd.groups import LinearGroup
from fermisvd.linear import linear_layer, weight_of
from fermisvd.losses import LossFromABlock, StudentLoss, set_weight
from fermisvd.running.distributed import local

HOPE = 1.2  # a partition is tried if its whitened error is at most so many times that of the groups apart
TRIALS = 5  # what all trials would cost together, run whole, in losses on all windows
FEWEST_TOKENS = 2048  # of a trial
TIE = 1e-4  # losses that differ by less than this part are equal, or the order of a sum would choose groups


def joined(groups: Sequence[LinearGroup]) -> LinearGroup:
    """One group of all members of groups that read the same input."""
    members = tuple(name for group in groups for name in group.members)
    rows = tuple(count for group in groups for count in group.member_rows)
    return replace(groups[0], members=members, member_rows=rows)


def fused_layers(groups: Sequence[LinearGroup]) -> list[list[LinearGroup]]:
    """Groups that read the same input and that vLLM fuses, in a row: each list is one fused layer."""
    return [list(parts) for _, parts in groupby(groups, key=lambda g: (g.source, fused_with(g.name), g.side))]


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
    """Every way to join neighbours of a fused layer's parts at no more parameters than they have apart; but not parts
    that all stay dense."""
    for partition in coarser_partitions(len(parts)):
        pieces = [parts[piece] for piece in partition]
        if any(len(piece) > 1 and all(part.stays_dense for part in piece) for piece in pieces):
            continue
        kind = budget.form, budget.weights
        joint = [(joined([part.group for part in piece]), sum(part.parameters for part in piece)) for piece in pieces]
        candidate = [
            piece[0] if len(piece) == 1 else RankedGroup(group, rank_at(group, room, budget), *kind)
            for piece, (group, room) in zip(pieces, joint, strict=True)
        ]
        if all(each.rank for each in candidate):
            yield candidate


@dataclass(frozen=True)
class Hope:
    """Groups that a fused layer's parts may be joined to, and their whitened error over that of the parts."""

    groups: list[RankedGroup]
    error: float


@dataclass(frozen=True)
class FusedLayer:
    """parts: its groups, apart, at their ranks; hopes: worth a trial, the best first."""

    parts: list[RankedGroup]
    hopes: list[Hope]


def whitened_error(ranked: Sequence[RankedGroup], sigma_of: Mapping[LinearGroup, torch.Tensor]) -> float:
    """sum_{j>=r} sigma_j^2 over the groups, which is nothing of those that stay dense."""
    return sum(sigma_of[each.group][each.rank :].square().sum().item() for each in ranked if not each.stays_dense)


def hopes_of(parts: Sequence[RankedGroup], budget: Budget, decomposition: Decomposition) -> list[Hope]:
    """The partitions whose whitened error is at most HOPE times the parts', the best first.

    One metric weighs both: a joint group's output side is that of its members (`group_output_gram`). No factors are
    made, and three parts are not joined where no two of them have hope.
    """
    sigma_of = {part.group: decomposition.sigma(part.group) for part in parts}
    error, hopes = whitened_error(parts, sigma_of), []
    for partition in candidates(parts, budget):
        if len(partition) < len(parts) - 1 and not hopes:
            continue
        for each in partition:
            if each.group not in sigma_of:
                sigma_of[each.group] = decomposition.spectrum(each.group)
        joint_error = whitened_error(partition, sigma_of)
        if joint_error <= HOPE * error:
            hopes.append(Hope(partition, joint_error / error if error else 1.0))
    return sorted(hopes, key=lambda hope: hope.error)


def layers_with_hopes(
    ranked: Sequence[RankedGroup],
    budget: Budget,
    decomposition: Decomposition,
    on_layer: Callable[[], object] = lambda: None,
) -> list[FusedLayer]:
    """The groups by fused layers, and how they may be joined. on_layer: called after each fused layer."""
    ranked_of, layers = {each.group: each for each in ranked}, []
    for groups in fused_layers([each.group for each in ranked]):
        parts = [ranked_of[group] for group in groups]
        layers.append(FusedLayer(parts, hopes_of(parts, budget, decomposition)))
        on_layer()
    return layers


def put(student: nn.Module, ranked: Sequence[RankedGroup], decomposition: Decomposition) -> None:
    """A B for the groups' weights, or W where they stay dense."""
    for each in ranked:
        if each.stays_dense:
            set_weight(student, each.group, decomposition.weights(each.group))
        else:
            a, b = decomposition.factors(each.group).truncated(each.rank)
            set_weight(student, each.group, a @ b)


def tried(
    student: nn.Module, layer: FusedLayer, decomposition: Decomposition, loss: LossFromABlock, kl: float
) -> tuple[list[RankedGroup], float, list[dict]]:
    """The groups of a fused layer that have the least loss, which the student is left with, their loss, and a record of
    each hope. kl: the loss with the parts. Of a tie, fewer groups win, which serve faster."""

    if not layer.hopes:
        return layer.parts, kl, []
    names = [name for part in layer.parts for name in part.group.members]
    own = [local(weight_of(linear_layer(student, name))) for name in names]  # its part, where FSDP2 has divided it

    def weights() -> list[torch.Tensor]:
        return [weight.clone() for weight in own]

    loss.begin_at(names[0])
    chosen, best, kept, records = layer.parts, kl, weights(), []
    for hope in layer.hopes:
        put(student, hope.groups, decomposition)
        kl = loss()
        members = [len(each.group.members) for each in hope.groups]
        records.append({"members": members, "estimate": round(hope.error, 5), "kl": kl})
        fewer = len(hope.groups) < len(chosen)
        if kl <= best * (1 + TIE if fewer else 1 - TIE):
            chosen, best, kept = hope.groups, kl, weights()
    for weight, value in zip(own, kept, strict=True):
        weight.copy_(value)
    return chosen, best, records


@torch.no_grad()
def join_groups(
    student: nn.Module,
    layers: Sequence[FusedLayer],
    decomposition: Decomposition,
    loss: StudentLoss,
    on_layer: Callable[[dict], None] = lambda _: None,
) -> tuple[list[RankedGroup], list[dict]]:
    """Groups and ranks after joining neighbours of a fused layer wherever that does not raise the loss.

    student: the dense model with the groups' weights replaced by their low-rank products; it has those of the result
    afterwards. layers: of `layers_with_hopes`; loss: of the student, on the windows that decide. Every hope is tried on
    a few of them, so few that whole passes would cost TRIALS losses on all, but FEWEST_TOKENS; blocks before the layer
    are not run again. What was joined is then measured on all; the half that gained less is taken apart as long as that
    lowers the loss, or the loss is above that of separate groups.
    Returns the groups and a record of each loss on all windows; on_layer sees one of each layer of several groups.
    """
    hopes = sum(len(layer.hopes) for layer in layers)
    windows, length = loss.taught.windows.shape
    few = min(windows, max(TRIALS * windows // max(1, hopes), math.ceil(FEWEST_TOKENS / length)))
    whole = [{"joined": 0, "kl": loss()}] if hopes else []
    trial = loss.from_a_block(few)
    current = trial() if hopes else 0.0
    chosen, gains = [], []
    for i, layer in enumerate(layers):
        groups, kl, trials = tried(student, layer, decomposition, trial, current)
        chosen.append(groups)
        if groups is not layer.parts:
            gains.append((current - kl, i))
        if len(layer.parts) > 1:
            name = layer.parts[0].group.name
            on_layer({"layer": name, "groups": len(groups), "kl": current, "joined_kl": kl, "trials": trials})
        current = kl
    order = [i for _, i in sorted(gains, reverse=True)]  # the layer that gained most first
    best, count = 0, len(order)
    while count:
        whole.append({"joined": count, "kl": loss()})
        kl, more = whole[-1]["kl"], [record["kl"] for record in whole[1:-1]]  # with more layers joined
        if kl <= (1 + TIE) * whole[0]["kl"] and all(kl < (1 - TIE) * other for other in more):
            best = count
        elif best:
            break
        for i in order[count // 2 : count]:
            put(student, layers[i].parts, decomposition)
        count //= 2
    for i in order[count:best]:
        put(student, chosen[i], decomposition)
    for i in order[best:]:
        chosen[i] = layers[i].parts
    return [each for groups in chosen for each in groups], whole
