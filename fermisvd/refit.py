"""Sequential refit: each group is fitted again to the inputs it will really see, behind compressed layers.

With X' the compressed model's inputs and X the dense model's, the map of least error |M X' - Y|^2 to a mixture of
dense and own outputs, Y = (1 - alpha) W X + alpha W X' (MPIFA's mixture), is
W' = W ((1 - alpha) X X'^T + alpha X' X'^T) (X' X'^T)^{-1}; its data-aware SVD with C' = X' X'^T gives the new factors
at the rank the group has. Groups that read the same input are refitted together, and only where that lowers the loss on
a few windows kept aside.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel

from fermisvd.budget import RankedGroup
from fermisvd.calibration import TOKENS, product
from fermisvd.decomposition import Factors
from fermisvd.groups import LinearGroup, stacked_weight
from fermisvd.linear import linear_layer, weight_of
from fermisvd.losses import Pair, StudentLoss, set_products, set_weight
from fermisvd.running.blocks import BlocksError, DecoderBlocks
from fermisvd.running.distributed import own_part, sum_over_processes
from fermisvd.teacher import Taught

logger = logging.getLogger("fermisvd")

Decompose = Callable[[LinearGroup, torch.Tensor, torch.Tensor], Factors]
MIXTURES = (0.0, 0.5)  # alpha, tried in turn
TRIAL_WINDOWS = 8  # of those kept aside: all of them gain 1 % more at most (docs/decisions.md)
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
    on_source: Callable[[dict], None] = lambda _: None,
) -> dict[str, Pair]:
    """A (m x r) and B (r x n) of the groups, by name, whose refit lowers KL(dense || student) on windows kept aside.

    dense: may be streamed, a block is asked for at a time; student: the same model with the groups' weights replaced by
    their low-rank products; it is changed as refits are accepted. windows: token ids (samples, length), of which the
    last that do not fill a batch are left out; decompose: data-aware factors of W M from (group, M, Gram matrix).
    on_source sees each source's record: its name, kl before, best candidate's kl, its mixture. Of a model that is no
    plain row of blocks nothing is refitted, which is said.
    """
    if not len(windows):
        return {}
    batch_size = min(batch_size, len(windows))
    device = next(student.parameters()).device
    batches = own_part(windows[: len(windows) // batch_size * batch_size].to(device).split(batch_size))
    models = DecoderBlocks(dense), DecoderBlocks(student)
    try:
        hidden = [[blocks.first(batch) for batch in batches] for blocks in models]
    except BlocksError as error:
        logger.warning("%s; its groups are not refitted", error)
        return {}
    loss = StudentLoss(student, aside, batch_size).from_a_block(min(TRIAL_WINDOWS, len(aside)))
    found, current = {}, loss()
    for index in range(len(models[0].blocks)):
        inside = [each for each in ranked if each.group.name.startswith(f"{models[0].prefix}.{index}.")]
        with models[0].present(index):
            for source, readers in groupby(inside, key=lambda each: each.group.source):
                loss.begin_at(source)
                inputs = _input_sums(models, hidden, index, source)
                kl, mixture, pairs = _best_refit(student, list(readers), inputs, decompose, loss)
                on_source({"source": source, "kl": current, "refitted_kl": kl, "mixture": mixture})
                if kl < current:
                    set_products(student, pairs.items())
                    found, current = found | {group.name: pair for group, pair in pairs.items()}, kl
            for blocks, states in zip(models, hidden, strict=True):
                states[:] = [blocks.run(index, batch) for batch in states]
    return found


def _best_refit(
    student: PreTrainedModel,
    ranked: Sequence[RankedGroup],
    inputs: Pair,
    decompose: Decompose,
    loss: Callable[[], float],
) -> tuple[float, float, dict[LinearGroup, Pair]]:
    """The lowest loss of a student whose groups of one source were refitted, the mixture, and their A and B; it is left
    as it was. inputs: X X'^T and X' X'^T."""
    before = [(each.group, stacked_weight(student, each.group).clone()) for each in ranked]
    (cross, gram), trials = inputs, []
    for mixture in MIXTURES:
        pairs = {}
        for each in ranked:
            a, b = decompose(each.group, refit_map(cross, gram, mixture), gram).truncated(each.rank)
            set_weight(student, each.group, a @ b)
            pairs[each.group] = a.to(torch.float32, copy=True), b.to(torch.float32, copy=True)  # not the whole factors
        trials.append((loss(), mixture, pairs))
    for group, weight in before:
        set_weight(student, group, weight)
    return min(trials, key=lambda trial: trial[0])


def _input_sums(
    models: tuple[DecoderBlocks, DecoderBlocks], hidden: Sequence[list[torch.Tensor]], index: int, source: str
) -> Pair:
    """X X'^T and X' X'^T of a source's inputs, (n x n) float64, over the windows of all processes: X the dense model's,
    X' the student's; from one more run of its block in both."""
    inputs: list[torch.Tensor] = []
    hooks = [
        blocks.model.get_submodule(source).register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, -2)))
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
            for x, own in zip(*(each.split(TOKENS) for each in inputs), strict=True):
                cross += product(x.T, own)
                gram += product(own.T, own)
    finally:
        for hook in hooks:
            hook.remove()
    return sum_over_processes(cross), sum_over_processes(gram)
