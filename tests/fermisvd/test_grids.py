"""Factors on grids where calibration says little. Reference: the factors themselves, on inputs that it did not see."""

import pytest
import torch

from fermisvd.budget import Form, RankedGroup
from fermisvd.groups import LinearGroup, Side
from fermisvd.modules import replace_group
from fermisvd.schemes import Weights
from fermisvd.storage import compressed_tensors, config_group

ROWS, COLUMNS, RANK = 48, 64, 24
KINDS: list[tuple[Form, Side]] = [("svd", "columns"), ("pivga", "columns"), ("pivga", "rows")]


def stored(form: Form, side: Side, weights: Weights, a, b, gram) -> torch.Tensor:
    """The matrix that a group's tensors stand for, by the reference module."""
    ranked = RankedGroup(LinearGroup(("0",), (ROWS,), COLUMNS, side, "0"), RANK, form, weights)
    model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
    replace_group(model, config_group(ranked))
    state = model.state_dict(keep_vars=True)
    for name, tensor in compressed_tensors(ranked, (a, b), torch.float32, gram).items():
        state[name].data.copy_(tensor)
    with torch.no_grad():
        return model(torch.eye(COLUMNS)).T


@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 0.03), ("int4", 0.4)])
@pytest.mark.parametrize(("form", "side"), KINDS)
@pytest.mark.parametrize("tokens", [4, 20, 200])
def test_few_tokens(form, side, weights, tolerance, tokens):
    """Fewer than there are ranks: what they do not show stays as it was."""
    a, b = torch.randn(ROWS, RANK), torch.randn(RANK, COLUMNS)
    x = torch.randn(tokens, COLUMNS)
    product = stored(form, side, weights, a, b, x.T @ x)
    assert (product - a @ b).norm() < tolerance * (a @ b).norm()
    seen = x @ (product - a @ b).T
    assert seen.norm() < tolerance * (x @ (a @ b).T).norm()


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(("form", "side"), KINDS)
def test_no_inputs(form, side, weights):
    a, b = torch.randn(ROWS, RANK), torch.randn(RANK, COLUMNS)
    product = stored(form, side, weights, a, b, torch.zeros(COLUMNS, COLUMNS))
    assert (product - a @ b).norm() < 0.4 * (a @ b).norm()


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(("form", "side"), KINDS)
def test_all_zero(form, side, weights):
    x = torch.randn(100, COLUMNS)
    product = stored(form, side, weights, torch.zeros(ROWS, RANK), torch.zeros(RANK, COLUMNS), x.T @ x)
    assert torch.equal(product, torch.zeros(ROWS, COLUMNS))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_small_numbers_in_float16(weights):
    """A scale is at least what its type holds: numbers below it are lost, larger ones are not."""
    a, b = torch.randn(ROWS, RANK) * 1e-4, torch.randn(RANK, COLUMNS) * 1e-2
    ranked = RankedGroup(LinearGroup(("0",), (ROWS,), COLUMNS, "rows", "0"), RANK, "pivga", weights)
    x = torch.randn(100, COLUMNS)
    tensors = compressed_tensors(ranked, (a, b), torch.float16, x.T @ x)
    scales = [tensor for name, tensor in tensors.items() if name.endswith("_scale")]
    assert all((scale > 0).all() and scale.max() < 0.2 for scale in scales)
