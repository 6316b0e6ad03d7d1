"""The svd form's jump: from rank m n / (m + n) on the dense matrix is no larger than its factors, and loses nothing.

Between that rank and k a group pays in full and gets nothing for it, so FermiGrad's gradient, which sees single ranks,
cannot tell whether a group should go dense or stay below. Here each such choice is measured.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fermisvd.budget import round_to_budget
from fermisvd.fermigrad import GatedGroup, SoftBudget
from fermisvd.groups import LinearGroup
from fermisvd.losses import StudentLoss

CANDIDATES = 32  # groups nearest to their jump that are tried, so that the cost does not grow with the model


def jump_rank(group: LinearGroup) -> float:
    """The real rank at which U and U^T W store as many numbers as the matrix, m n / (m + n)."""
    return group.dense_parameters / (group.rows + group.columns)


class OpenTeacher(nn.Module):
    """The dense model inside a gated one: opens the gates for a pass and puts them back."""

    def __init__(self, model: nn.Module, gated: Sequence[GatedGroup]):
        super().__init__()
        self.model, self.gated = model, gated

    def forward(self, **inputs):
        before = [(shared.gate, shared.open_rank) for shared in self.gated]
        cut(self.gated, [shared.full_rank for shared in self.gated])
        outputs = self.model(**inputs)
        for shared, (gate, open_rank) in zip(self.gated, before, strict=True):
            shared.set_gate(gate, open_rank)
        return outputs


def cut(gated: Sequence[GatedGroup], ranks: Sequence[int]) -> None:
    """Every group at its whole rank: A_r B_r."""
    for shared, rank in zip(gated, ranks, strict=True):
        shared.set_gate(None, rank)


@torch.no_grad()
def settle_jump(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    gated: Sequence[GatedGroup],
    mus: Sequence[float],
    budget: int,
    windows: torch.Tensor,
    align: int | None = None,
    minimum_rank: int = 1,
    batch_size: int = 8,
) -> tuple[list[float], list[dict]]:
    """Real ranks, each k or at most the jump, after measuring for every group near its jump which of the two it takes.

    model: holds the gated layers of `install_gates`; mus: FermiGrad's real ranks; budget: numbers that may stay,
    counted in svd form; windows: token ids (samples, length) of the loss KL(dense || student), of the ranks as
    `round_to_budget` makes them whole. A group that goes dense is paid for by all others, shifted together in mu/k; one
    that comes down starts at the others' mean share of their jumps, and they have what it leaves.
    Every choice is measured alone, and those that help again beside the ones accepted, the most valuable first. Returns
    the ranks and a record of each choice. Raises BudgetError if the lowest ranks exceed the budget.
    """
    counts = SoftBudget(groups, "svd")
    state = torch.tensor(list(mus), dtype=torch.float64) / counts.full_rank
    low = torch.clamp(minimum_rank / counts.full_rank, max=1.0)
    jump = torch.maximum(counts.dense / counts.width / counts.full_rank, low)
    loss = StudentLoss(OpenTeacher(model, gated), windows, batch_size)

    def affordable(dense: torch.Tensor) -> bool:
        return counts.counts(torch.where(dense, 1.0, low)).sum().item() <= budget

    def on_budget(dense: torch.Tensor) -> list[float]:
        high, below = torch.where(dense, 1.0, jump), state <= jump
        share = (state / jump)[below].mean() if below.any() else 0.5
        start = torch.where(~dense & ~below, share * jump, state)
        kept = budget / counts.dense.sum().item()
        return (counts.project(start, kept, torch.where(dense, 1.0, low), high) * counts.full_rank).tolist()

    def measure(ranks: Sequence[float]) -> float:
        cut(gated, round_to_budget(groups, ranks, budget, "svd", align, minimum_rank))
        return loss(model)

    dense = state > jump
    while dense.any() and not affordable(dense):
        dense[torch.where(dense, state - jump, torch.inf).argmin()] = False
    ranks, records = on_budget(dense), []
    best = start = measure(ranks)

    def flipped(index: int) -> tuple[torch.Tensor, list[float], float]:
        """Marks, ranks and loss with this group's choice turned; an infinite loss where that is too dear."""
        trial = dense.clone()
        trial[index] = ~trial[index]
        candidate = on_budget(trial)
        return trial, candidate, measure(candidate) if affordable(trial) else torch.inf

    alone = {i: flipped(i)[2] for i in (state - jump).abs().argsort().tolist()[:CANDIDATES]}
    for index in sorted(alone, key=lambda i: alone[i]):  # the most valuable first, each beside those accepted
        record = {"group": groups[index].name, "dense": not dense[index].item()}
        if alone[index] < torch.inf:
            record["kl_alone"] = alone[index]
        if alone[index] < start:
            trial, candidate, kl = flipped(index)
            record |= {"kl": kl, "kl_before": best}
            if kl < best:
                best, dense, ranks = kl, trial, candidate
        records.append(record)
    cut(gated, [shared.full_rank for shared in gated])
    return ranks, records
