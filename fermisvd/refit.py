"""Sequential refit: each group is fitted again to the inputs it will really see, behind compressed layers.

With X' the compressed model's inputs and X the dense model's, the map of least error |M X' - Y|^2 to a mixture of
dense and own outputs, Y = (1 - alpha) W X + alpha W X' (MPIFA's mixture), is
W' = W ((1 - alpha) X X'^T + alpha X' X'^T) (X' X'^T)^{-1}; its data-aware SVD with C' = X' X'^T gives the new factors
at the rank the group has. A group is refitted only where that lowers the loss on windows kept aside.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel

from fermisvd.budget import RankedGroup
from fermisvd.decomposition import Factors
from fermisvd.groups import LinearGroup, stacked_weight
from fermisvd.linear import linear_layer, weight_of
from fermisvd.losses import Pair, StudentLoss, set_weight
from fermisvd.running.blocks import DecoderBlocks
from fermisvd.running.distributed import own_part, sum_over_processes
from fermisvd.teacher import Taught

Decompose = Callable[[LinearGroup, torch.Tensor, torch.Tensor], Factors]
MIXTURES = (0.0, 0.5)  # alpha, tried in turn
REFIT_DAMPING = 1e-3  # of mean(diag C'): pulls W' towards W in directions that few tokens use


def refit_map(cross: torch.Tensor, gram: torch.Tensor, mixture: float, damping: float = REFIT_DAMPING) -> torch.Tensor:
    """M (n x n), float64, with W' = W M. cross: X X'^T, gram: X' X'^T, both (n x n); mixture: alpha.

    Inputs that are all zero give the identity.
    """
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    ridge = damping * gram.double().diagonal().mean() * identity
    if not gram.any():
        return identity
    target = (1 - mixture) * cross.double() + mixture * gram.double()
    return torch.linalg.solve(gram.double() + ridge, (target + ridge).T).T  # both damped alike: W' -> W


@torch.no_grad()
def refit(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    ranked: Sequence[RankedGroup],
    windows: torch.Tensor,
    aside: Taught,
    decompose: Decompose,
    *,
    batch_size: int,
    on_group: Callable[[dict], None] = lambda _: None,
) -> dict[str, Pair]:
    """A (m x r) and B (r x n) of the groups whose refit lowers KL(dense || student) on the windows kept aside.

    dense: may be streamed, a block is asked for at a time; student: the same model with the groups' weights replaced by
    their low-rank products; it is changed as refits are accepted. windows: token ids (samples, length), of which the
    last that do not fill a batch are left out; decompose: data-aware factors of W M from (group, M, Gram matrix).
    on_group sees each group's record: name, kl before, best candidate's kl, its mixture.
    """
    if not len(windows):
        return {}
    batch_size = min(batch_size, len(windows))
    device = next(student.parameters()).device
    batches = own_part(windows[: len(windows) // batch_size * batch_size].to(device).split(batch_size))
    models = DecoderBlocks(dense), DecoderBlocks(student)
    hidden = [[blocks.first(batch) for batch in batches] for blocks in models]
    loss = StudentLoss(student, aside, batch_size).from_a_block()
    found, current = {}, loss()
    for index in range(len(models[0].blocks)):
        inside = [each for each in ranked if each.group.name.startswith(f"{models[0].prefix}.{index}.")]
        with models[0].present(index):
            for source, readers in groupby(inside, key=lambda each: each.group.source):
                inputs = _input_grams(models, hidden, index, source)
                loss.begin_at(source)
                for each in readers:
                    current, better = _refitted(student, each, inputs, decompose, loss, current, on_group)
                    if better is not None:
                        found[each.group.name] = better
            for blocks, states in zip(models, hidden, strict=True):
                states[:] = [blocks.run(index, batch) for batch in states]
    return found


def _refitted(
    student: PreTrainedModel,
    ranked: RankedGroup,
    inputs: Pair,
    decompose: Decompose,
    loss: Callable[[], float],
    current: float,
    on_group: Callable[[dict], None],
) -> tuple[float, Pair | None]:
    """The loss, and A and B, once a group is refitted in the student; the loss as it was (current) and None where that
    does not lower it. inputs: X X'^T and X' X'^T."""
    (cross, gram), group = inputs, ranked.group
    before = stacked_weight(student, group).clone()
    trials = []
    for mixture in MIXTURES:
        a, b = decompose(group, refit_map(cross, gram, mixture), gram).truncated(ranked.rank)
        set_weight(student, group, a @ b)
        trials.append((loss(), mixture, a, b))
    kl, mixture, a, b = min(trials, key=lambda trial: trial[0])
    on_group({"group": group.name, "kl": current, "refitted_kl": kl, "mixture": mixture})
    set_weight(student, group, a @ b if kl < current else before)
    return (kl, (a, b)) if kl < current else (current, None)


def _input_grams(
    models: tuple[DecoderBlocks, DecoderBlocks], hidden: list[list[torch.Tensor]], index: int, source: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """X X'^T and X' X'^T of a layer's inputs, float64, over the windows of all processes, from one more run of its
    block in both models."""
    inputs: list[torch.Tensor] = []
    hooks = [
        blocks.model.get_submodule(source).register_forward_pre_hook(
            lambda _, x: inputs.append(x[0].flatten(0, -2).double())
        )
        for blocks in models
    ]
    width = weight_of(linear_layer(models[0].model, source)).shape[1]
    cross = torch.zeros(width, width, dtype=torch.float64, device=next(models[1].model.parameters()).device)
    gram = torch.zeros_like(cross)
    try:
        for pair in zip(*hidden, strict=True):
            inputs.clear()
            for blocks, states in zip(models, pair, strict=True):
                blocks.run(index, states)
            x, seen = inputs
            cross.addmm_(x.T, seen)
            gram.addmm_(seen.T, seen)
    finally:
        for hook in hooks:
            hook.remove()
    return sum_over_processes(cross), sum_over_processes(gram)
