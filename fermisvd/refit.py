"""Sequential refit: each group is fitted again to the inputs it will really see, behind compressed layers.

With X' the compressed model's inputs and X the dense model's, the map of least error |M X' - Y|^2 to a mixture of
dense and own outputs, Y = (1 - alpha) W X + alpha W X' (MPIFA's mixture), is
W' = W ((1 - alpha) X X'^T + alpha X' X'^T) (X' X'^T)^{-1}; its data-aware SVD with C' = X' X'^T gives the new factors
at the rank the group has. A group is refitted only where that lowers the loss on windows kept aside.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from fermisvd.decomposition import Factors, damped
from fermisvd.groups import LinearGroup, decoder_blocks, stacked_weight
from fermisvd.losses import StudentLoss, set_weight

MIXTURES = (0.0, 0.5)  # alpha, tried in turn
DAMPING = 1e-3  # of mean(diag C'): pulls W' towards W in directions that few tokens use


def refit_weight(
    weight: torch.Tensor, cross: torch.Tensor, gram: torch.Tensor, mixture: float, damping: float = DAMPING
) -> torch.Tensor:
    """W' (m x n), float64. cross: X X'^T, gram: X' X'^T, both (n x n); mixture: alpha."""
    target = damped((1 - mixture) * cross + mixture * gram, 0.0)
    ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    solved = torch.linalg.solve(gram.double() + ridge, (target + ridge).T).T  # both damped alike: W' -> W
    return weight.double() @ solved


class BlockReplay:
    """Runs a model's decoder blocks one by one over fixed batches, keeping the hidden states before the next block."""

    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor]):
        """batches: token ids, all of one shape. What each block is called with besides hidden states is recorded
        once: it does not depend on the tokens."""
        self.blocks = list(model.get_submodule(decoder_blocks(model)).children())
        self.arguments: list[tuple[tuple, dict[str, Any]]] = []
        self.hidden: list[torch.Tensor] = []
        for batch in batches:
            self.hidden.append(self._first_hidden(model, batch, record=not self.arguments))

    def _first_hidden(self, model: nn.Module, batch: torch.Tensor, record: bool) -> torch.Tensor:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def see(_, args, kwargs):
            calls.append((args, kwargs))
            if not record:
                raise _Stop

        hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in self.blocks]
        try:
            getattr(model, "base_model", model)(input_ids=batch, use_cache=False)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if record:
            self.arguments = [
                (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}) for args, kwargs in calls
            ]
        args, kwargs = calls[0]
        return args[0] if args else kwargs["hidden_states"]

    def run(self, index: int, keep: bool) -> None:
        """Block `index` over all batches; keep: whether its outputs become the hidden states."""
        args, kwargs = self.arguments[index]
        for i, hidden in enumerate(self.hidden):
            out = self.blocks[index](hidden, *args, **kwargs)
            if keep:
                self.hidden[i] = out[0] if isinstance(out, tuple) else out


class _Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


@torch.no_grad()
def refit(
    dense: nn.Module,
    student: nn.Module,
    groups: Sequence[LinearGroup],
    ranks: Sequence[int],
    windows: torch.Tensor,
    aside: torch.Tensor,
    decompose: Callable[[LinearGroup, torch.Tensor, torch.Tensor], Factors],
    batch_size: int = 8,
    on_group: Callable[[dict], None] = lambda _: None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (m x r) and B (r x n) of the groups whose refit lowers KL(dense || student) on the windows kept aside.

    student: the same model with the groups' weights replaced by their low-rank products; it is changed as refits are
    accepted. windows, aside: token ids (samples, length); decompose: factors of (group, weight, Gram matrix).
    on_group sees each group's record: name, kl before, best candidate's kl, its mixture.
    """
    batches = windows[: len(windows) // batch_size * batch_size].split(batch_size)
    replays = BlockReplay(dense, batches), BlockReplay(student, batches)
    prefix = decoder_blocks(dense)
    loss = StudentLoss(dense, aside, batch_size)
    found, current, members = {}, loss(student), list(zip(groups, ranks, strict=True))
    for index in range(len(replays[0].blocks)):
        inside = [(g, r) for g, r in members if g.name.startswith(f"{prefix}.{index}.")]
        for source, readers in groupby(inside, key=lambda pair: pair[0].source):
            cross, gram = _input_grams(dense, student, replays, index, source)
            for group, rank in readers:
                weight, before = stacked_weight(dense, group), stacked_weight(student, group).clone()
                best = None
                for mixture in MIXTURES:
                    factors = decompose(group, refit_weight(weight, cross, gram, mixture), gram)
                    a, b = factors.truncated(rank)
                    set_weight(student, group, a @ b)
                    kl = loss(student)
                    if best is None or kl < best[0]:
                        best = (kl, mixture, a, b)
                assert best is not None
                on_group({"group": group.name, "kl": current, "refitted_kl": best[0], "mixture": best[1]})
                if best[0] < current:
                    current, found[group.name] = best[0], best[2:]
                    set_weight(student, group, best[2] @ best[3])
                else:
                    set_weight(student, group, before)
        for replay in replays:
            replay.run(index, keep=True)
    return found


def _input_grams(
    dense: nn.Module, student: nn.Module, replays: tuple[BlockReplay, BlockReplay], index: int, source: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """X X'^T and X' X'^T of a layer's inputs, float64, from one more run of its block in both models."""
    inputs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    hooks = [
        model.get_submodule(source).register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0].flatten(0, -2)))
        for model, kept in zip((dense, student), inputs, strict=True)
    ]
    for replay in replays:
        replay.run(index, keep=False)
    for hook in hooks:
        hook.remove()
    width = inputs[0][0].shape[1]
    cross = torch.zeros(width, width, dtype=torch.float64, device=inputs[0][0].device)
    gram = torch.zeros_like(cross)
    for x, seen in zip(*inputs, strict=True):
        cross.addmm_(x.double().T, seen.double())
        gram.addmm_(seen.double().T, seen.double())
    return cross, gram
