"""Training through a grid. References: gradients by hand, and the layer as it is stored."""

import pytest
import torch
from torch import nn

from fermisvd.budget import RankedGroup
from fermisvd.groups import LinearGroup
from fermisvd.healing import opened_factors, stored_factors
from fermisvd.modules import replace_group
from fermisvd.schemes import SCHEMES
from fermisvd.storage import compressed_tensors, config_group
from fermisvd.straight_through import OnGrid, grid_tensors, open_grids

FORMS = ["svd", "pivga columns", "pivga rows", "dense"]


def model_on(form: str, weights, dtype=torch.float32) -> nn.Module:
    """A layer of 24 outputs and 40 inputs on grids."""
    torch.manual_seed(0)
    dense = nn.Linear(40, 24, bias=False).to(dtype)
    model = nn.Sequential(dense)
    group = LinearGroup(("0",), (24,), 40, "rows" if form.endswith("rows") else "columns", "0")
    x = torch.randn(200, 40, dtype=torch.float64)
    if form == "dense":
        ranked, parts = RankedGroup(group, 24, "pivga", weights), [dense.weight.detach()]
    else:
        ranked = RankedGroup(group, 10, "svd" if form == "svd" else "pivga", weights)
        parts = [torch.randn(24, 10), torch.randn(10, 40)]
    replace_group(model, config_group(ranked))
    state = model.state_dict(keep_vars=True)
    for name, tensor in compressed_tensors(ranked, parts, dtype, x.T @ x).items():
        state[name].data.copy_(tensor)
    return model


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_changes_nothing(form, weights, dtype):
    """Outputs and stored tensors of a layer that was opened and not trained are those of before."""
    model, x = model_on(form, weights, dtype), torch.randn(5, 40).to(dtype)
    before, tensors = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opened = opened_factors(model, dtype)
    assert opened and all(parameter.dtype == torch.float32 for parameter in opened.values())
    torch.testing.assert_close(model(x), before)
    stored = stored_factors(model, dtype)
    assert stored.keys() == {name for name in tensors if not name.endswith("permutation")}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.items())
    assert all(tensor.dtype == tensors[name].dtype for name, tensor in stored.items())


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients(name):
    """Of w: the product's own, where w is inside the grid, else none. Of s: what rounding adds to w / s there, and the
    number itself where the grid does not reach."""
    torch.manual_seed(0)
    scheme, w = SCHEMES[name], torch.randn(6, 40)
    scale = torch.full((6, scheme.groups(40)), w.abs().max().item() / scheme.largest)
    w[2, 3] = 3 * w.abs().max()  # outside
    grid = OnGrid(scheme, scale, torch.float32, torch.float32)
    w.requires_grad_()
    grid.scale.requires_grad_()
    towards = torch.randn(6, 40)
    (grid(w) * towards).sum().backward()
    assert w.grad is not None and grid.scale.grad is not None
    inside = torch.ones(6, 40)
    inside[2, 3] = 0
    torch.testing.assert_close(w.grad, towards * inside)
    steps = scheme.spread(scale, 40)
    left = grid.codes(w.detach()) - (w.detach() / steps) * inside
    wide = scheme.group_size or 40
    parts = (left * towards).split(wide, dim=1)
    expected = torch.stack([part.sum(1) for part in parts], dim=1)
    torch.testing.assert_close(grid.scale.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_was_trained_is_what_is_written(weights):
    """After steps that move numbers and scales: the written layer gives what the trained one gave."""
    model, x, y = (
        model_on("pivga columns", weights, torch.bfloat16),
        torch.randn(64, 40).bfloat16(),
        torch.randn(64, 24),
    )
    opened = open_grids(model, torch.bfloat16)
    before = grid_tensors(model)
    for parameter in opened.values():
        parameter.requires_grad_()
    rates = [{"params": [each], "lr": 1e-2 * each.abs().mean().item()} for each in opened.values()]
    adam = torch.optim.Adam(rates)
    losses = []
    for _ in range(100):
        loss = (model(x).float() - y).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = grid_tensors(model)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    written = model_on("pivga columns", weights, torch.bfloat16)
    state = written.state_dict(keep_vars=True)
    for name, tensor in after.items():
        state[name].data.copy_(tensor)
    torch.testing.assert_close(written(x), model(x).detach())
