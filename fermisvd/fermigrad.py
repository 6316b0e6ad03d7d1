"""FermiGrad: globally optimal ranks by gradient descent through a Fermi gate on each group's spectrum.

The student layer is A diag(F(mu)) B, where A B = W is the group's ordered decomposition (A = U, B = U^T W with the
paper's whitening); only one mu a group is trained, by KL(teacher || student), under a parameter budget. State is kept
as mu/k, so that one learning rate serves layers of any width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fermisvd.batches import shuffled_batches
from fermisvd.blocks import device_of, forwards
from fermisvd.budget import Form
from fermisvd.distributed import rank, sum_over_processes, world
from fermisvd.errors import FermiSVDError
from fermisvd.groups import LinearGroup, decoder_blocks
from fermisvd.linear import linear_layer
from fermisvd.losses import kl_divergence
from fermisvd.streaming import fill_for_good

Constraint = Literal["projection", "penalty"]
PLATEAU_STEPS = 12
KEPT_ACTIVATIONS = 2 * 2**30  # bytes


@dataclass(frozen=True)
class FermiGradSettings:
    """temperature: T of the gate, in units of k; learning_rate: of mu/k; anneal: fraction of the steps over which
    `projection` lowers the budget from full to the target; plateau: stop once PLATEAU_STEPS steps, at the target, lower
    the mean KL by less than this fraction of the steps before them (0: never); penalty, penalty_growth: rho and alpha
    of the paper's penalty, rho (N - N_target)^2 with both counts as fractions of the dense count."""

    constraint: Constraint = "projection"
    steps: int = 64
    batch_size: int = 8
    temperature: float = 0.01
    learning_rate: float = 0.02
    anneal: float = 0.4
    plateau: float = 0.0
    minimum_rank: int = 1
    penalty: float = 1.0
    penalty_growth: float = 1.03
    seed: int = 0


class FermiGradError(FermiSVDError):
    """The loss became NaN or infinite."""


def fermi_gate(mu: torch.Tensor, full_rank: int, temperature: float) -> torch.Tensor:
    """F_j(mu) = 1 / (1 + exp((j - mu) / (N T))), j = 0..k-1, N = k. mu: scalar; returns (k,)."""
    j = torch.arange(full_rank, dtype=mu.dtype, device=mu.device)
    return torch.sigmoid((mu - j) / (full_rank * temperature))


TAIL = 8.0  # gates below exp(-TAIL) are left out of the products


class GatedGroup(nn.Module):
    """What the members of a gated group share: B of W = A B, (k x n), and the gate.

    `gate` is F (k,), or None for the dense teacher: A B = W. The student is two thin products, x B^T diag(F) A^T, and
    only as wide as the gate is open; nothing of the size of W is made, and B x is computed once for all members.
    """

    def __init__(self, b: torch.Tensor, readers: int = 1):
        super().__init__()
        self.b, self.readers = nn.Parameter(b, requires_grad=False), readers
        self.full_rank, self.dtype, self.device = len(b), b.dtype, b.device  # of B whole, should it be sharded
        self.set_gate(None, self.full_rank)

    def set_gate(self, gate: torch.Tensor | None, open_rank: int) -> None:
        """gate: F (k,) or None; open_rank: how many of its entries are not negligible."""
        self.gate, self.open_rank = gate, open_rank
        self._forget()

    def _forget(self) -> None:
        self._input: torch.Tensor | None = None
        self._projected: torch.Tensor | None = None
        self._reads = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """F B x, (..., open_rank), remembered until all members have read it."""
        if self._projected is None or self._input is not x:
            projected = functional.linear(x, self.b[: self.open_rank])
            self._projected = projected if self.gate is None else projected * self.gate[: self.open_rank]
            self._input, self._reads = x, 0
        projected = self._projected
        self._reads += 1
        if self._reads == self.readers:
            self._forget()
        return projected


class GatedLinear(nn.Module):
    """A member of a gated group. a: its rows of A, (m_i x k)."""

    def __init__(self, a: torch.Tensor, group: GatedGroup, bias: torch.Tensor | None):
        super().__init__()
        self.a, self.group, self.bias = nn.Parameter(a, requires_grad=False), group, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.group(x), self.a[:, : self.group.open_rank], self.bias)


def install_gates(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    factors_of: Callable[[LinearGroup], tuple[torch.Tensor, torch.Tensor]],
    shard: bool = False,
) -> list[GatedGroup]:
    """Replace the groups' linear layers by gated ones, one group at a time, and free the dense weights.

    factors_of: gives A (m x k) and B (k x n) of a group, W = A B. A streamed model's blocks are filled one after the
    other, so that dense weights and factors are never all in memory; shard: with each block's weights then divided
    among the processes (FSDP2), so that the model may be larger than a device. Returns the gated groups, in order.
    """
    gated, prefix = {}, decoder_blocks(model)
    for number, block in model.get_submodule(prefix).named_children():
        fill_for_good(block)
        for group in groups:
            if not group.name.startswith(f"{prefix}.{number}."):
                continue
            layers = [linear_layer(model, name) for name in group.members]
            a, b = (factor.to(layers[0].weight).contiguous() for factor in factors_of(group))
            gated[group.name] = shared = GatedGroup(b, len(layers))
            for name, layer, rows in zip(group.members, layers, a.split(list(group.member_rows)), strict=True):
                model.set_submodule(name, GatedLinear(rows, shared, layer.bias))
        if shard:
            fully_shard(block, reshard_after_forward=True)
    return [gated[group.name] for group in groups]


class SoftBudget:
    """Parameter counts of real-valued ranks, all groups at once, float64.

    capped: whether a group's count stops at m n, as stored; the paper counts r (m + n) however much that is.
    """

    def __init__(self, groups: Sequence[LinearGroup], form: Form, capped: bool = True):
        def column(values):
            return torch.tensor(list(values), dtype=torch.float64)

        self.full_rank = column(g.full_rank for g in groups)
        self.width = column(g.rows + g.columns for g in groups)
        self.dense = column(g.dense_parameters for g in groups)
        self.form, self.capped = form, capped

    def counts(self, state: torch.Tensor) -> torch.Tensor:
        """Parameters of each group at mu = state * k. In svd form a capped count stops at m n."""
        rank = state.clamp(0, 1) * self.full_rank
        if self.form == "pivga":
            return rank * (self.width - rank)
        return torch.minimum(rank * self.width, self.dense) if self.capped else rank * self.width

    def fraction(self, state: torch.Tensor) -> torch.Tensor:
        """Kept fraction of the dense parameters."""
        return self.counts(state).sum() / self.dense.sum()

    def price(self, state: torch.Tensor) -> torch.Tensor:
        """d fraction / d state, (groups,): what one unit of mu/k costs each group.

        In svd form the price goes on above the rank where dense is cheaper, so that a dense group can be drawn down.
        """
        rank = state.clamp(0, 1) * self.full_rank
        slope = self.width - 2 * rank if self.form == "pivga" else self.width
        return slope * self.full_rank / self.dense.sum()

    def tangent(self, gradient: torch.Tensor, state: torch.Tensor, low: torch.Tensor, high: float) -> torch.Tensor:
        """The gradient less its part along the price: what is left trades parameters between groups.

        Loss falls with every rank, so Adam, which looks at signs, would raise all groups alike. The Lagrangian's
        gradient raises those that gain more per parameter than the others and lowers the rest; its multiplier is the
        least-squares one over the groups inside the box.
        """
        price = self.price(state)
        inside = (state > low) & (state < high)
        weight = price * inside if inside.any() else price
        return gradient - (gradient @ weight) / (weight @ weight).clamp(min=1e-30) * price

    def project(self, state: torch.Tensor, kept: float, low: torch.Tensor, high: torch.Tensor | float) -> torch.Tensor:
        """All mu/k shifted together, inside the box, so that the kept fraction is `kept` (bisection on the shift)."""
        high = torch.as_tensor(high, dtype=state.dtype)
        above = 1.0 + high.max().item()
        below = -above
        for _ in range(60):
            middle = (below + above) / 2
            shifted = torch.maximum(torch.minimum(state + middle, high), low)
            below, above = (middle, above) if self.fraction(shifted) < kept else (below, middle)
        return torch.maximum(torch.minimum(state + below, high), low)


def optimise_ranks(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    gated: Sequence[GatedGroup],
    windows: torch.Tensor,
    kept: float,
    form: Form,
    settings: FermiGradSettings,
    on_step: Callable[[dict], None] = lambda _: None,
    capped: bool = True,
    begun: dict | None = None,
    on_progress: Callable[[dict], None] = lambda _: None,
) -> tuple[list[float], list[dict]]:
    """Real ranks mu that minimise KL(teacher || student) at the kept fraction of parameters.

    model: holds the gated layers of `install_gates`; windows: token ids (samples, length); kept: fraction of the
    groups' parameters that may stay, counted in `form`, `capped` as in SoftBudget. on_step sees each step's record:
    step, kl, kept, and `share`, the list of mu/k; on_progress what `begun` takes to go on from there, to the same
    result. Of several processes each takes its share of every batch's windows; the gradients are added up.
    Returns one mu a group, on the budget, and the records. Raises FermiGradError if the loss is not finite.
    """
    budget, high = SoftBudget(groups, form, capped), 1 + 6 * settings.temperature
    low = torch.clamp(settings.minimum_rank / budget.full_rank, max=1.0)
    state = torch.full_like(budget.full_rank, high, requires_grad=True)
    optimizer = torch.optim.Adam([state], lr=settings.learning_rate, betas=(0.9, 0.99))
    device = device_of(model)
    batches = shuffled_batches(windows, settings.batch_size, settings.seed)
    records: list[dict] = []
    full = budget.fraction(state.detach())  # 1, or more where the count is not capped
    model.requires_grad_(False)
    if begun is not None:
        records = list(begun["records"])
        _restore(optimizer, state, begun)
        for _ in records:
            next(batches)

    for step in range(len(records), settings.steps):
        if _plateau(records, kept, settings):
            break
        batch = next(batches)
        mine = batch[rank() :: world()]
        weight = len(mine) / len(batch)
        mine = mine if weight else batch[:1]  # every process takes part in every pass
        optimizer.zero_grad()
        with _checkpointed(model, groups, mine.numel()):
            kl = gated_kl(model, groups, gated, mine.to(device), state * budget.full_rank, settings.temperature)
            (kl * weight).backward()
        assert state.grad is not None
        kl = sum_over_processes(kl.detach().double().cpu() * weight)
        sum_over_processes(state.grad)
        if not kl.isfinite():
            raise FermiGradError(
                f"KL is {kl.item()} at FermiGrad step {step}; check the model and the calibration text"
            )
        _anneal_learning_rate(optimizer, settings, step)
        if settings.constraint == "penalty":
            rho = settings.penalty * settings.penalty_growth**step
            excess = budget.fraction(state.detach()) - kept
            state.grad += 2 * rho * excess * budget.price(state.detach())
            optimizer.step()
            with torch.no_grad():
                state.copy_(torch.maximum(state.clamp(max=high), low))
        else:
            allowed = full + (kept - full) * min(1.0, (step + 1) / (settings.anneal * settings.steps))
            state.grad = budget.tangent(state.grad, state.detach(), low, high)
            optimizer.step()
            with torch.no_grad():
                state.copy_(budget.project(state, float(allowed), low, high))
        record = {"step": step, "kl": kl.item(), "kept": budget.fraction(state.detach()).item()}
        records.append(record | {"share": [round(share, 4) for share in state.tolist()]})
        on_step(records[-1])
        on_progress(_progress(optimizer, state, records))

    open_gates(gated)
    final = budget.project(state.detach(), kept, low, high)
    return (final.clamp(max=1) * budget.full_rank).tolist(), records


def gated_kl(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    gated: Sequence[GatedGroup],
    batch: torch.Tensor,
    mus: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """KL(teacher || student) of a batch (windows, length) with the gates at mus (groups,), differentiable in mus."""
    open_gates(gated)
    with torch.no_grad():
        teacher = model(input_ids=batch, use_cache=False).logits
    for group, shared, mu in zip(groups, gated, mus, strict=True):
        gate = fermi_gate(mu, group.full_rank, temperature).to(shared.device, shared.dtype)
        shared.set_gate(gate, min(group.full_rank, int(mu.item() + TAIL * group.full_rank * temperature) + 1))
    return kl_divergence(teacher, model(input_ids=batch, use_cache=False).logits)


@contextmanager
def _checkpointed(model: nn.Module, groups: Sequence[LinearGroup], tokens: int) -> Iterator[None]:
    """Blocks forget what they computed on the way and do it again for the gradient, where that would take much."""
    if 4 * tokens * sum(group.rows + group.columns for group in groups) <= KEPT_ACTIVATIONS:
        yield
        return
    blocks = list(model.get_submodule(decoder_blocks(model)).children())
    with forwards(blocks, [partial(checkpoint, block.forward, use_reentrant=False) for block in blocks]):
        yield


def _progress(optimizer: torch.optim.Adam, state: torch.Tensor, records: Sequence[dict]) -> dict:
    """JSON-able, exact."""
    moments = optimizer.state[state]
    kept = {name: moments[name].tolist() for name in ("step", "exp_avg", "exp_avg_sq")}
    return {"state": state.tolist(), "adam": kept, "records": list(records)}


def _restore(optimizer: torch.optim.Adam, state: torch.Tensor, begun: dict) -> None:
    with torch.no_grad():
        state.copy_(torch.tensor(begun["state"], dtype=state.dtype))
    moments = {name: torch.tensor(value, dtype=state.dtype) for name, value in begun["adam"].items()}
    optimizer.state[state] = moments | {"step": moments["step"].float()}


def _plateau(records: Sequence[dict], kept: float, settings: FermiGradSettings) -> bool:
    """Whether the last PLATEAU_STEPS gained next to nothing on those before, all at the target to a thousandth."""
    recent = records[-2 * PLATEAU_STEPS :]
    if not settings.plateau or len(recent) < 2 * PLATEAU_STEPS or any(r["kept"] > kept + 1e-3 for r in recent):
        return False
    before, last = (sum(r["kl"] for r in part) for part in (recent[:PLATEAU_STEPS], recent[PLATEAU_STEPS:]))
    return last > (1 - settings.plateau) * before


def _anneal_learning_rate(optimizer: torch.optim.Optimizer, settings: FermiGradSettings, step: int) -> None:
    """Constant, then linear to a tenth over the last half: the ranks must come to rest."""
    remaining = min(1.0, 2 * (1 - step / settings.steps))
    optimizer.param_groups[0]["lr"] = settings.learning_rate * (0.1 + 0.9 * remaining)


def open_gates(gated: Sequence[GatedGroup]) -> None:
    """Make the student the teacher again."""
    for group in gated:
        group.set_gate(None, group.full_rank)
