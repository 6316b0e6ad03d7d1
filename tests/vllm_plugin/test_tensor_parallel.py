"""The linear method in every process of a tensor parallel layer, here in one: its share of the dense product.

They do not talk to each other here; vLLM's own layers gather and reduce. Real processes: test_families.py.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from fermisvd.errors import FormatError
from fermisvd.format import Group, expected_tensors
from fermisvd.pivga import dense_product, fix_gauge
from fermisvd_vllm.kinds import parts_of
from fermisvd_vllm.layout import numbers_held
from fermisvd_vllm.linear import FermiSVDLinearMethod

COLUMNS, RANK = 48, 7  # a rank that no TP size divides
SIZES = [1, 2, 4, 8]


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def make_group(members, rows, form, side, columns=COLUMNS):
    """A group, its checkpoint tensors, and the dense weight (sum of rows x columns)."""
    a, b = torch.randn(sum(rows), RANK, dtype=torch.float64), torch.randn(RANK, columns, dtype=torch.float64)
    group = Group(members=tuple(members), form=form, side=side if form == "pivga" else None, rank=RANK)
    if form == "svd":
        tensors = {f"{m}.lowrank_a": part for m, part in zip(members, a.split(rows), strict=True)}
        return group, tensors | {f"{members[0]}.lowrank_b": b}, a @ b
    gauge = fix_gauge(a, b, side)
    parts = gauge.skeleton.split(rows) if side == "columns" else [gauge.skeleton]
    tensors = {f"{m}.skeleton": part for m, part in zip(members, parts, strict=True)}
    tensors |= {f"{members[0]}.interpolation": gauge.interpolation, f"{members[0]}.permutation": gauge.permutation}
    return group, tensors, dense_product(gauge)


def method_in_process(
    kind,
    tp_rank,
    tp_size,
    members,
    group,
    tensors,
    columns,
    rows,
    shard_ids,
    inputs=COLUMNS,
    dtype=torch.float32,
    name="layer",
    **attributes,
):
    """The linear method of one process with its weights loaded, and the layer that holds them. inputs: of the whole
    layer."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    attributes = {"output_sizes": [tp_size * m for m in rows], **attributes}
    for attribute, value in {"tp_rank": tp_rank, "tp_size": tp_size, **attributes}.items():
        setattr(layer, attribute, value)
    parts = parts_of(members, {member: group for member in group.members}, name)  # noqa: C420  its type
    assert parts is not None
    method = FermiSVDLinearMethod(parts, members, name)
    method.create_weights(layer, columns, rows, inputs, sum(rows) * tp_size, dtype)
    for stored, tensor in tensors.items():
        member, _, tensor_name = stored.rpartition(".")
        parameter = getattr(layer, tensor_name)
        shard = () if shard_ids is None else (shard_ids[members.index(member)],)
        parameter.weight_loader(parameter, tensor, *shard)
    method.process_weights_after_loading(layer)
    return method, layer


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_row_parallel_shares_add_up(form, tp_size):
    group, tensors, dense = make_group(["o"], [40], form, "rows")
    x = torch.randn(5, COLUMNS)
    shares = []
    for tp_rank in range(tp_size):
        local = COLUMNS // tp_size
        method, layer = method_in_process(RowParallelLinear, tp_rank, tp_size, ["o"], group, tensors, local, [40], None)
        shares.append(method.apply(layer, x[:, tp_rank * local :][:, :local]))
    torch.testing.assert_close(sum(shares), x @ dense.float().T, rtol=1e-3, atol=1e-3 * dense.abs().max().item())


@pytest.mark.parametrize("fused_on_disk", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_column_parallel_shares_are_the_heads_of_a_process(form, tp_size, kv_heads, fused_on_disk):
    """Head size 4, 8 query heads; with fewer kv heads than processes, neighbours hold the same one."""
    head, heads = 4, 8
    full = [heads * head, kv_heads * head, kv_heads * head]
    local = [heads // tp_size * head] + [max(1, kv_heads // tp_size) * head] * 2
    copies = max(1, tp_size // kv_heads)
    members = ["qkv"] if fused_on_disk else ["q", "k", "v"]
    group, tensors, dense = make_group(members, [sum(full)] if fused_on_disk else full, form, "columns")
    x = torch.randn(5, COLUMNS)
    q, k, v = (x @ part.float().T for part in dense.split(full))
    for tp_rank in range(tp_size):
        kv = tp_rank * kv_heads // tp_size * head
        expected = [q[:, tp_rank * local[0] :][:, : local[0]], k[:, kv:][:, : local[1]], v[:, kv:][:, : local[2]]]
        attributes = {"num_kv_head_replicas": copies, "output_sizes": [tp_size * rows for rows in local]}
        shard_ids = None if fused_on_disk else ["q", "k", "v"]
        method, layer = method_in_process(
            QKVParallelLinear, tp_rank, tp_size, members, group, tensors, COLUMNS, local, shard_ids, **attributes
        )
        y = method.apply(layer, x)
        torch.testing.assert_close(y, torch.cat(expected, -1), rtol=1e-3, atol=1e-3 * dense.abs().max().item())


QKVZ = ("linear_attn.in_proj_qkvz", ["qkv", "z"], [(0, 1, 2), 3])  # as Qwen3.5's mapper hands shards to the loader


@pytest.mark.parametrize("groups", [["qkv", "z"], ["qkv"], ["z"]])
@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_a_member_may_give_several_outputs(form, tp_size, groups):
    """Qwen3.5's gated delta rule: in_proj_qkv on disk is q, k and v, each split by heads. A member in no group is
    loaded dense."""
    name, members, shard_ids = QKVZ
    full = {"qkv": [16, 16, 32], "z": [32]}
    group, tensors, dense = make_group(groups, [sum(full[member]) for member in groups], form, "columns")
    weights = dict(zip(groups, dense.split([sum(full[member]) for member in groups]), strict=True))
    for member in full.keys() - weights.keys():
        weights[member] = tensors[f"{member}.weight"] = torch.randn(sum(full[member]), COLUMNS).double()
    x = torch.randn(5, COLUMNS)
    outputs = [x @ part.float().T for member in members for part in weights[member].split(full[member])]
    local = [rows // tp_size for member in members for rows in full[member]]
    for tp_rank in range(tp_size):
        expected = [y[:, tp_rank * rows :][:, :rows] for y, rows in zip(outputs, local, strict=True)]
        method, layer = method_in_process(
            MergedColumnParallelLinear, tp_rank, tp_size, members, group, tensors, COLUMNS, local, shard_ids, name=name
        )
        scale = max(weight.abs().max().item() for weight in weights.values())
        torch.testing.assert_close(method.apply(layer, x), torch.cat(expected, -1), rtol=1e-3, atol=1e-3 * scale)


def test_outputs_that_no_member_gives_are_refused():
    name, members, _ = QKVZ
    group, tensors, _ = make_group(members, [64, 32], "svd", "columns")
    arguments = (MergedColumnParallelLinear, 0, 1, members, group, tensors, COLUMNS, [16, 16, 32, 32])
    with pytest.raises(FormatError, match=r"vLLM loads shards \(0, 1\) of a layer as one"):
        method_in_process(*arguments, [(0, 1), 3], name=name)
    with pytest.raises(FormatError, match="vLLM splits it in 4, the checkpoint stores qkv, z"):
        method_in_process(*arguments, [(0, 1, 2), 3], name="another")


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_numbers_of_all_processes_are_the_checkpoints(form, side, tp_size):
    """Sharded ones add up over processes, replicated ones are on each."""
    group, tensors, _ = make_group(["w"], [40], form, side)
    kind, local = (ColumnParallelLinear, ([40 // tp_size], COLUMNS))
    if side == "rows":
        kind, local = (RowParallelLinear, ([40], COLUMNS // tp_size))
    method, _ = method_in_process(kind, 0, tp_size, ["w"], group, tensors, local[1], local[0], None)
    sharded, replicated = numbers_held(method.slots)
    shapes = expected_tensors(group, [40], COLUMNS)
    stored = sum(torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith("permutation"))
    assert sharded * tp_size + replicated == stored


@pytest.mark.parametrize(("rows", "message"), [([20, 12], "20 rows or columns do not split"), ([16, 24], "shape")])
def test_fused_rows_that_do_not_split_are_refused(rows, message):
    """A checkpoint whose fused layer is not as wide as the model's."""
    group, tensors, _ = make_group(["gate_up"], [32], "svd", "columns")
    with pytest.raises(FormatError, match=rf"layer: gate_up\.lowrank_a: {message}"):
        method_in_process(
            ColumnParallelLinear, 0, 2, ["gate_up"], group, tensors, COLUMNS, [8, 8], None, output_sizes=rows
        )
