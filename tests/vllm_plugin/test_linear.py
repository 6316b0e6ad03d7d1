"""Fused loading and the forward of one layer, with vLLM's real linear layers but no engine."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from fermisvd.errors import FormatError
from fermisvd.format import CheckpointConfig, Group, checkpoint_config
from fermisvd.pivga import dense_product, fix_gauge
from fermisvd_vllm.config import FermiSVDConfig
from fermisvd_vllm.kinds import part_of
from fermisvd_vllm.layout import Stored
from fermisvd_vllm.linear import FermiSVDLinearMethod
from fermisvd_vllm.parts import GroupPart
from fermisvd_vllm.tuning import BUCKETS, Op, OwnOps, check_agreement

HIDDEN, HEAD, HEADS, KV_HEADS = 96, 32, 3, 1
ROWS = {"q_proj": 96, "k_proj": 32, "v_proj": 32, "o_proj": 96, "gate_proj": 136, "up_proj": 136}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1, "o_proj": None}
PARTITIONS = {
    "joint": [["q_proj", "k_proj", "v_proj"]],
    "separate": [["q_proj"], ["k_proj"], ["v_proj"]],
    "mixed": [["q_proj", "v_proj"], ["k_proj"]],
    "partly dense": [["q_proj"], ["k_proj"]],
}
MIXED_SIDES = {
    "separate": [["q_proj"], ["k_proj"], ["v_proj"]],
    "not neighbours": [["q_proj", "v_proj"], ["k_proj"]],
}


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def make_group(members, form, side, rank):
    """A group, its checkpoint tensors, and the dense weight of each member they stand for (float64)."""
    names = tuple(f"m.{x}" for x in members)
    rows = [ROWS[x] for x in members]
    a, b = torch.randn(sum(rows), rank, dtype=torch.float64), torch.randn(rank, HIDDEN, dtype=torch.float64)
    if form == "svd":
        tensors = {(members[0], "lowrank_b"): b}
        tensors |= {(x, "lowrank_a"): part for x, part in zip(members, a.split(rows), strict=True)}
        dense = a @ b
    else:
        gauge = fix_gauge(a, b, side)
        tensors = {(members[0], "interpolation"): gauge.interpolation, (members[0], "permutation"): gauge.permutation}
        parts = [gauge.skeleton] if side == "rows" else gauge.skeleton.split(rows)
        tensors |= {(x, "skeleton"): part for x, part in zip(members, parts, strict=True)}
        dense = dense_product(gauge)
    group = Group(members=names, form=form, side=side if form == "pivga" else None, rank=rank)
    return group, tensors, dict(zip(members, dense.split(rows), strict=True))


def make_partition(partition, form):
    """Groups of q/k/v, tensors and dense weights of all three; what is in no group is stored dense."""
    made = [make_group(m, form, "columns", 5 + 3 * i) for i, m in enumerate(PARTITIONS[partition])]
    tensors = {key: value for _, part, _ in made for key, value in part.items()}
    dense = {key: value for _, _, part in made for key, value in part.items()}
    for member in ("q_proj", "k_proj", "v_proj"):
        if member not in dense:
            dense[member] = torch.randn(ROWS[member], HIDDEN, dtype=torch.float64)
            tensors[member, "weight"] = dense[member]
    return [group for group, _, _ in made], tensors, dense


def make_mixed_sides(partition):
    """As make_partition, pivga form, k on the other side."""
    made = [make_group(m, "pivga", "rows" if m == ["k_proj"] else "columns", 9) for m in MIXED_SIDES[partition]]
    tensors = {key: value for _, part, _ in made for key, value in part.items()}
    return [group for group, _, _ in made], tensors, {key: value for _, _, part in made for key, value in part.items()}


def make_layer(kind, groups, bias=False, own_ops=None, dtype=torch.float32) -> Any:  # create_weights adds attributes
    entry = checkpoint_config(groups, {}).model_dump(mode="json", exclude_none=True)
    config = FermiSVDConfig(entry, own_ops)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    common: dict[str, Any] = dict(
        bias=bias, quant_config=config, prefix=f"m.{kind}", disable_tp=True, params_dtype=dtype
    )
    if kind == "qkv_proj":
        return QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **common)
    if kind == "gate_up_proj":
        return MergedColumnParallelLinear(HIDDEN, [136, 136], **common)
    return RowParallelLinear(HIDDEN, ROWS["o_proj"], **common)


def load(layer, tensors):
    for (member, name), tensor in tensors.items():
        parameter = getattr(layer, name)
        value = tensor if name == "permutation" else tensor.float()
        shard = SHARDS[member]
        parameter.weight_loader(parameter, value) if shard is None else parameter.weight_loader(parameter, value, shard)


def check_forward(layer, dense, members, bias=None):
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(7, HIDDEN)
    weight = torch.cat([dense[m] for m in members]).float()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    torch.testing.assert_close(
        y, nn.functional.linear(x, weight, bias), rtol=1e-3, atol=1e-3 * weight.abs().max().item()
    )
    flat = ("lowrank_a", "lowrank_b", "skeleton", "interpolation", "permutation", "weight")
    assert not any(hasattr(layer, name) for name in flat), "the factors replace the flat parameters"


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_qkv_equals_the_dense_product(partition, form, bias):
    groups, tensors, dense = make_partition(partition, form)
    layer = make_layer("qkv_proj", groups, bias)
    load(layer, tensors)
    if bias:
        nn.init.normal_(layer.bias)
    check_forward(layer, dense, ["q_proj", "k_proj", "v_proj"], layer.bias if bias else None)


@pytest.mark.parametrize("partition", MIXED_SIDES)
def test_sides_and_members_may_be_mixed(partition):
    groups, tensors, dense = make_mixed_sides(partition)
    layer = make_layer("qkv_proj", groups)
    load(layer, tensors)
    check_forward(layer, dense, ["q_proj", "k_proj", "v_proj"])


@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("rank", [1, 33, 96])
def test_fused_gate_up_at_extreme_ranks(form, rank):
    group, tensors, dense = make_group(["gate_proj", "up_proj"], form, "columns", rank)
    layer = make_layer("gate_up_proj", [group])
    load(layer, tensors)
    check_forward(layer, dense, ["gate_proj", "up_proj"])


@pytest.mark.parametrize(("form", "side"), [("svd", "rows"), ("pivga", "rows"), ("pivga", "columns")])
@pytest.mark.parametrize("rank", [1, 33, 96])
def test_row_parallel_layer(form, side, rank):
    group, tensors, dense = make_group(["o_proj"], form, side, rank)
    layer = make_layer("o_proj", [group])
    load(layer, tensors)
    check_forward(layer, dense, ["o_proj"])


@pytest.fixture
def like_a_gpu(kernels, monkeypatch):
    """Has layers do what they do on a GPU, kernels the faster up to that many tokens. Gives what layers take for it,
    and how often each way of each op ran."""
    ran = Counter()

    def counted(name, call):
        def run(*operands):
            ran[name] += 1
            return call(*operands)

        return run

    ops = kernels.COLUMNS, kernels.OUTPUTS
    for op in ops:
        monkeypatch.setattr(op, "kernel", counted(f"{op.name}_kernel", op.kernel))
        monkeypatch.setattr(op, "reference", counted(f"{op.name}_reference", op.reference))

    def choose(most):
        def measure(op, x, *more):
            assert all(len(own) == BUCKETS[-1] for own in x)
            check_agreement(op, [own[:3] for own in x], *more)
            op.limits[op.key(x, more[0])] = most
            ran.clear()

        return OwnOps(frozenset({"cpu"}), measure), ran

    yield choose
    for op in ops:
        op.limits.clear()


def way(most):
    return "kernel" if most >= 7 else "reference"  # check_forward's tokens


@pytest.mark.parametrize("most", [2, 50])
@pytest.mark.parametrize("rank", [1, 33, 96])
def test_columns_on_a_gpu(like_a_gpu, rank, most):
    own_ops, ran = like_a_gpu(most)
    members = ["q_proj", "k_proj", "v_proj"]
    group, tensors, dense = make_group(members, "pivga", "columns", rank)
    layer = make_layer("qkv_proj", [group], own_ops=own_ops)
    load(layer, tensors)
    check_forward(layer, dense, members)
    assert list(ran) == [f"columns_{way(most) if rank < 96 else 'reference'}"]  # nothing to multiply at rank 96


@pytest.mark.parametrize("rank", [1, 33, 96])
def test_rows_on_a_gpu(like_a_gpu, rank):
    own_ops, ran = like_a_gpu(50)
    group, tensors, dense = make_group(["o_proj"], "pivga", "rows", rank)
    layer = make_layer("o_proj", [group], own_ops=own_ops)
    load(layer, tensors)
    check_forward(layer, dense, ["o_proj"])
    assert not ran


@pytest.mark.parametrize("most", [2, 50])
@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_several_groups_on_a_gpu(like_a_gpu, partition, form, most):
    """One kernel for all first and one for all second products."""
    own_ops, ran = like_a_gpu(most)
    groups, tensors, dense = make_partition(partition, form)
    layer = make_layer("qkv_proj", groups, own_ops=own_ops)
    load(layer, tensors)
    check_forward(layer, dense, ["q_proj", "k_proj", "v_proj"])
    sides = ["columns"] * (form == "pivga") + ["outputs"] * (partition != "joint")
    assert list(ran) == [f"{side}_{way(most)}" for side in sides]


@pytest.mark.long
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_layers_compile_as_on_a_gpu(like_a_gpu, partition, form):
    """By inductor, s changed in place, in one graph for any number of tokens."""
    own_ops, _ = like_a_gpu(4)
    groups, tensors, dense = make_partition(partition, form)
    layer = make_layer("qkv_proj", groups, own_ops=own_ops)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, 2 * x), fullgraph=True, dynamic=True)
    weight = torch.cat([dense[member] for member in ("q_proj", "k_proj", "v_proj")])
    for tokens in (3, 8, 5):
        x = torch.randn(tokens, HIDDEN)
        expected = (2 * x.double() @ weight.T).float()
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_batch_invariance_keeps_to_plain_products(like_a_gpu, monkeypatch):
    own_ops, ran = like_a_gpu(50)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    group, tensors, dense = make_group(["q_proj", "k_proj", "v_proj"], "pivga", "columns", 33)
    layer = make_layer("qkv_proj", [group], own_ops=own_ops)
    load(layer, tensors)
    check_forward(layer, dense, ["q_proj", "k_proj", "v_proj"])
    assert not ran


def test_layers_of_like_ranks_share_a_measurement():
    """Steps of 128; ranks that loads cannot be wide at are apart."""

    columns = Op("columns", print, print, keyed_by_width=True)

    def key(rank, width=4096):
        return columns.key([torch.empty(1, width)], [torch.empty(rank, width - rank)])

    assert key(720) == key(736)
    assert len({key(720), key(800), key(725), key(720, 2048)}) == 4


def test_layer_in_no_group_is_vllms_own():
    group, _, _ = make_group(["gate_proj", "up_proj"], "svd", None, 4)
    layer = make_layer("gate_up_proj", [group])
    other = layer.quant_config.get_quant_method(layer, "m.o_proj")
    assert isinstance(other, UnquantizedLinearMethod)
    assert layer.quant_config.get_quant_method(nn.Embedding(3, 3), "m.embed") is None


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_every_missing_tensor_is_named(form):
    group, tensors, _ = make_group(["q_proj", "k_proj", "v_proj"], form, "columns", 6)
    for missing in tensors:
        layer = make_layer("qkv_proj", [group])
        load(layer, {key: value for key, value in tensors.items() if key != missing})
        with pytest.raises(FormatError, match=rf"m\.qkv_proj: missing.*m\.{missing[0]}\.{missing[1]}"):
            layer.quant_method.process_weights_after_loading(layer)


def test_bad_values_are_refused_while_loading():
    group, tensors, _ = make_group(["q_proj", "k_proj", "v_proj"], "pivga", "columns", 6)
    broken = tensors["q_proj", "permutation"].clone()
    broken[0] = broken[1]
    for key, value, message in [
        (("q_proj", "permutation"), broken, "permutation"),
        (("k_proj", "skeleton"), tensors["k_proj", "skeleton"] * float("nan"), "NaN"),
        (("v_proj", "skeleton"), tensors["v_proj", "skeleton"][:, 1:], "shape"),
    ]:
        layer = make_layer("qkv_proj", [group])
        with pytest.raises(FormatError, match=rf"m\.qkv_proj: m\.{key[0]}\.{key[1]}: .*{message}"):
            load(layer, tensors | {key: value})


def test_tensor_that_the_config_does_not_expect_is_refused():
    group, tensors, _ = make_group(["q_proj", "k_proj", "v_proj"], "svd", None, 6)
    layer = make_layer("qkv_proj", [group])
    with pytest.raises(FormatError, match="not expected"):
        load(layer, {("k_proj", "lowrank_b"): tensors["q_proj", "lowrank_b"]})


def check_traces(layer, weight, tolerance=1e-3):
    """Nothing data-dependent, which no CUDA graph could hold: one graph for any number of tokens, without a break."""
    layer.quant_method.process_weights_after_loading(layer)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, dynamic=True, backend=keep)
    for tokens in (3, 17, 64):
        x = torch.randn(tokens, HIDDEN, dtype=weight.dtype)
        torch.testing.assert_close(traced(x), x @ weight.T, rtol=tolerance, atol=tolerance * weight.abs().max().item())
    assert len(graphs) == 1
    calls = {getattr(node.target, "__name__", node.target) for node in graphs[0].graph.nodes if "call" in node.op}
    assert not calls & {"item", "nonzero", "tolist", "cpu", "cuda", "to"}, "waits for the device, or moves data"


@pytest.mark.parametrize(("form", "side"), [("svd", None), ("pivga", "columns"), ("pivga", "rows")])
def test_apply_traces_with_dynamic_token_counts(form, side):
    group, tensors, dense = make_group(["o_proj"], form, side, 33)
    layer = make_layer("o_proj", [group])
    load(layer, tensors)
    check_traces(layer, dense["o_proj"].float())


@pytest.mark.parametrize("partition", ["joint", "separate", "mixed"])
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_fused_apply_traces_with_dynamic_token_counts(form, partition):
    groups, tensors, dense = make_partition(partition, form)
    layer = make_layer("qkv_proj", groups)
    load(layer, tensors)
    check_traces(layer, torch.cat([dense[m] for m in ("q_proj", "k_proj", "v_proj")]).float())


def test_permutation_is_valid_before_anything_is_loaded():
    """--load-format dummy leaves integer tensors alone."""
    group, _, _ = make_group(["o_proj"], "pivga", "rows", 33)
    layer = make_layer("o_proj", [group])
    assert sorted(layer.permutation.tolist()) == list(range(96))


@pytest.mark.long
def test_register_is_light_and_can_be_called_twice():
    import subprocess
    import sys

    code = "import sys, fermisvd_vllm; print('vllm' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False",
        "False",
    ]
    import fermisvd_vllm

    fermisvd_vllm.register()
    fermisvd_vllm.register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("fermisvd") is FermiSVDConfig


def test_members_are_renamed_as_vllm_renames_modules():
    """OPT and vision models: names in the checkpoint differ from vLLM's."""
    from vllm.model_executor.models.utils import WeightsMapper

    group, tensors, dense = make_group(["q_proj", "k_proj", "v_proj"], "pivga", "columns", 6)
    entry = CheckpointConfig(groups=(group,)).model_dump(mode="json", exclude_none=True)
    config = FermiSVDConfig.from_config(entry)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"m.": "language_model.m."}))
    layer = QKVParallelLinear(
        HIDDEN,
        HEAD,
        HEADS,
        KV_HEADS,
        bias=False,
        quant_config=config,
        prefix="language_model.m.qkv_proj",
        disable_tp=True,
        params_dtype=torch.float32,
    )
    load(layer, tensors)
    check_forward(layer, dense, ["q_proj", "k_proj", "v_proj"])


@pytest.mark.parametrize(("form", "side"), [("svd", None), ("pivga", "columns"), ("pivga", "rows")])
@pytest.mark.parametrize("bias", [False, True])
def test_reload_writes_into_the_storage_that_graphs_read(form, side, bias):
    check_reload("o_proj", [["o_proj"]], form, side, bias)


@pytest.mark.parametrize(("form", "side"), [("svd", None), ("pivga", "columns")])
def test_reload_of_several_groups_on_a_gpu(form, side, like_a_gpu):
    own_ops, _ = like_a_gpu(50)
    check_reload("qkv_proj", PARTITIONS["mixed"], form, side, True, own_ops)


def test_reload_of_rows_on_a_gpu(like_a_gpu):
    own_ops, _ = like_a_gpu(50)
    check_reload("o_proj", [["o_proj"]], "pivga", "rows", False, own_ops)


class QuantisedPart(GroupPart):
    """A kind that the plugin does not have: the dense matrix as int8, with a scale for each of its rows."""

    one_product = False
    codes: torch.Tensor
    scales: torch.Tensor

    def stored(self, sizes):
        [member] = self.members
        rows = sizes.member_rows[member]
        yield Stored("codes", member, (rows, sizes.inputs), outputs=0, inputs=1, dtype=torch.int8)
        yield Stored("scales", member, (rows,), outputs=0)

    def take(self, loaded, products):
        for name in ("codes", "scales"):
            self.register_buffer(name, self.keep(name, loaded.stacked(name, self.members)))

    def shared(self, x):
        return x

    def outputs(self, t):
        return nn.functional.linear(t, self.codes.to(t.dtype)) * self.scales


def test_a_new_kind_of_part_is_a_class():
    """Beside one of another kind: loaded, checked, and joined without a change elsewhere."""
    quantised, other = (Group(members=(f"m.{x}",), form="svd", rank=4) for x in ("gate_proj", "up_proj"))
    parts = [QuantisedPart([0], quantised), part_of([1], other)]
    method = FermiSVDLinearMethod(parts, ["m.gate_proj", "m.up_proj"], "m.gate_up_proj")
    layer: Any = nn.Module()
    layer.output_sizes = [8, 16]
    method.create_weights(layer, HIDDEN, [8, 16], HIDDEN, 24, torch.float32)
    codes = torch.randint(-127, 128, (8, HIDDEN), dtype=torch.int8)
    scales, a, b = torch.rand(8), torch.randn(16, 4), torch.randn(4, HIDDEN)
    for name, value, member in [("codes", codes, 0), ("scales", scales, 0), ("lowrank_a", a, 1), ("lowrank_b", b, 1)]:
        parameter = getattr(layer, name)
        assert parameter.dtype == value.dtype
        if name == "lowrank_b":
            with pytest.raises(FormatError, match=r"missing from the checkpoint: m\.up_proj\.lowrank_b"):
                method.process_weights_after_loading(layer)
        parameter.weight_loader(parameter, value, member)
    method.process_weights_after_loading(layer)
    x = torch.randn(3, HIDDEN)
    expected = torch.cat([x @ (codes.float() * scales[:, None]).T, x @ (a @ b).T], dim=-1)
    torch.testing.assert_close(method.apply(layer, x), expected, rtol=1e-4, atol=1e-2)


class KeepsWeight(UnquantizedLinearMethod):
    """As on a GPU; on a CPU vLLM packs the weight away."""

    def process_weights_after_loading(self, layer):
        vars(layer)["cpu_linear"] = nn.functional.linear


def check_reload(kind, partition, form, side, bias, own_ops=None, dtype=torch.float32, tolerance=1e-3):
    """vLLM's own layerwise reload: other values and another permutation, the same addresses."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    def make():
        made = [make_group(members, form, side, 33 - 13 * i) for i, members in enumerate(partition)]
        tensors = {key: value for _, part, _ in made for key, value in part.items()}
        return [group for group, _, _ in made], tensors, {k: v for _, _, part in made for k, v in part.items()}

    members = ["q_proj", "k_proj", "v_proj"] if kind == "qkv_proj" else ["o_proj"]
    groups, tensors, dense = make()
    layer = make_layer(kind, groups, bias, own_ops, dtype)
    layer.quant_method.gemm = KeepsWeight()
    record_metadata_for_reloading(layer)
    load(layer, tensors)
    if bias:
        nn.init.normal_(layer.bias)
    if dtype == torch.float32:
        check_forward(layer, dense, members, layer.bias)
    else:
        layer.quant_method.process_weights_after_loading(layer)
    kept = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    addresses = {name: tensor.data_ptr() for name, tensor in kept.items()}
    assert len(addresses) >= 3

    _, others, other_dense = make()
    initialize_layerwise_reload(layer)
    load(layer, others)
    if bias:
        for member in members:
            values = torch.randn(ROWS[member])
            layer.bias.weight_loader(layer.bias, values, *([SHARDS[member]] if SHARDS[member] is not None else []))
    finalize_layerwise_reload(layer, None)
    kept = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert {name: tensor.data_ptr() for name, tensor in kept.items()} == addresses
    x = torch.randn(7, HIDDEN, dtype=dtype)
    weight = torch.cat([other_dense[member] for member in members]).to(dtype)
    y = layer.quant_method.apply(layer, x, layer.bias)
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * weight.abs().max().item())


def test_groups_that_fit_no_layer_are_refused():
    """Names of another model: every layer is dense then, and would be served with whatever its memory held."""
    group, _, _ = make_group(["gate_proj", "up_proj"], "svd", None, 4)
    group = group.model_copy(update={"members": ("other.gate_proj", "other.up_proj")})
    entry = CheckpointConfig(groups=(group,)).model_dump(mode="json", exclude_none=True)
    layer = RowParallelLinear.__new__(RowParallelLinear)
    method: Any = FermiSVDConfig.from_config(entry).get_quant_method(layer, "m.o_proj")
    with pytest.raises(FormatError, match=r"group other\.gate_proj: the model that vLLM built has no layer for it"):
        method.process_weights_after_loading(layer)


def test_hub_model_is_checked_once_downloaded(tmp_path, monkeypatch):
    """Nothing was here when the engine was configured; a dense tensor is missing in what was downloaded."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    group, _, _ = make_group(["o_proj"], "svd", None, 4)
    entry = CheckpointConfig(groups=(group,), provenance={"dense_tensors": ["m.norm.weight"]}).model_dump(
        mode="json", exclude_none=True
    )
    (snapshot / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file(
        {"m.o_proj.lowrank_a": torch.zeros(96, 4), "m.o_proj.lowrank_b": torch.zeros(4, 96)},
        snapshot / "model.safetensors",
    )
    config: Any = FermiSVDConfig.from_config(entry)  # its vllm_config is made up below
    config.maybe_update_config("owner/name")
    layer: Any = RowParallelLinear(
        HIDDEN, 96, bias=False, quant_config=config, prefix="m.o_proj", disable_tp=True, params_dtype=torch.float32
    )
    config.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(model="owner/name", revision=None),
        load_config=SimpleNamespace(load_format="auto", download_dir=str(tmp_path)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    with pytest.raises(FormatError, match=r"abc: m\.norm\.weight: missing"):
        layer.lowrank_a.weight_loader(layer.lowrank_a, torch.zeros(96, 4))


@pytest.mark.parametrize(
    ("model_type", "impl", "refused"),
    [("bloom", "auto", True), ("bloom", "transformers", False), ("llama", "auto", False)],
)
def test_models_that_reorder_shared_tensors_are_refused(model_type, impl, refused):
    """Bloom's loading transposes heads and q/k/v in every tensor of the layer: a permutation would stay one."""
    from fermisvd_vllm.versions import check_loading_order

    config = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type), model_impl=impl)
    check_loading_order(config, "h.0.mlp.dense")
    if not refused:
        check_loading_order(config, "h.0.self_attention.query_key_value")
        return
    with pytest.raises(FormatError, match="--model-impl transformers"):
        check_loading_order(config, "h.0.self_attention.query_key_value")


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("self_attn.kv_b_proj", ColumnParallelLinear, "vLLM's MLA reads its dense weight"),
        ("mixer.in_proj", ColumnParallelLinear, "vLLM repeats rows of its dense weight"),
        ("mixer.in_proj", MergedColumnParallelLinear, None),  # where the groups divide: rows of five outputs
        ("mixer.out_proj", RowParallelLinear, None),
    ],
)
def test_factors_that_vllm_would_not_read_right_are_refused(name, layer, message):
    """MLA and Mamba 2: a checkpoint that an earlier version made, or another program."""
    group = Group(members=(f"model.layers.0.{name}",), form="svd", rank=7)
    config = FermiSVDConfig(checkpoint_config([group], {}).model_dump(mode="json", exclude_none=True))
    config.packed_modules_mapping = {}
    outputs: Any = [40, 24] if layer is MergedColumnParallelLinear else 64

    def make():
        return layer(48, outputs, quant_config=config, prefix=f"model.layers.0.{name}", disable_tp=True)

    if message is None:
        assert isinstance(make().quant_method, FermiSVDLinearMethod)
    else:
        with pytest.raises(FormatError, match=f"model.layers.0.{name}: compressed, but {message}"):
            make()


def test_mixer_of_another_name_is_found():
    """Granite 4's files say `mamba` where vLLM tells the layer that it is a `mixer`."""
    group = Group(members=("model.layers.0.mamba.out_proj",), form="svd", rank=7)
    config = FermiSVDConfig(checkpoint_config([group], {}).model_dump(mode="json", exclude_none=True))
    config.packed_modules_mapping = {}
    assert config.member_names("model.layers.0.mixer.out_proj") == ["model.layers.0.mamba.out_proj"]
    assert config.member_names("model.layers.1.mixer.out_proj") == ["model.layers.1.mixer.out_proj"]


ONLINE = {  # options of vLLM 0.32 that would quantise a layer's `weight`, and what is said
    "linear": ({"quantization_config": {"linear": "fp8_per_channel"}}, "--quantization-config: linear:"),
    "linear by key": ({"quantization_config": {"linear": {"weight": "mxfp8"}}}, "--quantization-config: linear:"),
    "targets": ({"quantization_config": {"targets": {"*o_proj": "mxfp8"}}}, "--quantization-config: targets:"),
    "ours named": (
        {"quantization": "fermisvd", "quantization_config": {"linear": "mxfp8"}},
        "--quantization-config: linear:",
    ),
    "shorthand": ({"quantization": "fp8_per_channel"}, r"\(fermisvd\) does not match"),  # vLLM's own refusal
    "online": ({"quantization": "online", "quantization_config": {"linear": "mxfp8"}}, r"\(fermisvd\) does not match"),
    "experts": ({"quantization_config": {"moe": "int8_per_channel_weight_only"}}, None),  # no layer of ours
}


@pytest.mark.parametrize("option", ONLINE)
def test_online_quantization_of_factors_is_refused(option, family_checkpoints):
    if not hasattr(FermiSVDConfig, "online_quantization_config"):
        pytest.skip("this vLLM does not quantise beside a checkpoint's own method")
    options, message = ONLINE[option]
    engine = EngineArgs(str(family_checkpoints("llama", "pivga")[1]), dtype="float32", **options)
    if message is None:
        assert isinstance(engine.create_engine_config().quant_config, FermiSVDConfig)
        return
    with pytest.raises(ValueError, match=message):
        engine.create_engine_config()
