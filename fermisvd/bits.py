"""Bits and ranks together: which factors get 8 bits instead of 4, where a budget in bytes leaves room once ranks are
chosen.

What rounding loses is estimated as the whitening weighs errors, 1/2 mean(diag G) tr(E C E^T) of the error E that the
rounded factors leave in the group's product: the second-order KL of an error that is alike in all directions of the
output, as rounding is, with the sums that calibration has taken. Groups' losses add up. The room goes where a byte
gains most, until nothing more fits (docs/method.md, Bits and ranks).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from fermisvd.budget import Budget, RankedGroup
from fermisvd.byte_budget import ByteBudget
from fermisvd.decomposition import Decomposition, OutputGram
from fermisvd.errors import OptionError
from fermisvd.grids import inputs_of
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair
from fermisvd.modules import CompressedLinear, in_type, module_class
from fermisvd.schemes import COARSE, FINE
from fermisvd.storage import compressed_tensors, config_group, parts_of, stored_bytes

logger = logging.getLogger("fermisvd")

SPREAD = 1.06  # of bytes that FermiGrad's ranks may take less than ranks that are alike, at as many parameters
STEP_DOWN = 0.998  # of the parameters, at least, where ranks must come down


@dataclass(frozen=True)
class Way:
    """How a group may be stored. fine: its factors in FINE, by name, the others being in COARSE; bytes: of all; loss:
    what is estimated, KL in nats a token once `ways_of` knows how many tokens the sums are of."""

    fine: tuple[str, ...]
    bytes: int
    loss: float

    def of(self, ranked: RankedGroup) -> RankedGroup:
        """The group, stored so."""
        return replace(ranked, weights=COARSE, own=tuple((name, FINE) for name in self.fine))


def ways_of(
    ranked: RankedGroup,
    factors_of: Callable[[LinearGroup], Pair],
    decomposition: Decomposition,
    dtype: torch.dtype,
    tokens: int,
) -> list[Way]:
    """Every choice of COARSE and FINE for a group's factors. dtype: of scales; tokens: that calibration has seen."""
    gram = decomposition.gram(ranked.group.source).double()
    parts = [part.to(gram) for part in parts_of(ranked, factors_of, decomposition)]
    exact = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
    outputs = decomposition.outputs(ranked.group, gram.device)
    assert outputs is not None  # by kfac whitening
    found = []
    for fine in choices_of(ranked):
        trial = Way(fine, 0, 0).of(ranked)
        error = product_of(trial, compressed_tensors(trial, parts, dtype, gram)).double() - exact
        loss = loss_of(error, gram, outputs, ranked.group) / tokens**2
        found.append(Way(fine, sum(stored_bytes(trial, dtype).values()), loss))
    return found


def choices_of(ranked: RankedGroup) -> list[tuple[str, ...]]:
    """Which factors may be in FINE: none of them, each, both."""
    factors = list(inputs_of(ranked))
    return [fine for count in range(len(factors) + 1) for fine in combinations(factors, count)]


def product_of(ranked: RankedGroup, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix (m x n) that a group's stored tensors stand for, float32, as the reference modules multiply."""
    inputs = torch.eye(ranked.group.columns, device=next(iter(tensors.values())).device)
    with torch.no_grad():
        return torch.cat([layer(inputs).T for layer in layers_of(ranked, tensors)])


def layers_of(ranked: RankedGroup, tensors: dict[str, torch.Tensor]) -> list[CompressedLinear]:
    """The reference modules of a group's members, float32, without biases. tensors: as stored, by name."""
    group, device = config_group(ranked), next(iter(tensors.values())).device
    layers: list[CompressedLinear] = []
    for name, rows in zip(group.members, ranked.group.member_rows, strict=True):
        first = layers[0] if layers else None
        layer = module_class(group)(ranked.group.columns, rows, group.rank, False, first, group.schemes).to(device)
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        in_type(layer, torch.float32).load_state_dict(own)
        layers.append(layer)
    return layers


def loss_of(error: torch.Tensor, gram: torch.Tensor, outputs: Sequence[OutputGram], group: LinearGroup) -> float:
    """sum over members of mean(diag G) tr(E C E^T) / 2. error: E (m x n); gram: C (n x n), both float64."""
    by_row = ((error @ gram) * error).sum(1).split(list(group.member_rows))
    return sum(output.mean * rows.sum().item() / 2 for output, rows in zip(outputs, by_row, strict=True))


def spend(ways: Sequence[Sequence[Way]], room: int) -> list[Way]:
    """A way for each group, of at most `room` bytes together: from the smallest on, always the change that gains most a
    byte among those that fit. The smallest ways are taken even if they do not fit."""
    chosen = [min(each, key=lambda way: (way.bytes, way.loss)) for each in ways]
    room -= sum(way.bytes for way in chosen)
    while True:
        better = [
            ((now.loss - way.loss) / (way.bytes - now.bytes), group, way)
            for group, now in enumerate(chosen)
            for way in ways[group]
            if way.loss < now.loss and now.bytes < way.bytes <= now.bytes + room
        ]
        if not better:
            return chosen
        _, group, way = max(better, key=lambda change: change[0])
        room -= way.bytes - chosen[group].bytes
        chosen[group] = way


def coarse_bytes(ranked: Sequence[RankedGroup], bits: ByteBudget) -> int:
    """Of the groups, all in COARSE."""
    return sum(bits.cost(each.group, each.rank) for each in ranked)


def check_room_for_bits(budget: Budget, bits: ByteBudget, groups: Sequence[LinearGroup]) -> None:
    """Raises OptionError if ranks that are alike need much more than `bits` in COARSE."""
    allowed = bits.numbers(groups)
    needed = coarse_bytes(budget.ranked(groups, budget.uniform_ranks(groups)), bits)
    if needed > SPREAD * allowed:
        raise OptionError(
            f"--bytes leaves {allowed} bytes, but ranks that are alike need {needed} in {COARSE}; "
            "allow more, or remove more"
        )


def ranked_within(
    budget: Budget, bits: ByteBudget | None, groups: Sequence[LinearGroup], ideal: Sequence[float]
) -> list[RankedGroup]:
    """The groups at whole ranks near `ideal` on the budget, lower ones where they would not fit `bits` in COARSE: how
    many bytes a parameter takes depends on the ranks a little. Raises OptionError if the lowest ranks do not fit."""
    ranked = budget.ranked(groups, ideal)
    while bits and (needed := coarse_bytes(ranked, bits)) > (allowed := bits.numbers(groups)):
        logger.warning("--bytes takes a little more than asked: these ranks need %d bytes in %s", needed, COARSE)
        budget = replace(budget, kept=budget.kept * min(allowed / needed, STEP_DOWN))
        ranked = budget.ranked(groups, ideal)
    return ranked


def choose_bits(
    ranked: Sequence[RankedGroup],
    factors_of: Callable[[LinearGroup], Pair],
    decomposition: Decomposition,
    budget: ByteBudget,
    tokens: int,
) -> list[RankedGroup]:
    """The groups, all of COARSE weights, with the factors in FINE that the budget has room for.

    factors_of: gives A and B of a group that does not stay dense, at its rank; tokens: that calibration has seen.
    """
    ways = [ways_of(each, factors_of, decomposition, budget.storage, tokens) for each in ranked]
    chosen = spend(ways, budget.numbers([each.group for each in ranked]))
    return [way.of(each) for way, each in zip(chosen, ranked, strict=True)]
