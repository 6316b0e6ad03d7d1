"""The driver of the real model's table, on a small random Llama: cells, and models that are kept."""

import json
from functools import partial

import pytest
from transformers import LlamaForCausalLM

from benchmarks import records
from benchmarks.cells import folder_of, method_of, removal_of
from benchmarks.quality import knobs, real, real_setting
from fermisvd import load_model
from fermisvd_convert.evaluate import evaluate
from tests.support import DEMO_MODEL


def test_names_of_cells():
    assert (method_of("default | 0.2"), removal_of("default | 0.2")) == ("default", 0.2)
    assert (method_of("dense"), removal_of("dense")) == ("dense", None)
    assert folder_of("svd, uniform, separate (SVD-LLM's rule) | 0.2") == "svd-uniform-separate-svd-llm-s-rule-0.2"
    keys = [*real.ONCE, *(f"{method} | {remove}" for method in real.BY_REMOVAL for remove in real.REMOVALS)]
    assert len({folder_of(key) for key in keys}) == len(keys)


@pytest.mark.long
def test_models_are_kept_and_are_those_of_the_cells(tmp_path, monkeypatch, demo_text):
    """Each folder, loaded again, has its cell's perplexity; a second run measures nothing, and one without the folder
    does."""
    results, keep = tmp_path / "results", tmp_path / "kept"
    results.mkdir()
    monkeypatch.setattr(records, "RESULTS", results)
    for module in (real, real_setting):
        monkeypatch.setattr(module, "CALIBRATION", (demo_text["calibration"],))
    monkeypatch.setattr(real_setting, "EVALUATION", {"code": (demo_text["validation"], 2)})
    options = {"heal_steps": 0, "steps": 2, "groups": "separate"}
    monkeypatch.setitem(real.BY_REMOVAL, "default", partial(real.converted, options=options))
    setting = real_setting.Setting(DEMO_MODEL, tmp_path, samples=16, length=64, windows=None)
    methods = ["dense", "int8, rounded to nearest", "default", "width pruning, MLP"]
    real.measure(setting, methods, [0.2], keep=keep)
    cells = json.loads((results / "real-stdlib-2m.json").read_text())["cells"]
    assert list(cells) == [*methods[:2], *(f"{method} | 0.2" for method in methods[2:])]
    for key, cell in cells.items():
        model = load_model(keep / folder_of(key))
        found = evaluate(model, setting.evaluation["code"].windows)
        assert found.perplexity == pytest.approx(cell["code"]["perplexity"], rel=1e-5), key
    stored = LlamaForCausalLM.from_pretrained(keep / "width-pruning-mlp-0.2", dtype="auto")
    assert stored.dtype == setting.stored and stored.config.intermediate_size < setting.dense.config.intermediate_size

    def forbidden(*_, **__) -> real.Made:
        raise AssertionError("measured again")

    monkeypatch.setitem(real.ONCE, "dense", forbidden)
    real.measure(setting, ["dense"], [], keep=keep)
    with pytest.raises(AssertionError, match="measured again"):
        real.measure(setting, ["dense"], [], keep=tmp_path / "empty")


@pytest.mark.long
def test_a_knob_is_turned_by_itself(tmp_path, monkeypatch, demo_text):
    """The cell of one setting is the conversion with that option, by `evaluate`."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(records, "RESULTS", results)
    for module in (real, real_setting):
        monkeypatch.setattr(module, "CALIBRATION", (demo_text["calibration"],))
    monkeypatch.setattr(real_setting, "EVALUATION", {"code": (demo_text["validation"], 2)})
    quick = {"heal_steps": 0, "refit": False, "ranks": "uniform", "groups": "joint"}
    monkeypatch.setattr(knobs, "ALL", {"as it is": quick, "ranks in steps of 32": quick | {"align": 32}})
    setting = real_setting.Setting(DEMO_MODEL, tmp_path, samples=16, length=64, windows=None)
    knobs.measure(setting, [0.3], list(knobs.ALL))
    cells = json.loads((results / "knobs-stdlib-2m.json").read_text())["cells"]
    assert list(cells) == ["as it is | 0.3", "ranks in steps of 32 | 0.3"]
    plain, stepped = cells.values()
    assert plain["code"]["perplexity"] != stepped["code"]["perplexity"]
    found = evaluate(load_model(tmp_path / "out"), setting.evaluation["code"].windows)
    assert found.perplexity == pytest.approx(stepped["code"]["perplexity"], rel=1e-5)
    ranks = [group["rank"] for group in json.loads((tmp_path / "out" / "fermisvd.json").read_text())["groups"]]
    assert all(rank % 32 == 0 for rank in ranks)
    monkeypatch.setattr(knobs, "converted", lambda *_: pytest.fail("measured again"))
    knobs.measure(setting, [0.3], list(knobs.ALL))
