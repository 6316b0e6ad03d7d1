from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fermisvd.budget import Form
from fermisvd.errors import FormatError
from fermisvd.format import Group, expected_tensors
from fermisvd.groups import Side
from fermisvd_vllm.kinds import part_of, parts_of
from fermisvd_vllm.layout import LayerSizes, in_halves, shard_of, slots_of
from fermisvd_vllm.parts import DensePart, PivGaColumnsPart, PivGaRowsPart, SvdPart

QKV = ["q", "k", "v"]


def group(members, form: Form = "svd", side: Side | None = None, rank=4):
    return Group(members=tuple(members), form=form, side=side, rank=rank)


def whole(rows):
    """Sections of members that no rank shares."""
    return [((m, m),) for m in rows]


def by_member(*groups):
    return {member: g for g in groups for member in g.members}


def described(parts):
    return [(type(part), part.members, part.group) for part in parts]


def test_joint_group_is_one_part():
    g = group(QKV)
    assert described(parts_of(QKV, by_member(g), "qkv")) == [(SvdPart, (0, 1, 2), g)]


def test_any_partition():
    qv, k = group(["q", "v"], "pivga", "columns"), group(["k"], rank=2)
    expected = [(PivGaColumnsPart, (0, 2), qv), (SvdPart, (1,), k)]
    assert described(parts_of(QKV, by_member(qv, k), "qkv")) == expected


def test_member_without_group_is_a_dense_part():
    q = group(["q"], "pivga", "rows")
    expected = [(PivGaRowsPart, (0,), q), (DensePart, (1,), None), (DensePart, (2,), None)]
    assert described(parts_of(QKV, by_member(q), "qkv")) == expected


def test_layer_without_groups_is_not_ours():
    assert parts_of(QKV, {}, "qkv") is None


def test_group_beyond_the_fused_layer_is_refused():
    with pytest.raises(FormatError, match="o is no part of qkv"):
        parts_of(QKV, by_member(group(["q", "o"])), "qkv")


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 20),
    st.sampled_from([("svd", None), ("pivga", "columns")]),
)
def test_slots_are_the_formats_tensors_side_by_side(rows, columns, form):
    """Without tensor parallelism the slots are exactly what the format stores, and they do not overlap."""
    names = [f"m{i}" for i in range(len(rows))]
    g = group(names, *form, rank=min(sum(rows), columns))
    slots = slots_of([part_of(range(len(rows)), g)], LayerSizes(whole(rows), (columns, columns), "column", 1, "layer"))
    assert {f"m{member}.{name}": slot.shape for (name, member), slot in slots.items()} == expected_tensors(
        g, rows, columns
    )
    for name in {name for name, _ in slots}:
        spans = sorted((s.offset, s.offset + s.size) for (other, _), s in slots.items() if other == name)
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("parallel", ["column", "row"])
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_shards_of_all_processes_make_the_tensor(tp_size, parallel, form):
    rows, columns, rank = 32, 48, 7
    side = None if form == "svd" else "columns" if parallel == "column" else "rows"
    g = group(["w"], form, side, rank)
    local_rows, local_columns = (rows // tp_size, columns) if parallel == "column" else (rows, columns // tp_size)
    sections = [((rows, local_rows),)]
    slots = slots_of([part_of([0], g)], LayerSizes(sections, (columns, local_columns), parallel, tp_size, "layer"))
    sharded = {"column": {"lowrank_a", "skeleton"}, "row": {"lowrank_b", "skeleton"}}[parallel]
    for (name, _), slot in slots.items():
        whole = torch.randn(expected_tensors(g, [rows], columns)[f"w.{name}"])
        pieces = [shard_of(whole, slot, tp_rank, tp_size, name) for tp_rank in range(tp_size)]
        assert all(tuple(piece.shape) == slot.shape for piece in pieces)
        if name in sharded:
            assert slot.shard is not None
            assert torch.equal(torch.cat(pieces, dim=slot.shard), whole)
        else:
            assert slot.shard is None and all(torch.equal(piece, whole) for piece in pieces)


def test_kv_heads_fewer_than_processes_are_replicated():
    """vLLM gives process t the kv head t // (tp_size / kv_heads)."""
    head, kv_heads, tp_size, rank = 8, 2, 8, 3
    g = group(["k"], rank=rank)
    sizes = LayerSizes([((kv_heads * head, head),)], (16, 16), "column", tp_size, "layer")
    slot = slots_of([part_of([0], g)], sizes)["lowrank_a", 0]
    whole = torch.randn(kv_heads * head, rank)
    for t in range(tp_size):
        expected = whole[t // (tp_size // kv_heads) * head :][:head]
        assert torch.equal(shard_of(whole, slot, t, tp_size, "k"), expected)


@pytest.mark.parametrize(("parallel", "side"), [("column", "rows"), ("row", "columns")])
def test_skeleton_on_the_split_side_is_refused(parallel, side):
    part = part_of([0], group(["w"], "pivga", side))
    with pytest.raises(FormatError, match="tensor-parallel-size 1"):
        slots_of([part], LayerSizes(whole([16]), (32, 16), parallel, 2, "layer"))
    assert slots_of([part], LayerSizes(whole([16]), (16, 16), parallel, 1, "layer"))


@pytest.mark.parametrize("shape", [(9, 4), (32, 4), (8, 4), (16, 5), (24, 4), (4,), (0, 4)])
def test_tensor_of_another_size_is_refused(shape):
    """Half as large is no less wrong: it would look like kv heads that several ranks hold."""
    part = part_of([0], group(["w"]))
    slot = slots_of([part], LayerSizes([((16, 8),)], (16, 16), "column", 2, "layer"))["lowrank_a", 0]
    with pytest.raises(FormatError, match=r"w: shape .*expected \(16, 4\)"):
        shard_of(torch.zeros(shape), slot, 0, 2, "w")
    slot = slots_of([part], LayerSizes(whole([16]), (32, 16), "row", 2, "layer"))["lowrank_b", 0]
    with pytest.raises(FormatError, match=r"w: shape .*expected \(4, 32\)"):
        shard_of(torch.zeros(shape[::-1]) if shape != (32, 4) else torch.zeros(4, 16), slot, 0, 2, "w")


def test_rank_above_the_matrix_is_refused():
    with pytest.raises(FormatError, match="rank 17"):
        slots_of([part_of([0], group(["w"], rank=17))], LayerSizes(whole([32]), (16, 16), "column", 1, "layer"))


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 1)])
def test_pairs_of_each_head_become_halves(shape):
    """Two heads of two pairs: a scale a row, rows of a factor, a scale's column."""
    rows = torch.arange(8).view(8, *(1 for _ in shape[1:])).expand(shape)
    assert torch.equal(in_halves(rows.contiguous(), 2), rows[[0, 2, 1, 3, 4, 6, 5, 7]])
