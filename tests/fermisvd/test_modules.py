from typing import Any

import pytest
import torch
from torch import nn

from fermisvd.format import Group
from fermisvd.modules import PivGaColumnsLinear, PivGaRowsLinear, replace_group
from fermisvd.pivga import dense_product, fix_gauge


def toy(bias: bool) -> Any:  # a module whose layers are replaced
    model: Any = nn.Module()
    model.q, model.k = nn.Linear(24, 30, bias=bias), nn.Linear(24, 10, bias=bias)
    return model.double()


@pytest.mark.parametrize("bias", [False, True])
def test_lowrank_group_equals_the_dense_product(bias):
    model = toy(bias)
    biases = [None if m.bias is None else m.bias.clone() for m in (model.q, model.k)]
    replace_group(model, Group(members=("q", "k"), form="svd", rank=7))
    a, b = torch.randn(40, 7, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    state = {"q.lowrank_a": a[:30], "q.lowrank_b": b, "k.lowrank_a": a[30:]}
    state |= {f"{n}.bias": x for n, x in zip("qk", biases, strict=True) if x is not None}
    model.load_state_dict(state)  # strict: the names are those of the format, and no others
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(model.q(x), nn.functional.linear(x, a[:30] @ b, biases[0]))
    torch.testing.assert_close(model.k(x), nn.functional.linear(x, a[30:] @ b, biases[1]))


@pytest.mark.parametrize("bias", [False, True])
def test_pivga_columns_group_equals_the_dense_product(bias):
    model = toy(bias)
    replace_group(model, Group(members=("q", "k"), form="pivga", side="columns", rank=7))
    gauge = fix_gauge(torch.randn(40, 7, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64), "columns")
    state = {
        "q.skeleton": gauge.skeleton[:30],
        "k.skeleton": gauge.skeleton[30:],
        "q.interpolation": gauge.interpolation,
        "q.permutation": gauge.permutation,
    }
    state |= {f"{n}.bias": torch.randn(size, dtype=torch.float64) for n, size in (("q", 30), ("k", 10)) if bias}
    model.load_state_dict(state)
    x = torch.randn(5, 24, dtype=torch.float64)
    dense = dense_product(gauge)
    torch.testing.assert_close(model.q(x), nn.functional.linear(x, dense[:30], state.get("q.bias")))
    torch.testing.assert_close(model.k(x), nn.functional.linear(x, dense[30:], state.get("k.bias")))


@pytest.mark.parametrize("rank", [1, 7, 24])
@pytest.mark.parametrize("bias", [False, True])
def test_pivga_rows_equals_the_dense_product(rank, bias):
    layer = PivGaRowsLinear(24, 30, rank, bias).double()
    gauge = fix_gauge(torch.randn(30, rank, dtype=torch.float64), torch.randn(rank, 24, dtype=torch.float64), "rows")
    state = {"skeleton": gauge.skeleton, "interpolation": gauge.interpolation, "permutation": gauge.permutation}
    if bias:
        state["bias"] = torch.randn(30, dtype=torch.float64)
    layer.load_state_dict(state)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense_product(gauge), state.get("bias")))


def test_modules_hold_no_more_numbers_than_the_format():
    layer = PivGaColumnsLinear(24, 30, 7)
    assert sum(p.numel() for p in layer.parameters()) == 7 * (24 + 30) - 49


def test_unknown_member_is_named():
    with pytest.raises(KeyError, match="no linear layer nowhere"):
        replace_group(toy(False), Group(members=("nowhere",), form="svd", rank=2))
