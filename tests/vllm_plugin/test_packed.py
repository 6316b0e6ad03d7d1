"""A CPU's packed products of a layer's factors, against the dense product in float64."""

import pytest
import torch

pytest.importorskip("vllm")
from fermisvd_vllm import factors, linear
from fermisvd_vllm.factors import Factor
from fermisvd_vllm.packed import TILE, PackedMethod, packs
from tests.vllm_plugin.test_linear import (
    HIDDEN,
    MIXED_SIDES,
    PARTITIONS,
    check_reload,
    check_traces,
    load,
    make_group,
    make_layer,
    make_mixed_sides,
    make_partition,
    vllm_config,  # noqa: F401
)

pytestmark = pytest.mark.skipif(
    not packs(torch.bfloat16, torch.device("cpu")), reason="vLLM has no packed product for this processor"
)
QKV = ("q_proj", "k_proj", "v_proj")
# of factors and of t, which are rounded to bfloat16 one after the other
TOLERANCE = 2**-5
OF_THE_WEIGHT = 2**-3  # what that is of the largest weight, which sums of 96 products are larger than


def loaded_layer(kind, groups, tensors):
    layer = make_layer(kind, groups, dtype=torch.bfloat16)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def check_products(layer, weight):
    """For numbers of tokens below, at and beyond a tile of the kernel, in a slice of something wider too."""
    assert layer.quant_method.apply(layer, torch.empty(0, HIDDEN, dtype=torch.bfloat16)).shape == (0, len(weight))
    for tokens in (1, 5, 64, 130):
        wide = torch.randn(tokens, 2 * HIDDEN, dtype=torch.bfloat16)
        for x in (wide[:, :HIDDEN].contiguous(), wide[:, 32 : 32 + HIDDEN], wide[:, ::2]):
            expected = x.double() @ weight.T
            error = layer.quant_method.apply(layer, x).double() - expected
            assert error.abs().max() <= TOLERANCE * expected.abs().max()


def factors_of(layer):
    return {name: each for name, each in layer.named_modules() if isinstance(each, Factor) and each.weight.numel()}


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_fused_layer_equals_the_dense_product(form, partition):
    groups, tensors, dense = make_partition(partition, form)
    layer = loaded_layer("qkv_proj", groups, tensors)
    assert all(isinstance(factor.gemm, PackedMethod) for factor in factors_of(layer).values())
    check_products(layer, torch.cat([dense[member] for member in QKV]))


@pytest.mark.parametrize("narrow", [0, 4096])
@pytest.mark.parametrize("partition", MIXED_SIDES)
def test_sides_and_members_may_be_mixed(partition, narrow, monkeypatch):
    monkeypatch.setattr(factors, "MOST_INPUTS", narrow)
    groups, tensors, dense = make_mixed_sides(partition)
    layer = loaded_layer("qkv_proj", groups, tensors)
    check_products(layer, torch.cat([dense[member] for member in QKV]))


@pytest.mark.parametrize(("form", "side"), [("svd", None), ("pivga", "rows"), ("pivga", "columns")])
@pytest.mark.parametrize("rank", [1, 32, 33, 95, 96])
def test_ranks_are_filled_up_to_a_tile(form, side, rank):
    group, tensors, dense = make_group(["o_proj"], form, side, rank)
    layer = loaded_layer("o_proj", [group], tensors)
    assert not any(size % TILE for factor in factors_of(layer).values() for size in factor.weight.shape)
    check_products(layer, dense["o_proj"])


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_wide_matrices_are_left_to_vllm(form, monkeypatch):
    """B or D, but no second factor."""
    monkeypatch.setattr(factors, "MOST_INPUTS", 64)
    groups, tensors, dense = make_partition("separate", form)
    layer = loaded_layer("qkv_proj", groups, tensors)
    packed = {name: isinstance(factor.gemm, PackedMethod) for name, factor in factors_of(layer).items()}
    assert all(packed[name] == name.endswith("second") for name in packed)
    check_products(layer, torch.cat([dense[member] for member in QKV]))


def test_rows_that_fill_no_tile_are_left_to_vllm():
    group, tensors, dense = make_group(["gate_proj", "up_proj"], "pivga", "columns", 33)  # 136 rows each
    layer = loaded_layer("gate_up_proj", [group], tensors)
    assert not any(isinstance(factor.gemm, PackedMethod) for factor in factors_of(layer).values())
    check_products(layer, torch.cat([dense["gate_proj"], dense["up_proj"]]))


def test_float32_is_left_to_vllm(monkeypatch):
    group, tensors, _ = make_group(["o_proj"], "svd", None, 33)
    layer = make_layer("o_proj", [group])
    load(layer, tensors)
    monkeypatch.setattr(linear, "PackedMethod", None)  # would fail
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("form", "side"), [("svd", None), ("pivga", "columns"), ("pivga", "rows")])
def test_reload_writes_into_the_packed_storage(form, side):
    check_reload("o_proj", [["o_proj"]], form, side, False, dtype=torch.bfloat16, tolerance=OF_THE_WEIGHT)


@pytest.mark.parametrize(("form", "side"), [("svd", None), ("pivga", "columns"), ("pivga", "rows")])
def test_one_graph_serves_all_numbers_of_tokens(form, side):
    group, tensors, dense = make_group(["o_proj"], form, side, 33)
    layer = make_layer("o_proj", [group], dtype=torch.bfloat16)
    load(layer, tensors)
    check_traces(layer, dense["o_proj"].bfloat16(), OF_THE_WEIGHT)
