"""FermiGrad: globally optimal ranks by gradient descent through a Fermi gate on each group's spectrum.

The student layer is U diag(F(mu)) U^T W; only one mu a group is trained, by KL(teacher || student), under a
parameter budget. State is kept as mu/k, so that one learning rate serves layers of any width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from fermisvd.budget import Form
from fermisvd.errors import FermiSVDError
from fermisvd.groups import LinearGroup

Constraint = Literal["projection", "penalty"]


@dataclass(frozen=True)
class FermiGradSettings:
    """temperature: T of the gate, in units of k; learning_rate: of mu/k; anneal: fraction of the steps over which
    `projection` lowers the budget from full to the target; penalty, penalty_growth: rho and alpha of the paper's
    penalty, rho (N - N_target)^2 with both counts as fractions of the dense count."""

    constraint: Constraint = "projection"
    steps: int = 150
    batch_size: int = 8
    temperature: float = 0.01
    learning_rate: float = 0.02
    anneal: float = 0.4
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


class _GatedProduct(torch.autograd.Function):
    """y = x W_F^T with W_F = U diag(F) B, B = U^T W; dL/dF_j = (U^T G B^T)_jj, G = dL/dW_F.

    W_F is made anew in the backward pass instead of kept: a student costs U and B, no third copy of the model.
    """

    @staticmethod
    def forward(ctx, x, u, b, gate):
        ctx.save_for_backward(x, u, b, gate)
        return functional.linear(x, (u * gate) @ b)

    @staticmethod
    def backward(ctx, grad):
        x, u, b, gate = ctx.saved_tensors
        weight_gradient = grad.flatten(0, -2).T @ x.flatten(0, -2)
        gate_gradient = ((u.T @ weight_gradient) * b).sum(1)
        return grad @ ((u * gate) @ b), None, None, gate_gradient


class GatedLinear(nn.Module):
    """A member of a gated group. u: its rows of U, (m_i x k); b: U^T W of the whole group, (k x n), shared.

    `gate` is the group's F (k,), or None for the dense teacher: U U^T W = W, since U spans the columns of W.
    """

    def __init__(self, u: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.u, self.b, self.bias = u, b, bias
        self.gate: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.u.new_ones(self.u.shape[1]) if self.gate is None else self.gate
        y = _GatedProduct.apply(x, self.u, self.b, gate)
        return y if self.bias is None else y + self.bias


def install_gates(
    model: nn.Module, groups: Sequence[LinearGroup], basis_of: Callable[[LinearGroup], torch.Tensor]
) -> list[list[GatedLinear]]:
    """Replace the groups' linear layers by gated ones, one group at a time, and free the dense weights.

    basis_of: gives U (m x k) of a group. Returns the gated layers of each group.
    """
    gated = []
    for group in groups:
        layers = [model.get_submodule(name) for name in group.members]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        u = basis_of(group).to(weight)
        b = u.T @ weight
        parts = u.split(list(group.member_rows))
        gated.append([GatedLinear(part, b, layer.bias) for part, layer in zip(parts, layers, strict=True)])
        for name, layer in zip(group.members, gated[-1], strict=True):
            model.set_submodule(name, layer)
    return gated


class SoftBudget:
    """Parameter counts of real-valued ranks, all groups at once, float64."""

    def __init__(self, groups: Sequence[LinearGroup], form: Form):
        def column(values):
            return torch.tensor(list(values), dtype=torch.float64)

        self.full_rank = column(g.full_rank for g in groups)
        self.width = column(g.rows + g.columns for g in groups)
        self.dense = column(g.dense_parameters for g in groups)
        self.form = form

    def counts(self, state: torch.Tensor) -> torch.Tensor:
        """Parameters of each group at mu = state * k. In svd form the count stops at m n, where dense is cheaper."""
        rank = state.clamp(0, 1) * self.full_rank
        if self.form == "pivga":
            return rank * (self.width - rank)
        return torch.minimum(rank * self.width, self.dense)

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

    def project(self, state: torch.Tensor, kept: float, low: torch.Tensor, high: float) -> torch.Tensor:
        """All mu/k shifted together, inside the box, so that the kept fraction is `kept` (bisection on the shift)."""
        below, above = -1.0 - high, 1.0 + high
        for _ in range(60):
            middle = (below + above) / 2
            shifted = torch.maximum((state + middle).clamp(max=high), low)
            below, above = (middle, above) if self.fraction(shifted) < kept else (below, middle)
        return torch.maximum((state + below).clamp(max=high), low)


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student); logits (batch, length, vocabulary)."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return functional.kl_div(log_q.flatten(0, -2), log_p.flatten(0, -2), log_target=True, reduction="batchmean")


def optimise_ranks(
    model: nn.Module,
    groups: Sequence[LinearGroup],
    gated: Sequence[Sequence[GatedLinear]],
    windows: torch.Tensor,
    kept: float,
    form: Form,
    settings: FermiGradSettings,
    on_step: Callable[[dict], None] = lambda _: None,
) -> tuple[list[float], list[dict]]:
    """Real ranks mu that minimise KL(teacher || student) at the kept fraction of parameters.

    model: holds the gated layers of `install_gates`; windows: token ids (samples, length); kept: fraction of the
    groups' parameters that may stay, counted in `form`. on_step sees each step's record (step, kl, kept).
    Returns one mu a group, on the budget, and the records. Raises FermiGradError if the loss is not finite.
    """
    budget, high = SoftBudget(groups, form), 1 + 6 * settings.temperature
    low = torch.clamp(settings.minimum_rank / budget.full_rank, max=1.0)
    state = torch.full_like(budget.full_rank, high, requires_grad=True)
    optimizer = torch.optim.Adam([state], lr=settings.learning_rate, betas=(0.9, 0.99))
    device = next(model.parameters()).device
    order = torch.Generator().manual_seed(settings.seed)
    queue: list[torch.Tensor] = []
    records: list[dict] = []
    model.requires_grad_(False)

    for step in range(settings.steps):
        if not queue:
            queue = list(torch.randperm(len(windows), generator=order).split(settings.batch_size))
        batch = windows[queue.pop()].to(device)
        _set_gates(gated, [None] * len(groups))
        with torch.no_grad():
            teacher = model(input_ids=batch, use_cache=False).logits
        mus = (state * budget.full_rank).float().to(device)
        _set_gates(
            gated, [fermi_gate(mu, g.full_rank, settings.temperature) for mu, g in zip(mus, groups, strict=True)]
        )
        kl = kl_divergence(teacher, model(input_ids=batch, use_cache=False).logits)
        if not kl.isfinite():
            raise FermiGradError(
                f"KL is {kl.item()} at FermiGrad step {step}; check the model and the calibration text"
            )
        optimizer.zero_grad()
        kl.backward()
        assert state.grad is not None
        _anneal_learning_rate(optimizer, settings, step)
        if settings.constraint == "penalty":
            rho = settings.penalty * settings.penalty_growth**step
            excess = budget.fraction(state.detach()) - kept
            state.grad += 2 * rho * excess * budget.price(state.detach())
            optimizer.step()
            with torch.no_grad():
                state.copy_(torch.maximum(state.clamp(max=high), low))
        else:
            allowed = 1 + (kept - 1) * min(1.0, (step + 1) / (settings.anneal * settings.steps))
            state.grad = budget.tangent(state.grad, state.detach(), low, high)
            optimizer.step()
            with torch.no_grad():
                state.copy_(budget.project(state, allowed, low, high))
        records.append({"step": step, "kl": kl.item(), "kept": budget.fraction(state.detach()).item()})
        on_step(records[-1])

    _set_gates(gated, [None] * len(groups))
    final = budget.project(state.detach(), kept, low, high)
    return (final.clamp(max=1) * budget.full_rank).tolist(), records


def _anneal_learning_rate(optimizer: torch.optim.Optimizer, settings: FermiGradSettings, step: int) -> None:
    """Constant, then linear to a tenth over the last half: the ranks must come to rest."""
    remaining = min(1.0, 2 * (1 - step / settings.steps))
    optimizer.param_groups[0]["lr"] = settings.learning_rate * (0.1 + 0.9 * remaining)


def _set_gates(gated: Sequence[Sequence[GatedLinear]], gates: Sequence[torch.Tensor | None]) -> None:
    for layers, gate in zip(gated, gates, strict=True):
        for layer in layers:
            layer.gate = gate
