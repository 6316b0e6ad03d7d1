"""Rescaling: kept directions are weighted anew, by a second-order step in the loss of the truncated model.

A plain truncation leaves the singular values that are kept as they were, which is best for each group by itself and its
dense inputs. What all groups have lost together shifts the optimum. With s the weights of the directions of every
group, A diag(s) B, at s = 1 a Gauss-Newton step is s_j = 1 - g_j / F_jj: g is the gradient of KL(teacher || student) at
the truncated student, and F the Fisher matrix, whose diagonal `kfac` whitening gives in closed form: sigma_j^2 over the
squared number of calibration tokens; of factors that were refitted since it is an approximation. Its blocks are
diagonal within a group (the whitening made them so), but groups do act on each other, so that a whole step goes too
far: its length is searched on windows kept aside. A group's directions share weights in a few bands, or else the
gradient's noise outweighs it in a model of many directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fermisvd.batches import step_windows
from fermisvd.fermigrad import STEP_TOKENS
from fermisvd.gates import GatedGroup, GatedLinear
from fermisvd.losses import StudentLoss, kl_of_states
from fermisvd.running.blocks import checkpointed
from fermisvd.running.distributed import own_passes, sum_over_processes
from fermisvd.running.halves import halves_of
from fermisvd.teacher import Taught

BANDS = 32  # of a group's directions, from the largest singular values to the smallest kept ones
ROUNDS = 3  # each with a gradient of its own
SHORTEST, LONGEST = 1 / 32, 1.0  # steps that are tried, as parts of a whole one


@dataclass(frozen=True)
class Bands:
    """Runs of directions, group after group, that share a weight.

    sizes: directions of each band; ranks: of each group.
    """

    sizes: torch.Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, ranks: Sequence[int], count: int = BANDS) -> "Bands":
        """`count` in each group, as equal as they can be; a group of fewer directions has one each."""
        sizes = [len(part) for rank in ranks for part in torch.arange(rank).tensor_split(min(count, rank))]
        return cls(torch.tensor(sizes), tuple(ranks))

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (directions,) over each band."""
        return torch.stack([part.sum() for part in values.split(self.sizes.tolist())])

    def weights(self, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """s of each group, (r,), of the bands' scales (bands,); differentiable."""
        return scales.repeat_interleave(self.sizes).split(self.ranks)


def rescale(
    model: nn.Module,
    gated: Sequence[GatedGroup],
    sigmas: Sequence[torch.Tensor],
    tokens: int,
    training: Taught,
    aside: Taught,
    *,
    batch_size: int,
    on_round: Callable[[dict], None] = lambda _: None,
) -> list[torch.Tensor]:
    """s of each group, (r,) float32: by what A's columns are to be multiplied.

    model: holds the gated layers of `install_gates`, of A (m x r) and B (r x n) cut to the groups' ranks; sigmas: the
    kept singular values of `kfac` whitening, (r,) each, gathered over so many calibration `tokens`; training: windows
    of the gradient, aside: others, on which every round must lower the loss. on_round sees each round's record: step,
    kl before and after on the windows aside. Of several processes each takes its part of the windows.
    """
    bands = Bands.of([len(sigma) for sigma in sigmas])
    curvature = bands.sums(torch.cat(list(sigmas)).double().square().cpu()) / tokens**2
    scales, loss = torch.ones(len(bands.sizes), dtype=torch.float64), StudentLoss(model, aside, batch_size)

    def kl_at(candidate: torch.Tensor) -> float:
        put_weights(gated, bands.weights(candidate))
        return loss()

    def along(start: torch.Tensor, whole: torch.Tensor, length: float) -> float:
        return kl_at(start + length * whole)

    current = kl_at(scales)
    for number in range(ROUNDS):
        newton = -gradient(model, gated, bands, scales, training, batch_size) / curvature.clamp(min=1e-30)
        whole = newton.clamp(-1, 1)  # a direction that the calibration hardly saw may not run away
        step, kl = search(partial(along, scales, whole), current)
        on_round({"round": number, "step": step, "kl": current, "rescaled_kl": kl})
        if not step:
            break
        scales, current = scales + step * whole, kl
    put_weights(gated, bands.weights(scales))
    return [weights.float() for weights in bands.weights(scales)]


def search(loss: Callable[[float], float], current: float) -> tuple[float, float]:
    """The step, doubled from SHORTEST while the loss falls, and its loss; 0 and the current loss if it never does."""
    best = (0.0, current)
    length = SHORTEST
    while length <= LONGEST and (kl := loss(length)) < best[1]:
        best, length = (length, kl), 2 * length
    return best


def gradient(
    model: nn.Module, gated: Sequence[GatedGroup], bands: Bands, scales: torch.Tensor, taught: Taught, batch_size: int
) -> torch.Tensor:
    """d KL / d scales, (bands,) float64, over all windows."""
    halves, device, (windows, length) = halves_of(model), gated[0].device, taught.windows.shape
    leaf, at_once = scales.clone().requires_grad_(), step_windows(STEP_TOKENS, length, batch_size)
    with checkpointed(model, activations(model, gated), at_once * length):
        for mine, weight in own_passes(torch.arange(windows), at_once):
            put_weights(gated, bands.weights(leaf))
            batch, states = taught.batch(mine, device)
            (kl_of_states(halves.head, states, halves.body(batch)) * weight).backward()
    assert leaf.grad is not None
    return sum_over_processes(leaf.grad)


def activations(model: nn.Module, gated: Sequence[GatedGroup]) -> int:
    """What the gated layers read and give for a token."""
    given = sum(len(layer.a) for layer in model.modules() if isinstance(layer, GatedLinear))
    return given + sum(shared.b.shape[1] for shared in gated)


def put_weights(gated: Sequence[GatedGroup], weights: Sequence[torch.Tensor]) -> None:
    """s in place of the gates."""
    for shared, own in zip(gated, weights, strict=True):
        shared.set_gate(own.to(shared.device, shared.dtype), len(own))
