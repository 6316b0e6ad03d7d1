"""Wrappers of a language model: it is compressed, what is beside it stays, and files keep their names."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fermisvd.calibration import calibration_grams
from fermisvd.compress import compress
from fermisvd.format import read_config
from fermisvd.groups import find_groups, left_dense
from fermisvd.hf import load_model
from fermisvd.running.streaming import stream_model
from fermisvd_convert.convert import convert
from fermisvd_convert.heal import heal_checkpoint
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.preflight import prepare
from fermisvd_convert.stages.calibration import calibrate
from tests.support import multimodal
from tests.support.families import compress as converted
from tests.support.multimodal import MULTIMODAL

LAYERS = {  # of the language model, as files have them
    "gemma3_mm": "language_model.model.layers",
    "qwen2_5_vl": "model.layers",
    "qwen3_vl": "model.language_model.layers",
    "qwen3_5_mm": "model.language_model.layers",
    "gemma4": "model.language_model.layers",
    "mistral3": "language_model.model.layers",
    "llama4": "language_model.model.layers",
}
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, demo_text):
    folder = tmp_path_factory.mktemp("multimodal")

    @cache
    def make(family: str, form: str) -> tuple[Path, Path]:
        source = folder / family
        if not source.exists():
            multimodal.save(family, source)
            (source / PROCESSOR).write_text(json.dumps({"size": 32}))
        return source, converted(source, form, demo_text["calibration"], folder / "work" / family)

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", ["pivga", "svd"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_reloaded_logits_equal_the_dense_product(family, form, checkpoints, tmp_path):
    source, out = checkpoints(family, form)
    twin = load_model(multimodal.dense_twin(source, out, tmp_path / "twin"), attn_implementation="eager")
    torch.testing.assert_close(logits(load_model(out, attn_implementation="eager")), logits(twin), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_all_else_is_copied_bit_for_bit_under_its_name(family, checkpoints):
    source, out = checkpoints(family, "pivga")
    before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    groups = read_config(out).group_of()
    assert groups and all(member.startswith(f"{LAYERS[family]}.") for member in groups)
    compressed = {f"{member}.weight" for member in groups}
    assert compressed < before.keys() and before.keys() & after.keys() == before.keys() - compressed
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - compressed)
    assert all(name.rpartition(".")[0] in groups for name in after.keys() - before.keys())
    for name in (PROCESSOR, "tokenizer.json"):
        assert (source / name).read_bytes() == (out / name).read_bytes()


def test_no_layer_of_a_tower_is_in_a_group(checkpoints):
    model = load_model(checkpoints("llama4", "svd")[0])
    groups = find_groups(model)
    assert {group.name.partition(".layers.")[0] for group in groups} == {"language_model.model"}
    # blocks with experts and without in turn: a router, stacked experts, and an expert that all tokens pass
    kinds = [" ".join(name.rpartition(".")[2] for name in group.members) for group in groups]
    attention, mlp = ["q_proj k_proj v_proj", "o_proj"], ["gate_proj up_proj", "down_proj"]
    assert kinds == [*attention, *mlp] * 2
    assert all("vision" not in name for name in left_dense(model, groups))


@pytest.mark.parametrize("family", ["gemma3_mm", "qwen2_5_vl"])
def test_saved_again_it_is_the_same(family, checkpoints, tmp_path):
    _, out = checkpoints(family, "pivga")
    model = load_model(out)
    model.save_pretrained(tmp_path)
    before, after = load_file(out / WEIGHTS), load_file(tmp_path / WEIGHTS)
    factors = {name for name in before if name.rpartition(".")[0] in read_config(out).group_of()}
    assert factors and all(torch.equal(before[name], after[name]) for name in factors)
    assert read_config(tmp_path).groups == read_config(out).groups
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["gemma3_mm", "qwen2_5_vl"])
def test_compressed_in_memory_it_is_saved_by_the_names_of_files(family, checkpoints, tmp_path):
    model = load_model(checkpoints(family, "pivga")[0])
    windows = torch.randint(2048, (8, 32))
    student = compress(model, windows, remove=0.3, ranks="uniform", groups="joint", heal_steps=0)
    student.save_pretrained(tmp_path)
    assert all(member.startswith(f"{LAYERS[family]}.") for member in read_config(tmp_path).group_of())
    torch.testing.assert_close(logits(load_model(tmp_path)), logits(student))


@pytest.mark.parametrize("family", ["gemma3_mm", "gemma4", "llama4"])
def test_streamed_it_is_the_same(family, checkpoints):
    source, out = checkpoints(family, "svd")
    streamed = [folder for folder in (source, out) if family != "llama4" or folder == out]
    for folder in streamed:
        torch.testing.assert_close(logits(stream_model(folder, "cpu")), logits(load_model(folder)))


def test_a_model_that_is_no_row_of_blocks_is_calibrated_whole(checkpoints, demo_text, tmp_path):
    """Gemma 4's blocks are told of the tokens themselves. Reference: the model in memory."""
    source, _ = checkpoints("gemma4", "svd")
    given: dict = dict(samples=4, gradient_samples=4, sequence_length=32, ranks="uniform", ask_vllm=False, remove=0.3)
    text = [str(demo_text["calibration"])]
    options = ConvertOptions.named(calibration=text, work=tmp_path / "work", **given)
    conversion = prepare(str(source), tmp_path / "out", options)
    model = load_model(source)
    groups = find_groups(model)
    statistics = calibrate(conversion, groups)
    members = [name for group in groups for name in group.members]
    batches = conversion.windows.split(conversion.passes.calibrated)
    grams, outputs = calibration_grams(model, [group.source for group in groups], members, batches)
    for name, gram in grams.items():
        torch.testing.assert_close(statistics.gram(name, CPU), gram.float(), rtol=1e-4, atol=1e-4 * gram.max().item())
    for name, output in outputs.items():
        found, scale = statistics.output(name, CPU).matrix, output.matrix.diag().max().item()
        assert scale > 0
        torch.testing.assert_close(found, output.matrix, rtol=1e-3, atol=1e-4 * scale)


def test_the_language_model_alone_is_loaded_from_a_wrapper(checkpoints):
    """As transformers does of the dense one: what belongs to the tower is passed over."""
    _, out = checkpoints("llama4", "svd")
    alone = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(alone).__name__ == "Llama4ForCausalLM"
    torch.testing.assert_close(logits(alone), logits(load_model(out)))


def test_the_default_method_and_healing_afterwards(checkpoints, demo_text, tmp_path):
    source, _ = checkpoints("gemma3_mm", "svd")
    text = [str(demo_text["calibration"])]
    small: dict = dict(samples=64, gradient_samples=16, sequence_length=32, steps=4, heal_learning_rate=0.1)
    small |= dict(calibration=text, dtype="float32", work=tmp_path / "work", refit=False, rescale=False)
    convert(str(source), tmp_path / "unhealed", 0.3, heal_steps=0, **small)
    record = convert(str(source), tmp_path / "out", 0.3, heal_steps=16, **small)
    assert record.healing is not None and len(record.trace.steps) == 4
    unhealed, written = (load_file(tmp_path / name / WEIGHTS) for name in ("unhealed", "out"))
    assert unhealed.keys() == written.keys()
    assert any(not torch.equal(unhealed[name], written[name]) for name in written), "healing reached the files"
    assert "AutoModelForMultimodalLM" in (tmp_path / "out" / "README.md").read_text()
    given = dict(teacher=str(source), text=text, steps=16, samples=64, sequence_length=32, learning_rate=0.1)
    heal_checkpoint(tmp_path / "out", tmp_path / "healed", **given)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "healed"))
    members = read_config(tmp_path / "out").group_of()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and {name.rpartition(".")[0] for name in changed} <= set(members)
    assert not torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "healed")))
