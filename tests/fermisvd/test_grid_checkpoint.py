"""Checkpoints on grids: saved, loaded, refused where something is off. Reference: the factors' product in float64."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fermisvd import compress, load_model, validate_checkpoint
from fermisvd.errors import FormatError
from fermisvd.format import validate_before_serving
from fermisvd.losses import StudentLoss
from fermisvd.schemes import SCHEMES
from fermisvd.teacher import teach
from fermisvd_convert.loading import load_tokenizer
from tests.fermisvd.test_fuzz import FUZZ, mutate, refused_or_served
from tests.support.faults import WEIGHTS, edit_config, edit_groups, edit_tensors

WINDOWS = torch.arange(8 * 24).view(8, 24)
SETTINGS = {"ranks": "uniform", "groups": "separate", "heal_steps": 0, "refit": False, "batch_size": 4}


@pytest.fixture(scope="module")
def checkpoints(tiny_llama, tmp_path_factory):
    """(form, weights) -> a folder with 10 % removed, where some layers are dense, on their grid."""
    made: dict[tuple[str, str], Path] = {}

    def make(form, weights):
        if (form, weights) not in made:
            dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
            small = compress(dense, WINDOWS, 0.02 if form == "svd" else 0.1, form=form, weights=weights, **SETTINGS)
            made[form, weights] = tmp_path_factory.mktemp("grids") / f"{form}-{weights}"
            small.save_pretrained(made[form, weights])
        return made[form, weights]

    return make


@pytest.fixture
def folder(checkpoints, tmp_path):
    return lambda form, weights: shutil.copytree(checkpoints(form, weights), tmp_path / "copy")


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_loads_as_it_was_saved(checkpoints, tmp_path, form, weights):
    """In float32 and in bfloat16; saved again it is the same file."""
    path = checkpoints(form, weights)
    config = validate_checkpoint(path)
    assert config.format_version == 2 and all(group.schemes for group in config.groups)
    wide, narrow = load_model(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        exact, near = wide(WINDOWS).logits, narrow(WINDOWS).logits.float()
    assert (near - exact).norm() < 0.1 * exact.norm()
    codes = {torch.int8, torch.float8_e4m3fn, torch.int32}
    assert {p.dtype for p in narrow.parameters()} & codes == {p.dtype for p in wide.parameters()} & codes != set()
    wide.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["schemes"]
    before, after = load_file(path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS).logits


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_int8_is_near_the_factors(tiny_llama, form):
    """The same ranks in the model's own type."""
    dense, options = AutoModelForCausalLM.from_pretrained(tiny_llama), SETTINGS | {"form": form, "align": 1}
    exact, small = (logits(compress(dense, WINDOWS, 0.1, weights=each, **options)) for each in ("auto", "int8"))
    assert (exact - small).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("weights", "kept", "tolerance"), [("int8", 0.4, 0.05), ("fp8", 0.4, 0.2), ("int4", 0.3, 0.5)])
def test_a_budget_that_leaves_all_dense(tiny_llama, tmp_path, weights, kept, tolerance):
    """In bytes, of float32: every layer's own matrix on the grid, with the biases that some have."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    small = compress(dense, WINDOWS, bytes=kept, weights=weights, **SETTINGS)
    small.save_pretrained(tmp_path)
    assert {group.form for group in validate_checkpoint(tmp_path).groups} == {"dense"}
    expected = logits(dense)
    assert (logits(load_model(tmp_path)) - expected).norm() < tolerance * expected.norm()


@pytest.mark.long
def test_healed_through_the_grid(demo_model, demo_text):
    """On the demo model, which has learnt something: KL to the dense model on windows that were not trained on."""
    ids = load_tokenizer(demo_model)(demo_text["calibration"].read_text()[:40_000], return_tensors="pt").input_ids[0]
    windows = ids[: 100 * 64].view(100, 64)
    dense = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    taught = teach(dense, windows[80:], 4)
    options = SETTINGS | {"weights": "int8", "batch_size": 8}
    plain, small = (compress(dense, windows[:80], 0.3, **(options | {"heal_steps": steps})) for steps in (0, 30))
    assert StudentLoss(small, taught, 4)() < 0.97 * StudentLoss(plain, taught, 4)()
    assert {p.dtype for p in small.parameters()} == {torch.float32, torch.int8}


def _first(tensors: dict, end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end) and "layers.1" in name)


def _changed(end, change):
    return lambda folder: edit_tensors(folder, lambda t: t.update({(n := _first(t, end)): change(t[n])}))


def _set(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[2] = value
        return tensor

    return change


FAULTS = {  # weights, what is broken, words of the message
    "scale missing": ("int8", lambda f: edit_tensors(f, lambda t: t.pop(_first(t, "_scale"))), ("_scale", "missing")),
    "scale zero": ("int8", _changed("_scale", _set(0.0)), ("_scale", "zero or negative")),
    "scale negative": ("int4", _changed("_scale", _set(-0.1)), ("_scale", "zero or negative")),
    "scale NaN": ("fp8", _changed("_scale", _set(float("nan"))), ("_scale", "NaN")),
    "scale of another shape": ("int8", _changed("_scale", lambda t: t[:-1]), ("_scale", "shape")),
    "scales too few": ("int4", _changed("_scale", lambda t: t[:, :-1]), ("_scale", "shape")),
    "integer scale": ("int8", _changed("_scale", lambda t: t.int()), ("_scale", "type I32")),
    "numbers of another type": ("int8", _changed("skeleton", lambda t: t.float()), ("skeleton", "F32", "I8")),
    "fp8 NaN": ("fp8", _changed("skeleton", lambda t: _set(float("nan"))(t.float()).to(t)), ("skeleton", "NaN")),
    "packed width": ("int4", _changed("_packed", lambda t: t[:, :-1]), ("_packed", "shape")),
    "packed type": ("int4", _changed("_packed", lambda t: t.long()), ("_packed", "I64", "I32")),
    "shape that is none": ("int4", _changed("_shape", lambda t: t - 10_000), ("_shape",)),
    "shape of another matrix": ("int4", _changed("_shape", lambda t: t + 1), ("_shape",)),
    "unknown scheme": ("int8", lambda f: edit_groups(f, lambda g: g[0]["schemes"].update(skeleton="int7")), ("int7",)),
    "scheme of no factor": ("int8", lambda f: edit_groups(f, lambda g: g[0]["schemes"].update(a="int8")), ("schemes",)),
    "another description": (
        "int8",
        lambda f: edit_config(f, lambda c: c["quantization_config"]["schemes"]["int8"].update(format="x")),
        ("schemes.int8",),
    ),
    "schemes in version 1": (
        "int8",
        lambda f: edit_config(f, lambda c: c["quantization_config"].update(format_version=1)),
        ("format_version 2",),
    ),
    "version 2 without schemes": (
        "int8",
        lambda f: edit_config(f, lambda c: c["quantization_config"].update(groups=[], schemes={})),
        ("no group has any",),
    ),
    "numbers twice": (
        "int8",
        lambda f: edit_tensors(
            f, lambda t: t.update({f"{_first(t, 'interpolation')}_packed": torch.zeros(2, 2, dtype=torch.int32)})
        ),
        ("interpolation_packed", "no such tensor"),
    ),
    "no description": (
        "int8",
        lambda f: edit_config(f, lambda c: c["quantization_config"].pop("schemes")),
        ("schemes describe",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(folder, fault):
    """By all checks, and but for the numbers themselves by those before serving."""
    weights, spoil, words = FAULTS[fault]
    path = folder("pivga", weights)
    spoil(path)
    with pytest.raises(FormatError) as refused:
        validate_checkpoint(path)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    if fault != "fp8 NaN":  # a server sees that as it loads the factor
        with pytest.raises(FormatError):
            validate_before_serving(path)
    with pytest.raises(FormatError):
        load_model(path)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@FUZZ
@given(st.data())
def test_any_config(checkpoints, weights, data):
    path = checkpoints("pivga", weights) / "config.json"
    original = path.read_text()
    try:
        config = json.loads(original)
        for _ in range(data.draw(st.integers(1, 2))):
            mutate(data.draw, config["quantization_config"])
        path.write_text(json.dumps(config))
        refused_or_served(path.parent)
    finally:
        path.write_text(original)


def test_every_scheme_is_reached(checkpoints):
    found = set()
    for weights in ("int8", "fp8", "int4"):
        for group in validate_checkpoint(checkpoints("pivga", weights)).groups:
            found |= set((group.schemes or {}).values())
    assert found >= {"int8", "fp8", "int4_group32"} and found <= set(SCHEMES)
