import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fermisvd.errors import FormatError
from fermisvd.format import CheckpointConfig, Group, expected_tensors, parse_config, read_config, validate_checkpoint
from fermisvd.pivga import fix_gauge
from tests.support.faults import split_in_two

COLUMNS = Group(members=("l.q", "l.k"), form="pivga", side="columns", rank=5)
ROWS = Group(members=("l.o",), form="pivga", side="rows", rank=4)
SVD = Group(members=("l.g", "l.u"), form="svd", rank=6)


@pytest.fixture
def checkpoint(tmp_path):
    """A small valid folder with every kind of group; the tests break one thing each."""
    columns = fix_gauge(torch.randn(20, 5), torch.randn(5, 16), "columns", torch.float32)
    rows = fix_gauge(torch.randn(16, 4), torch.randn(4, 12), "rows", torch.float32)
    tensors = {
        "l.q.skeleton": columns.skeleton[:12].contiguous(),
        "l.k.skeleton": columns.skeleton[12:].contiguous(),
        "l.q.interpolation": columns.interpolation,
        "l.q.permutation": columns.permutation,
        "l.o.skeleton": rows.skeleton,
        "l.o.interpolation": rows.interpolation,
        "l.o.permutation": rows.permutation,
        "l.g.lowrank_b": torch.randn(6, 16),
        "l.g.lowrank_a": torch.randn(18, 6),
        "l.u.lowrank_a": torch.randn(18, 6),
        "norm.weight": torch.ones(16),
    }
    entry = CheckpointConfig(groups=(COLUMNS, ROWS, SVD), provenance={"dense_tensors": ["norm.weight"]})
    write(tmp_path, entry.model_dump(mode="json", exclude_none=True), tensors)
    return tmp_path


def write(folder, entry, tensors):
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": entry}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, **changes):
    """Replace tensors; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip(checkpoint):
    config = validate_checkpoint(checkpoint)
    assert config.groups == (COLUMNS, ROWS, SVD)
    assert config.group_of()["l.k"] is config.groups[0]
    assert parse_config(config.model_dump(mode="json", exclude_none=True)) == config


def test_expected_tensors_count_the_budgets_parameters():
    from fermisvd.budget import factor_parameters

    for group, rows in ((COLUMNS, [12, 8]), (ROWS, [16]), (SVD, [18, 18])):
        shapes = expected_tensors(group, rows, 16)
        numbers = sum(torch.Size(s).numel() for name, s in shapes.items() if not name.endswith("permutation"))
        assert numbers == factor_parameters(group.rank, sum(rows), 16, group.form)


CONFIG_FAULTS = {
    "unknown version": (lambda e: e.update(format_version=3), "format_version is 3"),
    "no version": (lambda e: e.pop("format_version"), "format_version is None"),
    "extra field": (lambda e: e.update(extra=1), "extra"),
    "extra group field": (lambda e: e["groups"][0].update(extra=1), "groups.0.extra"),
    "unknown form": (lambda e: e["groups"][0].update(form="qr"), "groups.0.form"),
    "rank zero": (lambda e: e["groups"][0].update(rank=0), "groups.0.rank"),
    "rank as text": (lambda e: e["groups"][0].update(rank="five"), "groups.0.rank"),
    "no members": (lambda e: e["groups"][0].update(members=[]), "groups.0.members"),
    "member twice": (lambda e: e["groups"][0].update(members=["l.q", "l.q"]), "twice"),
    "overlap": (lambda e: e["groups"][1].update(members=["l.q"]), "member of two groups"),
    "side of svd": (lambda e: e["groups"][2].update(side="rows"), "side"),
    "pivga without side": (lambda e: e["groups"][0].pop("side"), "side"),
    "two members by rows": (lambda e: e["groups"][0].update(side="rows"), "rows side"),
    "wrong method": (lambda e: e.update(quant_method="awq"), "not a FermiSVD checkpoint"),
    "wrong rank": (lambda e: e["groups"][2].update(rank=7), "l.g.lowrank_b: shape"),
    "rank above the matrix": (lambda e: e["groups"][2].update(rank=17), "rank 17 is larger than the matrix"),
    "member without tensors": (lambda e: e["groups"][2].update(members=["l.g", "l.u", "l.x"]), "l.x.lowrank_a"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_faulty_config_is_refused(checkpoint, fault):
    change, message = CONFIG_FAULTS[fault]
    edit_config(checkpoint, change)
    with pytest.raises(FormatError, match=message.replace(".", r"\.")):
        validate_checkpoint(checkpoint)


permutation = torch.arange(16, dtype=torch.int32)
TENSOR_FAULTS = {
    "missing member": ({"l__k__skeleton": None}, "l.k.skeleton: missing"),
    "missing shared": ({"l__g__lowrank_b": None}, "l.g.lowrank_b: missing"),
    "missing permutation": ({"l__o__permutation": None}, "l.o.permutation: missing"),
    "missing dense": ({"norm__weight": None}, "norm.weight: missing"),
    "wrong shape": ({"l__q__interpolation": torch.randn(5, 12)}, "l.q.interpolation: shape"),
    "wrong dimensions": ({"l__g__lowrank_b": torch.randn(96)}, "l.g.lowrank_b: 2 dimensions"),
    "wrong type": ({"l__g__lowrank_b": torch.ones(6, 16, dtype=torch.int8)}, "l.g.lowrank_b: type I8"),
    "permutation of floats": ({"l__q__permutation": permutation.float()}, "l.q.permutation: type F32"),
    "index repeated": ({"l__q__permutation": permutation.clone().index_fill_(0, torch.tensor([3]), 4)}, "permutation"),
    "index out of range": ({"l__q__permutation": permutation + 1}, "permutation"),
    "index negative": ({"l__q__permutation": permutation - 1}, "permutation"),
    "NaN": ({"l__u__lowrank_a": torch.full((18, 6), float("nan"))}, "l.u.lowrank_a: holds NaN"),
    "infinity": ({"l__o__skeleton": torch.full((4, 12), float("inf"))}, "l.o.skeleton: holds NaN"),
    "NaN in a dense tensor": ({"norm__weight": torch.full((16,), float("nan"))}, "norm.weight: holds NaN"),
    "weight beside its factors": ({"l__q__weight": torch.randn(12, 16)}, "l.q.weight is there"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faulty_tensors_are_refused(checkpoint, fault):
    changes, message = TENSOR_FAULTS[fault]
    edit_tensors(checkpoint, **changes)
    with pytest.raises(FormatError, match=message.replace(".", r"\.")):
        validate_checkpoint(checkpoint)


def test_truncated_shard_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors: unreadable or truncated"):
        validate_checkpoint(checkpoint)


def test_pickled_file_is_refused(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"pickled files are never loaded, remove pytorch_model\.bin"):
        validate_checkpoint(checkpoint)


def test_sharded_checkpoint(checkpoint):
    split_in_two(checkpoint)
    assert len(validate_checkpoint(checkpoint).groups) == 3


def test_missing_shard_is_refused(checkpoint):
    split_in_two(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors: missing shard"):
        validate_checkpoint(checkpoint)


@pytest.mark.parametrize("change", ["moved", "unlisted", "invented", "outside", "no json"])
def test_index_that_disagrees_is_refused(checkpoint, change):
    weight_map = split_in_two(checkpoint)
    name = "l.q.skeleton"
    if change == "moved":
        weight_map[name] = "model-00001-of-00002.safetensors"
    elif change == "unlisted":
        del weight_map[name]
    elif change == "invented":
        weight_map["l.z.skeleton"] = weight_map[name]
    elif change == "outside":
        weight_map[name] = "../model-00001-of-00002.safetensors"
    text = "{" if change == "no json" else json.dumps({"weight_map": weight_map})
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"index\.json"):
        validate_checkpoint(checkpoint)


def test_no_config(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json"):
        read_config(tmp_path)
