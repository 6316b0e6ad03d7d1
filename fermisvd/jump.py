"""The svd form's jump: from rank m n / (m + n) on the dense matrix is no larger than its factors, and loses nothing.

Between that rank and k a group pays in full and gets nothing for it, so FermiGrad's gradient, which sees single ranks,
cannot tell whether a group should go dense or stay below. Here each such choice is measured.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fermisvd.budget import round_to_budget
from fermisvd.fermigrad import GatedGroup, SoftBudget, open_gates
from fermisvd.groups import LinearGroup
from fermisvd.losses import kl_divergence

CANDIDATES = 64  # groups nearest to their jump that are tried, so that the cost does not grow with the model


def jump_rank(group: LinearGroup) -> float:
    """The real rank at which U and U^T W store as many numbers as the matrix, m n / (m + n)."""
    return group.dense_parameters / (group.rows + group.columns)


@torch.no_grad()
def settle_jump(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    gated: Sequence[GatedGroup],
    mus: Sequence[float],
    budget: int,
    windows: torch.Tensor,
    minimum_rank: int = 1,
    batch_size: int = 8,
) -> tuple[list[float], list[dict]]:
    """Real ranks, each k or at most the jump, after measuring for every group near its jump which of the two it takes.

    model: holds the gated layers of `install_gates`; mus: FermiGrad's real ranks; budget: numbers that may stay,
    counted in svd form; windows: token ids (samples, length) of the loss KL(dense || student). A group's change is
    paid for by, or shared among, all groups that are not dense, shifted together in mu/k.
    Returns the ranks and a record of each choice tried. Raises BudgetError if the lowest ranks exceed the budget.
    """
    counts = SoftBudget(groups, "svd")
    state = torch.tensor(list(mus), dtype=torch.float64) / counts.full_rank
    low = torch.clamp(minimum_rank / counts.full_rank, max=1.0)
    jump = torch.maximum(counts.dense / counts.width / counts.full_rank, low)
    batches = windows.to(next(model.parameters()).device).split(batch_size)

    def affordable(dense: torch.Tensor) -> bool:
        return counts.counts(torch.where(dense, 1.0, low)).sum().item() <= budget

    def on_budget(dense: torch.Tensor) -> list[float]:
        high = torch.where(dense, 1.0, jump)
        kept = budget / counts.dense.sum().item()
        return (counts.project(state, kept, torch.where(dense, 1.0, low), high) * counts.full_rank).tolist()

    def measure(ranks: Sequence[float]) -> float:
        whole = round_to_budget(groups, ranks, budget, "svd", 1, minimum_rank)
        return sum(truncated_kl(model, gated, whole, batch) * len(batch) for batch in batches) / len(windows)

    dense = state > jump
    while dense.any() and not affordable(dense):
        dense[torch.where(dense, state - jump, torch.inf).argmin()] = False
    ranks, records = on_budget(dense), []
    best = measure(ranks)
    for index in (state - jump).abs().argsort().tolist()[:CANDIDATES]:
        trial = dense.clone()
        trial[index] = ~trial[index]
        if affordable(trial):
            kl = measure(candidate := on_budget(trial))
            records.append({"group": groups[index].name, "dense": bool(trial[index]), "kl": kl, "kl_before": best})
            if kl < best:
                best, dense, ranks = kl, trial, candidate
    return ranks, records


def truncated_kl(model: nn.Module, gated: Sequence[GatedGroup], ranks: Sequence[int], batch: torch.Tensor) -> float:
    """KL(dense || student) of a batch (windows, length), every group cut to its rank. Leaves the gates open."""
    open_gates(gated)
    teacher = model(input_ids=batch, use_cache=False).logits
    for shared, rank in zip(gated, ranks, strict=True):
        shared.set_gate(None, rank)
    kl = kl_divergence(teacher, model(input_ids=batch, use_cache=False).logits).item()
    open_gates(gated)
    return kl
