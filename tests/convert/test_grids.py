"""`fermisvd convert` and `heal` on grids, through files."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fermisvd import compress, load_model, validate_checkpoint
from fermisvd.files import read_headers
from fermisvd_convert.convert import convert
from fermisvd_convert.heal import heal_checkpoint
from fermisvd_convert.inspect import inspect_checkpoint
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import calibration_text

pytestmark = pytest.mark.long
LENGTH, SAMPLES, BATCH = 32, 16, 4
CUT = {"samples": SAMPLES, "gradient_samples": SAMPLES, "sequence_length": LENGTH, "heal_samples": SAMPLES}
QUICK = {"steps": 4, "heal_steps": 0, "refit": False, "groups": "separate", "batch_size": BATCH, "compute": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    return path


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_the_converter_gives_the_same(tiny_llama, text, tmp_path, form):
    """As the method in memory, healed through the grid. In int8: in int4 sums in another order move whole outputs of a
    random model, since a number that falls the other way is a large step."""
    windows = calibration_text(load_tokenizer(tiny_llama), [str(text)], SAMPLES, LENGTH).windows
    options = {**QUICK, "heal_steps": 3, "ranks": "uniform", "form": form, "weights": "int8", "align": 1}
    del options["steps"]
    small = compress(AutoModelForCausalLM.from_pretrained(tiny_llama), windows, 0.3, **options)
    convert(tiny_llama, tmp_path / "out", 0.3, calibration=[str(text)], **options, **CUT)
    small.save_pretrained(tmp_path / "saved")
    assert validate_checkpoint(tmp_path / "saved").groups == validate_checkpoint(tmp_path / "out").groups
    with torch.no_grad():
        ours, theirs = small(windows).logits, load_model(tmp_path / "out")(windows).logits
    assert (ours - theirs).norm() < 0.05 * ours.norm()


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_a_budget_in_bytes(tiny_llama, text, tmp_path, weights):
    """What is written of the groups is no more than asked, and no other budget's ranks of the work directory are
    taken: reference, a conversion with a work directory of its own."""
    kept = {"auto": 0.6, "int8": 0.2, "int4": 0.15}[weights]
    options: dict[str, Any] = {**QUICK, "weights": weights, "align": 1, "calibration": [str(text)], **CUT}
    for other in {"auto", "int8", "int4"} - {weights}:
        others = options | {"weights": other, "bytes": kept if other != "auto" else 0.6}
        convert(tiny_llama, tmp_path / other, **others)
    record = convert(tiny_llama, tmp_path / "out", bytes=kept, **options)
    alone = convert(tiny_llama, tmp_path / "alone", bytes=kept, work=tmp_path / "work", **options)
    assert [group.rank for group in record.groups] == [group.rank for group in alone.groups]
    members = {name for group in record.groups for name in group.members}
    headers = read_headers(tmp_path / "out").items()
    size = sum(info.bytes for name, info in headers if name.rpartition(".")[0] in members and not name.endswith("bias"))
    whole = sum(group.parameters_before for group in record.groups) * 4
    assert kept - 0.02 < size / whole <= kept
    assert record.settings["bytes"] == kept and record.settings["remove"] is None


def test_another_type_reuses_the_ranks(tiny_llama, text, tmp_path):
    options = {**QUICK, "align": 4, "calibration": [str(text)], **CUT}
    first = convert(tiny_llama, tmp_path / "auto", 0.3, **options)
    second = convert(tiny_llama, tmp_path / "int8", 0.3, weights="int8", **options)
    assert [group.rank for group in first.groups] == [group.rank for group in second.groups]
    ranks = list((tmp_path / ".fermisvd").rglob("ranks-*.json"))
    assert len([path for path in ranks if "progress" not in path.name]) == 1
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]["format_version"] == 2


def test_bits_are_weighed_once(tiny_llama, text, tmp_path):
    """Another --bytes finds what each factor loses by fewer bits, and spends more; what is written is on the budget."""
    options = {**QUICK, "align": 4, "weights": "mixed", "calibration": [str(text)], **CUT}
    sizes, fine = [], []
    for kept in (0.15, 0.18):
        record = convert(tiny_llama, tmp_path / str(kept), 0.3, bytes=kept, **options)
        groups = validate_checkpoint(tmp_path / str(kept)).groups
        members = {name for group in groups for name in group.members}
        headers = read_headers(tmp_path / str(kept)).items()
        own = [info for name, info in headers if name.rpartition(".")[0] in members and not name.endswith("bias")]
        sizes.append(sum(info.bytes for info in own))
        assert sizes[-1] <= kept * 4 * sum(group.parameters_before for group in record.groups)
        fine.append({(each["group"], factor) for each in record.choices["bits"] for factor in each["fine"]})
        stored = {
            (group.name, factor) for group in groups for factor, name in (group.schemes or {}).items() if name == "int8"
        }
        assert stored == fine[-1]
        assert sum(each["kl"] for each in record.choices["bits"]) < sum(
            each["kl_coarse"] for each in record.choices["bits"]
        )
        assert inspect_checkpoint(tmp_path / str(kept)).as_dict()["groups"][0]["schemes"] == groups[0].schemes
    assert sizes[0] < sizes[1] and len(fine[0]) < len(fine[1])
    assert len(list((tmp_path / ".fermisvd").rglob("bits-*"))) == 1


def test_heal_and_inspect(tiny_llama, text, tmp_path):
    """A finished checkpoint is healed through its grid, and stays on it."""
    convert(tiny_llama, tmp_path / "out", 0.3, weights="int8", calibration=[str(text)], **QUICK, **CUT)
    record = heal_checkpoint(
        tmp_path / "out",
        tmp_path / "healed",
        teacher=str(tiny_llama),
        text=[str(text)],
        steps=4,
        samples=SAMPLES,
        sequence_length=LENGTH,
        learning_rate=2.0,
    )
    assert record["steps"] == 4
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "healed"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert inspect_checkpoint(tmp_path / "healed").format_version == 2
