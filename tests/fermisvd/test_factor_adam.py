import pytest
import torch
from torch import nn
from torch.nn import functional

from fermisvd.factor_adam import BETAS, FactorAdam, stepping_backward

STEPS, RATE = 60, 1e-3


def train(layer: nn.Linear, step) -> list[torch.Tensor]:
    """Gradients of a regression, each followed by `step`; the weight is read twice a pass."""
    draw, gradients = torch.Generator().manual_seed(1), []
    for number in range(STEPS):
        x, y = torch.randn(32, 24, generator=draw), torch.randn(32, 16, generator=draw)
        x, y = x.to(layer.weight.dtype), y.to(layer.weight.dtype)
        layer.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
        step(number, functional.mse_loss(layer(x) + layer(x.flip(-1)), y))
    return gradients


def layer_of(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 16, bias=False, dtype=dtype)


def healed(layer: nn.Linear) -> FactorAdam:
    """Trained by the hook, at a rate that falls."""
    with stepping_backward({"weight": layer.weight}) as adams:

        def step(number: int, loss: torch.Tensor) -> None:
            adams["weight"].rate = RATE / (1 + number)
            loss.backward()
            assert layer.weight.grad is None

        train(layer, step)
    assert not layer.weight.requires_grad and adams["weight"].steps == STEPS
    return adams["weight"]


def test_in_float32_it_is_torchs_adam_bit_for_bit():
    layer, expected = layer_of(torch.float32), layer_of(torch.float32)
    adam = torch.optim.Adam(expected.parameters(), betas=BETAS)

    def step(number: int, loss: torch.Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = RATE / (1 + number)
        adam.step()

    train(expected, step)
    found = healed(layer)
    assert torch.equal(layer.weight, expected.weight)
    assert found.master.data_ptr() == layer.weight.data_ptr()  # no second copy
    assert torch.equal(found.second, adam.state[expected.weight]["exp_avg_sq"])


def test_a_bfloat16_parameter_follows_its_float32_master():
    """Reference: torch's Adam in float32 on the same gradients; steps this small are lost without a master."""
    layer, expected = layer_of(torch.bfloat16), layer_of(torch.bfloat16).float()
    start, gradients = expected.weight.detach().clone(), []
    with stepping_backward({"weight": layer.weight}) as adams:

        def step(_: int, loss: torch.Tensor) -> None:
            adams["weight"].rate = 1e-5
            loss.backward()

        layer.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
        train(layer, step)
    adam = torch.optim.Adam(expected.parameters(), lr=1e-5, betas=BETAS)
    for gradient in gradients:
        expected.weight.grad = gradient.float()
        adam.step()
    found, moved = adams["weight"], expected.weight.detach() - start
    assert (found.master - start - moved).norm() < 0.02 * moved.norm()
    assert torch.equal(layer.weight, found.master.bfloat16())
    assert {each.dtype for each in (found.first, found.second)} == {torch.bfloat16}
    in_bfloat16 = layer_of(torch.bfloat16)
    plain = torch.optim.Adam(in_bfloat16.parameters(), lr=1e-5, betas=BETAS)
    for gradient in gradients:
        in_bfloat16.weight.grad = gradient
        plain.step()
    assert (in_bfloat16.weight - start - moved).norm() > 0.2 * moved.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_was_kept_is_gone_on_from(dtype):
    layer, other = layer_of(dtype), layer_of(dtype)
    first = healed(layer)
    with torch.no_grad():
        other.weight.zero_()
    second = FactorAdam(other.weight)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, first.steps)
    for each in (first, second):
        each.rate = RATE
        each.parameter.grad = torch.ones_like(each.parameter)
        each.step(each.parameter)
    assert torch.equal(layer.weight, other.weight) and torch.equal(first.master, second.master)
