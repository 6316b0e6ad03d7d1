"""FermiGrad: globally optimal ranks by gradient descent through a Fermi gate on each group's spectrum.

Only one mu a group is trained, by KL(teacher || student), under a parameter budget. What is trained is the share mu/k,
so that one learning rate serves layers of any width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import model_validator
from transformers import PreTrainedModel

from fermisvd.batches import shuffled_batches, step_windows
from fermisvd.budget import Budget, Form, SoftBudget, factor_parameters
from fermisvd.errors import NumericalError
from fermisvd.gates import GatedGroup, open_gates, set_gates
from fermisvd.groups import LinearGroup
from fermisvd.losses import kl_of_states
from fermisvd.running.blocks import KEPT_ACTIVATIONS, checkpointed, device_of
from fermisvd.running.distributed import own_passes, process_count, sum_over_processes
from fermisvd.running.halves import Halves, halves_of
from fermisvd.settings import Count, Settings, option
from fermisvd.teacher import Taught

PLATEAU_STEPS = 12
LARGEST_PENALTY = 1e100
STEP_TOKENS = 4096  # more were no better (docs/decisions.md)


class FermiGradSettings(Settings):
    """Options of the rank optimisation."""

    steps: Annotated[Count, option("FermiGrad steps.")] = 64
    step_tokens: Annotated[Count, option("Most tokens a step, of at most --batch-size windows; fewer are faster.")] = (
        STEP_TOKENS
    )
    temperature: Annotated[float, option("T of the Fermi gate, over each group's full rank.", ge=1e-6, le=1)] = 0.01
    constraint: Annotated[Literal["projection", "penalty"], option("How FermiGrad holds the budget.")] = "projection"
    learning_rate: Annotated[float, option("Adam's, of each group's rank over its full rank.", gt=0)] = 0.02
    anneal: Annotated[
        float, option("Fraction of the steps over which the projection lowers the budget.", gt=0, le=1)
    ] = 0.4
    plateau: Annotated[
        float, option("End once twelve steps lower the loss by less than this fraction; 0: never.", ge=0)
    ] = 0.0
    penalty: Annotated[float, option("rho of the paper's penalty, of counts over the dense count.", gt=0)] = 1.0
    penalty_growth: Annotated[float, option("alpha: growth of the penalty a step.", ge=1)] = 1.03
    count: Annotated[Form | None, option("Form whose parameters FermiGrad counts.", shown="as --form")] = None

    @model_validator(mode="after")
    def _penalty_is_a_number(self) -> Self:
        if math.log(self.penalty) + self.steps * math.log(self.penalty_growth) > math.log(LARGEST_PENALTY):
            growth, steps = self.penalty_growth, self.steps
            raise ValueError(f"--penalty-growth {growth}: {steps} --steps of it are beyond every number")
        return self


def kept_fraction(groups: Sequence[LinearGroup], budget: Budget, count: Form) -> float:
    """Fraction of the groups' parameters that may stay, counted in the form `count`.

    Where that is not the budget's (the paper counts svd and applies PivGa afterwards), the target is the count of the
    uniform ranks that remove the same.
    """
    target: float = budget.numbers(groups)
    if count != budget.form:
        uniform = zip(groups, budget.uniform_ranks(groups), strict=True)
        target = sum(factor_parameters(rank, group.rows, group.columns, count) for group, rank in uniform)
    return target / budget.total(groups)


class RankOptimiser:
    """The shares mu/k of all groups, (groups,) float64, in the box r_min/k <= share <= high; Adam moves them, and the
    settings' constraint holds them to the fraction `kept` of the parameters."""

    def __init__(self, groups: Sequence[LinearGroup], budget: Budget, settings: FermiGradSettings):
        count = settings.count or budget.form
        self.settings, self.kept = settings, kept_fraction(groups, budget, count)
        self.budget = budget.soft(groups) if count == budget.form else SoftBudget(groups, count, capped=False)
        self.high = 1 + 6 * settings.temperature
        self.low = torch.clamp(budget.minimum_rank / self.budget.full_rank, max=1.0)
        self.share = torch.full_like(self.budget.full_rank, self.high, requires_grad=True)
        self.full = self.budget.fraction(self.share.detach())  # 1, or more where the count is not capped
        self.adam = torch.optim.Adam([self.share], lr=settings.learning_rate, betas=(0.9, 0.99))

    def mus(self) -> torch.Tensor:
        """Real ranks, (groups,), differentiable in the shares."""
        return self.share * self.budget.full_rank

    def final_mus(self) -> list[float]:
        """Real ranks on the budget, at most k."""
        final = self.budget.project(self.share.detach(), self.kept, self.low, self.high)
        return (final.clamp(max=1) * self.budget.full_rank).tolist()

    def step(self, number: int) -> None:
        """Move the shares by their gradient, which has been summed over all processes."""
        self._anneal_learning_rate(number)
        {"penalty": self._step_with_penalty, "projection": self._step_and_project}[self.settings.constraint](number)

    def _step_with_penalty(self, number: int) -> None:
        """+ rho (N_param - N_target)^2, rho growing by alpha a step (the paper)."""
        share = self.share.detach()
        rho = self.settings.penalty * self.settings.penalty_growth**number
        assert self.share.grad is not None
        self.share.grad += 2 * rho * (self.budget.fraction(share) - self.kept) * self.budget.price(share)
        self.adam.step()
        with torch.no_grad():
            self.share.copy_(torch.maximum(self.share.clamp(max=self.high), self.low))

    def _step_and_project(self, number: int) -> None:
        """Along the budget's tangent, then all together onto a budget that comes down to the target."""
        progress = min(1.0, (number + 1) / (self.settings.anneal * self.settings.steps))
        allowed = self.full + (self.kept - self.full) * progress
        assert self.share.grad is not None
        self.share.grad = self.budget.tangent(self.share.grad, self.share.detach(), self.low, self.high)
        self.adam.step()
        with torch.no_grad():
            self.share.copy_(self.budget.project(self.share, float(allowed), self.low, self.high))

    def _anneal_learning_rate(self, number: int) -> None:
        """Constant, then linear to a tenth over the last half: the ranks must come to rest."""
        remaining = min(1.0, 2 * (1 - number / self.settings.steps))
        self.adam.param_groups[0]["lr"] = self.settings.learning_rate * (0.1 + 0.9 * remaining)

    def state(self) -> dict:
        """JSON-able, exact."""
        moments = self.adam.state[self.share]
        kept = {name: moments[name].tolist() for name in ("step", "exp_avg", "exp_avg_sq")}
        return {"share": self.share.tolist(), "adam": kept}

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            self.share.copy_(torch.tensor(state["share"], dtype=self.share.dtype))
        moments = {name: torch.tensor(value, dtype=self.share.dtype) for name, value in state["adam"].items()}
        self.adam.state[self.share] = moments | {"step": moments["step"].float()}


def optimise_ranks(
    model: PreTrainedModel,
    groups: Sequence[LinearGroup],
    gated: Sequence[GatedGroup],
    taught: Taught,
    budget: Budget,
    settings: FermiGradSettings,
    *,
    batch_size: int,
    seed: int,
    on_step: Callable[[dict], None] = lambda _: None,
    begun: dict | None = None,
    on_progress: Callable[[dict], None] = lambda _: None,
    at_once: int | None = None,
    kept_bytes: int = KEPT_ACTIVATIONS,
) -> tuple[list[float], list[dict]]:
    """Real ranks mu that minimise KL(teacher || student) on the budget.

    model: holds the gated layers of `install_gates`; taught: windows, of which a step takes batch_size, but no more
    than make the settings' step_tokens, in an order that the seed decides. on_step sees each step's record: step, kl,
    kept, and `share`, the list of mu/k; on_progress what `begun` takes to go on from there, to the same result.
    at_once: windows of a pass, whose gradients are added up to the batch's; kept_bytes: of activations; beyond them
    blocks are computed again for the gradient. Of several processes each takes its part of every batch's windows; the
    gradients are added up.
    Returns one mu a group, on the budget, and the records. Raises NumericalError if the loss is not finite.
    """
    optimiser, halves = RankOptimiser(groups, budget, settings), halves_of(model)
    batch_size = step_windows(settings.step_tokens, taught.windows.shape[1], batch_size, process_count())
    batches = shuffled_batches(len(taught), batch_size, seed)
    activations = sum(group.rows + group.columns for group in groups)  # of a token
    at_once = min(at_once or batch_size, -(-batch_size // process_count()))
    records: list[dict] = []
    model.requires_grad_(False)
    if begun is not None:
        records = list(begun["records"])
        optimiser.restore(begun)
        for _ in records:
            next(batches)
    for number in range(len(records), settings.steps):
        if on_a_plateau(records, optimiser.kept, settings.plateau):
            break
        with checkpointed(model, activations, at_once * taught.windows.shape[1], kept_bytes):
            kl = _backward(halves, taught, gated, next(batches), optimiser, at_once, device_of(model))
        if not kl.isfinite():
            raise NumericalError(
                f"KL is {kl.item()} at FermiGrad step {number}; check the model and the calibration text"
            )
        optimiser.step(number)
        share = optimiser.share.detach()
        record = {"step": number, "kl": kl.item(), "kept": optimiser.budget.fraction(share).item()}
        records.append(record | {"share": [round(value, 4) for value in share.tolist()]})
        on_step(records[-1])
        on_progress(optimiser.state() | {"records": list(records)})
    open_gates(gated)
    return optimiser.final_mus(), records


def _backward(
    halves: Halves,
    taught: Taught,
    gated: Sequence[GatedGroup],
    numbers: torch.Tensor,
    optimiser: RankOptimiser,
    at_once: int,
    device: torch.device,
) -> torch.Tensor:
    """The KL of the windows of these numbers, float64 on the CPU; its gradient is the shares' `grad`."""
    optimiser.adam.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for mine, weight in own_passes(numbers, at_once):
        kl = gated_kl(halves, gated, *taught.batch(mine, device), optimiser.mus(), optimiser.settings.temperature)
        (kl * weight).backward()
        total += kl.detach().double().cpu() * weight
    assert optimiser.share.grad is not None
    sum_over_processes(optimiser.share.grad)
    return sum_over_processes(total)


def gated_kl(
    halves: Halves,
    gated: Sequence[GatedGroup],
    batch: torch.Tensor,
    states: torch.Tensor,
    mus: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """KL(teacher || student) of a batch (windows, length) with the gates at mus (groups,), differentiable in mus.

    states: the teacher's, (windows, length, width).
    """
    set_gates(gated, mus, temperature)
    return kl_of_states(halves.head, states, halves.body(batch))


def on_a_plateau(records: Sequence[dict], kept: float, plateau: float) -> bool:
    """Whether the last PLATEAU_STEPS gained less than the fraction `plateau` on those before, all at the fraction
    `kept` of the parameters, to a thousandth."""
    recent = records[-2 * PLATEAU_STEPS :]
    if not plateau or len(recent) < 2 * PLATEAU_STEPS or any(r["kept"] > kept + 1e-3 for r in recent):
        return False
    before, last = (sum(r["kl"] for r in part) for part in (recent[:PLATEAU_STEPS], recent[PLATEAU_STEPS:]))
    return last > (1 - plateau) * before
