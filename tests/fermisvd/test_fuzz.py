"""Whatever stands in a checkpoint's config, index or headers: our own error, or a model that loads and is finite."""

import json
import re
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fermisvd.errors import FermiSVDError
from fermisvd.format import validate_before_serving
from fermisvd.hf import check_architecture, load_model
from tests.support.faults import INDEX, WEIGHTS, split_in_two

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def folder(family_checkpoints, tmp_path):
    return shutil.copytree(family_checkpoints("llama", "pivga")[1], tmp_path / "fuzzed")


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(draw, value) -> None:
    """Replaces, removes or doubles something somewhere inside."""
    path = draw(st.sampled_from(list(places(value))))
    for key in path[:-1]:
        value = value[key]
    action = draw(st.sampled_from(["replace", "remove", "double"]))
    if action == "remove":
        del value[path[-1]]
    elif action == "double" and isinstance(value, list):
        value.append(value[path[-1]])
    else:
        value[path[-1]] = draw(json_values)


def refused_or_served(folder) -> None:
    """The checks before serving, as vLLM runs them; what passes must load in full and compute."""
    try:
        validate_before_serving(folder)
        check_architecture(folder)
    except FermiSVDError as error:
        assert re.search(r"copy|convert|install|remove|correct", str(error)), f"no remedy: {error}"
        assert re.search(r"\.json|\.safetensors|layers\.|group |embed|norm|head|fuzzed", str(error)), (
            f"no place: {error}"
        )
        return
    with torch.no_grad():
        logits = load_model(folder)(input_ids=torch.arange(5, 25)[None]).logits
    assert logits.isfinite().all()


@FUZZ
@given(st.data())
def test_quantization_config(folder, data):
    path = folder / "config.json"
    original = path.read_text()
    try:
        config = json.loads(original)
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(data.draw, config["quantization_config"])
        path.write_text(json.dumps(config))
        refused_or_served(folder)
    finally:
        path.write_text(original)


@FUZZ
@given(st.data())
def test_safetensors_header(folder, data):
    """Headers that are JSON still: names, types, shapes and offsets are anything."""
    path = folder / WEIGHTS
    original = path.read_bytes()
    size = struct.unpack("<Q", original[:8])[0]
    try:
        header = json.loads(original[8 : 8 + size])
        mutate(data.draw, header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + original[8 + size :])
        refused_or_served(folder)
    finally:
        path.write_bytes(original)


@FUZZ
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4), st.floats(0, 1)
)
def test_bytes_of_the_header(folder, changes, kept):
    """Bytes flipped anywhere in the header, and the file cut anywhere."""
    path = folder / WEIGHTS
    original = path.read_bytes()
    size = 8 + struct.unpack("<Q", original[:8])[0]
    spoilt = bytearray(original)
    for place, byte in changes:
        spoilt[int(place * size)] = byte
    try:
        path.write_bytes(spoilt[: int(kept * len(spoilt))])
        refused_or_served(folder)
    finally:
        path.write_bytes(original)


@FUZZ
@given(st.data())
def test_index(folder, data):
    weight_map = split_in_two(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    try:
        mutate(data.draw, index)
        (folder / INDEX).write_text(json.dumps(index))
        refused_or_served(folder)
    finally:
        join(folder)


def join(folder) -> None:
    """Undoes split_in_two."""
    from safetensors.torch import load_file, save_file

    shards = sorted(folder.glob("model-*.safetensors"))
    save_file({name: t for shard in shards for name, t in load_file(shard).items()}, folder / WEIGHTS, {"format": "pt"})
    for path in [*shards, folder / INDEX]:
        path.unlink()
