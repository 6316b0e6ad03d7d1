"""The svd form's jump: from rank m n / (m + n) on the dense matrix is no larger than its factors, and loses nothing.

Between that rank and k a group pays in full and gets nothing for it, so FermiGrad's gradient, which sees single ranks,
cannot tell whether a group should go dense or stay below. Here each such choice is measured.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fermisvd.budget import Budget
from fermisvd.gates import GatedGroup, cut
from fermisvd.groups import LinearGroup
from fermisvd.losses import StudentLoss
from fermisvd.teacher import Taught

CANDIDATES = 32  # groups nearest to their jump that are tried, so that the cost does not grow with the model


def jump_rank(group: LinearGroup) -> float:
    """The real rank at which U and U^T W store as many numbers as the matrix, m n / (m + n)."""
    return group.dense_parameters / (group.rows + group.columns)


class DenseChoice:
    """Which groups are dense, as marks (groups,), and the real ranks that a choice of marks leaves the others."""

    def __init__(self, groups: Sequence[LinearGroup], mus: Sequence[float], budget: Budget):
        self.counts = budget.soft(groups)
        self.numbers = budget.numbers(groups)
        self.share = torch.tensor(list(mus), dtype=torch.float64) / self.counts.full_rank
        self.low = torch.clamp(budget.minimum_rank / self.counts.full_rank, max=1.0)
        jumps = torch.tensor([jump_rank(group) for group in groups], dtype=torch.float64)
        self.jump = torch.maximum(jumps / self.counts.full_rank, self.low)

    def affordable(self, dense: torch.Tensor) -> bool:
        """Whether the others at their lowest ranks leave room for the dense ones."""
        return self.counts.counts(torch.where(dense, 1.0, self.low)).sum().item() <= self.numbers

    def start(self) -> torch.Tensor:
        """Groups beyond their jump are dense, but for those nearest to it that are too dear."""
        dense = self.share > self.jump
        while dense.any() and not self.affordable(dense):
            dense[torch.where(dense, self.share - self.jump, torch.inf).argmin()] = False
        return dense

    def ranks(self, dense: torch.Tensor) -> list[float]:
        """Real ranks on the budget: the dense groups' k, the others shifted together in mu/k, at most to their jump;
        one that comes down starts at the others' mean share of their jumps."""
        high, below = torch.where(dense, 1.0, self.jump), self.share <= self.jump
        mean = (self.share / self.jump)[below].mean() if below.any() else 0.5
        start = torch.where(~dense & ~below, mean * self.jump, self.share)
        kept = self.numbers / self.counts.total
        low = torch.where(dense, 1.0, self.low)
        return (self.counts.project(start, kept, low, high) * self.counts.full_rank).tolist()

    def nearest(self, count: int) -> list[int]:
        """The groups nearest to their jumps."""
        return (self.share - self.jump).abs().argsort().tolist()[:count]


@torch.no_grad()
def choose_dense(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    gated: Sequence[GatedGroup],
    mus: Sequence[float],
    budget: Budget,
    aside: Taught,
    *,
    batch_size: int,
    on_choice: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[dict]]:
    """Real ranks, each k or at most the jump, after measuring for every group near its jump which of the two it takes.

    model: holds the gated layers of `install_gates`; mus: FermiGrad's real ranks; budget: in svd form; aside:
    windows of the loss KL(dense || student), of the ranks as the budget makes them whole. A group that goes dense is
    paid for by all others; one that comes down leaves them what it gave.
    Every choice is measured alone, and those that help again beside the ones accepted, the most valuable first. Returns
    the ranks and a record of each choice. on_choice: called twice for each, when it was measured alone and when it is
    made. Raises OptionError if the lowest ranks exceed the budget.
    """
    choice = DenseChoice(groups, mus, budget)
    loss = StudentLoss(model, aside, batch_size)

    def measure(ranks: Sequence[float]) -> float:
        cut(gated, budget.ranks(groups, ranks))
        return loss()

    dense = choice.start()
    ranks, records = choice.ranks(dense), []
    best = start = measure(ranks)

    def flipped(index: int) -> tuple[torch.Tensor, list[float], float]:
        """Marks, ranks and loss with this group's choice turned; an infinite loss where that is too dear."""
        trial = dense.clone()
        trial[index] = ~trial[index]
        candidate = choice.ranks(trial)
        return trial, candidate, measure(candidate) if choice.affordable(trial) else torch.inf

    alone: dict[int, float] = {}
    for index in choice.nearest(CANDIDATES):
        alone[index] = flipped(index)[2]
        on_choice()
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
        on_choice()
    cut(gated, [shared.full_rank for shared in gated])
    return ranks, records
