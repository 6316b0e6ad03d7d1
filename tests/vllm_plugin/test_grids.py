"""Layers of vLLM whose factors are on grids, by vLLM's own kernels. Reference: the dequantised product in float64."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import RowParallelLinear

from fermisvd.budget import RankedGroup
from fermisvd.errors import FormatError
from fermisvd.format import Group
from fermisvd.groups import LinearGroup
from fermisvd.schemes import SCHEMES, codes_of, dequantised
from fermisvd.storage import compressed_tensors, config_group
from fermisvd_vllm.grid_gemm import grid_factor
from tests.vllm_plugin.test_linear import (
    HIDDEN,
    ROWS,
    SHARDS,
    check_traces,
    make_layer,
    vllm_config,  # noqa: F401
)
from tests.vllm_plugin.test_tensor_parallel import method_in_process


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory):
    """vLLM's parameters for int4 ask which process this is."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        meeting = f"file://{tmp_path_factory.mktemp('group') / 'meeting'}"
        init_distributed_environment(1, 0, distributed_init_method=meeting, local_rank=0, backend="gloo")
        initialize_model_parallel(1)
    yield
    cleanup_dist_env_and_memory()


QKV = ["q_proj", "k_proj", "v_proj"]
# rounding x to 8 bits, and once more what a factor makes of it; e4m3 has 3 bits behind the first
TOLERANCE = {"int8": 0.03, "fp8": 0.12, "int4": 0.02}
DTYPES = {"int8": [torch.float32, torch.bfloat16], "fp8": [torch.float32, torch.bfloat16], "int4": [torch.bfloat16]}
CASES = [(weights, dtype) for weights, dtypes in DTYPES.items() for dtype in dtypes]


def make_group(members, form, side, rank, weights, dtype, own=()) -> tuple[Group, dict[str, torch.Tensor]]:
    """A group on grids and its tensors, named as in a checkpoint. own: factors on another grid."""
    rows = tuple(ROWS[name] for name in members)
    group = LinearGroup(tuple(f"m.{name}" for name in members), rows, HIDDEN, side, f"m.{members[0]}")
    x = torch.randn(300, HIDDEN, dtype=torch.float64)
    if form == "dense":
        ranked, parts = RankedGroup(group, group.full_rank, "pivga", weights, own), [torch.randn(sum(rows), HIDDEN)]
    else:
        parts = [torch.randn(sum(rows), rank), torch.randn(rank, HIDDEN)]
        ranked = RankedGroup(group, rank, form, weights, own)
    return config_group(ranked), compressed_tensors(ranked, parts, dtype, x.T @ x)


def factor_in(group: Group, tensors, member, factor) -> torch.Tensor:
    """A factor as float64, from its stored tensors."""
    assert group.schemes is not None
    scheme = SCHEMES[group.schemes[factor]]
    own = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{member}.")}
    columns = int(own[f"{factor}_shape"][1]) if scheme.packed else own[factor].shape[1]
    return dequantised(scheme, codes_of(scheme, factor, own, columns).double(), own[f"{factor}_scale"].double())


def dense_of(group: Group, tensors) -> torch.Tensor:
    """The matrix that a group's tensors stand for, members on top of each other."""

    def of_members(factor):
        return torch.cat([factor_in(group, tensors, member, factor) for member in group.members])

    if group.form == "dense":
        return of_members("matrix")
    if group.form == "svd":
        return of_members("lowrank_a") @ factor_in(group, tensors, group.name, "lowrank_b")
    permutation = tensors[f"{group.name}.permutation"].long()
    d = factor_in(group, tensors, group.name, "interpolation")
    if group.side == "columns":
        skeleton = of_members("skeleton")
        product = torch.empty(len(skeleton), HIDDEN, dtype=torch.float64)
        product[:, permutation] = torch.cat([skeleton, skeleton @ d], dim=1)
        return product
    skeleton = factor_in(group, tensors, group.name, "skeleton")
    product = torch.empty(len(permutation), HIDDEN, dtype=torch.float64)
    product[permutation] = torch.cat([skeleton, d @ skeleton])
    return product


def load(layer, tensors):
    for name, tensor in tensors.items():
        member, _, last = name.removeprefix("m.").rpartition(".")
        parameter, shard = getattr(layer, last), SHARDS[member]
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def check_forward(layer, weight, tolerance, dtype):
    for tokens in (1, 5, 64):
        x = torch.randn(tokens, HIDDEN).to(dtype)
        y = layer(x)[0]
        expected = x.double() @ weight.T
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= tolerance * expected.norm(), tokens


@pytest.mark.parametrize(("weights", "dtype"), CASES)
@pytest.mark.parametrize("form", ["svd", "pivga", "dense"])
@pytest.mark.parametrize("partition", [[QKV], [["q_proj"], ["k_proj"], ["v_proj"]], [["q_proj", "v_proj"], ["k_proj"]]])
def test_fused_layer(form, partition, weights, dtype):
    """Odd ranks too."""
    made = [make_group(m, form, "columns", 9 + 3 * i, weights, dtype) for i, m in enumerate(partition)]
    tensors = {name: tensor for _, part in made for name, tensor in part.items()}
    layer = make_layer("qkv_proj", [group for group, _ in made], dtype=dtype)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    dense = {}
    for group, part in made:
        rows = [ROWS[name.removeprefix("m.")] for name in group.members]
        dense |= zip(group.members, dense_of(group, part).split(rows), strict=True)
    weight = torch.cat([dense[f"m.{name}"] for name in QKV])
    check_forward(layer, weight, TOLERANCE[weights], dtype)
    assert not any(name in dict(layer.named_parameters(recurse=False)) for name in ("skeleton", "lowrank_a_scale"))


@pytest.mark.parametrize(("weights", "dtype"), CASES)
@pytest.mark.parametrize("form", ["svd", "pivga", "dense"])
def test_row_parallel_layer_and_reload(form, weights, dtype):
    for_layer = [make_group(["o_proj"], form, "rows", 21, weights, dtype) for _ in range(2)]
    assert for_layer[0][0] == for_layer[1][0]
    layer = make_layer("o_proj", [for_layer[0][0]], dtype=dtype)
    for group, tensors in for_layer:
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        check_forward(layer, dense_of(group, tensors), TOLERANCE[weights], dtype)
        layer.quant_method.create_weights(
            layer, HIDDEN, [ROWS["o_proj"]], HIDDEN, ROWS["o_proj"], dtype
        )  # as a reload finds it


def loaded(made, dtype):
    """A fused layer of these groups, and the matrix that they stand for."""
    layer, dense = make_layer("qkv_proj", [group for group, _ in made], dtype=dtype), {}
    for group, part in made:
        load(layer, part)
        rows = [ROWS[name.removeprefix("m.")] for name in group.members]
        dense |= zip(group.members, dense_of(group, part).split(rows), strict=True)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, torch.cat([dense[f"m.{name}"] for name in QKV])


@pytest.mark.parametrize(
    "fine", [("skeleton",), ("interpolation",), ("lowrank_a",), ("lowrank_b",)], ids=lambda fine: fine[0]
)
def test_factors_of_two_types(fine):
    """int8 for one factor of q, int4 for the other; k dense in int4, v in int8."""
    form, dtype = "svd" if fine[0].startswith("lowrank") else "pivga", torch.bfloat16
    layer, weight = loaded(
        [
            make_group(["q_proj"], form, "columns", 24, "int4", dtype, own=((fine[0], "int8"),)),
            make_group(["k_proj"], "dense", "columns", 0, "int4", dtype),
            make_group(["v_proj"], "dense", "columns", 0, "int4", dtype, own=(("matrix", "int8"),)),
        ],
        dtype,
    )
    check_forward(layer, weight, TOLERANCE["int8"], dtype)


@pytest.mark.parametrize("alike", [QKV, ["q_proj", "v_proj"], ["k_proj", "v_proj"]])
def test_dense_matrices_on_one_grid_are_one_product(alike):
    dtype = torch.bfloat16
    made = [make_group([name], "dense", "columns", 0, "int8" if name in alike else "int4", dtype) for name in QKV]
    layer, weight = loaded(made, dtype)
    check_forward(layer, weight, TOLERANCE["int8"], dtype)
    assert sorted(part.second.rows for part in layer.quant_method.parts) == sorted(
        [sum(ROWS[name] for name in alike), *(ROWS[name] for name in QKV if name not in alike)]
    )


def process_of_two(tp_rank, columns, form, weights, dtype):
    """A row-parallel layer's method in one of two processes, the layer, its inputs there, and the dense matrix."""
    group = LinearGroup(("m.o_proj",), (ROWS["o_proj"],), columns, "rows", "m.o_proj")
    torch.manual_seed(0)
    x, rank = torch.randn(300, columns, dtype=torch.float64), 21
    parts = [torch.randn(ROWS["o_proj"], rank), torch.randn(rank, columns)]
    product = parts[0] @ parts[1]
    ranked = RankedGroup(group, rank, form, weights)
    if form == "dense":
        ranked, parts = RankedGroup(group, group.full_rank, "pivga", weights), [product]
    tensors = compressed_tensors(ranked, parts, dtype, x.T @ x)
    local = columns // 2
    made = config_group(ranked)
    method, layer = method_in_process(
        RowParallelLinear, tp_rank, 2, ["m.o_proj"], made, tensors, local, [ROWS["o_proj"]], None, columns, dtype
    )
    return method, layer, x[:7].to(dtype)[:, tp_rank * local :][:, :local], x[:7], product


@pytest.mark.parametrize(("weights", "dtype"), CASES)
@pytest.mark.parametrize("form", ["svd", "pivga", "dense"])
def test_shares_of_two_processes_add_up(form, weights, dtype):
    """Reference: the product before rounding, which int4 leaves by a tenth."""
    shares = []
    for tp_rank in range(2):
        method, layer, own, x, product = process_of_two(tp_rank, 256, form, weights, dtype)
        shares.append(method.apply(layer, own).double())
    expected = x @ product.double().T
    assert (sum(shares) - expected).norm() < (0.2 if weights == "int4" else 0.1) * expected.norm()


def test_inputs_of_a_group_are_of_one_process():
    """192 inputs share scales by 64; the half of them is no whole number of groups."""
    with pytest.raises(FormatError, match=r"lowrank_b_scale: 96 inputs of a process.*--weights int8"):
        process_of_two(0, 192, "svd", "int4", torch.bfloat16)


def test_dense_member_beside_grids():
    """k stays as it was, in the model's type."""
    made = [make_group([name], "pivga", "columns", 16, "int8", torch.float32) for name in ("q_proj", "v_proj")]
    layer = make_layer("qkv_proj", [group for group, _ in made])
    k = torch.randn(ROWS["k_proj"], HIDDEN)
    load(layer, {name: t for _, part in made for name, t in part.items()} | {"m.k_proj.weight": k})
    layer.quant_method.process_weights_after_loading(layer)
    q, v = (dense_of(group, part) for group, part in made)
    check_forward(layer, torch.cat([q, k.double(), v]), TOLERANCE["int8"], torch.float32)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_traces(weights):
    group, tensors = make_group(QKV, "pivga", "columns", 24, weights, torch.float32)
    layer = make_layer("qkv_proj", [group])
    load(layer, tensors)
    check_traces(layer, dense_of(group, tensors).float(), tolerance=0.6)


def test_no_kernel():
    """Where vLLM has none it is said what to do."""
    group, tensors = make_group(["o_proj"], "svd", "rows", 32, "int4", torch.float32)
    layer = make_layer("o_proj", [group], dtype=torch.float32)
    load(layer, tensors)
    with pytest.raises(FormatError, match=r"int4.*float32 on cpu.*--weights int8"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("shape", [(37, 51), (96, 64), (1, 7), (33, 130)])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4_group32"])
def test_any_shape(name, shape):
    """Kernels that ask for whole tiles get them filled up."""
    from fermisvd.rounding import round_to_nearest
    from fermisvd.schemes import stored

    scheme, dtype = SCHEMES[name], torch.bfloat16
    rounded = round_to_nearest(torch.randn(shape, dtype=torch.float64), scheme, dtype)
    tensors = stored(scheme, "w", rounded.codes, rounded.scales)
    factor = grid_factor(scheme, tensors["w_packed" if scheme.packed else "w"], rounded.scales, shape[1])
    x = torch.randn(6, 2 * shape[1]).to(dtype)[:, : shape[1]]
    expected = x.double() @ rounded.values.T
    assert (factor(x).double() - expected).norm() <= 0.06 * expected.norm()
    y = torch.zeros(6, 2 * shape[0], dtype=dtype)
    factor.write(x, y[:, : shape[0]])
    assert torch.equal(y[:, : shape[0]], factor(x)) and not y[:, shape[0] :].any()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_scale_is_refused(value):
    group, tensors = make_group(["o_proj"], "svd", "rows", 16, "int8", torch.float32)
    tensors["m.o_proj.lowrank_a_scale"][3] = value
    with pytest.raises(FormatError, match="lowrank_a_scale"):
        load(make_layer("o_proj", [group]), tensors)
