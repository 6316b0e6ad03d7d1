import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import AutoModelForCausalLM

from fermisvd_convert.card import name_repository, write_card
from fermisvd_convert.convert import convert
from fermisvd_convert.record import Record, read_record
from fermisvd_convert.tables import print_groups
from fermisvd_convert.text import recorded_names

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    (folder / "a.txt").write_text("def f(x):\n    return x\n\n" * 400)
    base = shutil.copytree(tiny_llama, folder / "base-model")
    front = (
        "license: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage:\n- en\ntags:\n- llama\nbase_model: x/y"
    )
    (base / "README.md").write_text(f"---\n{front}\n---\nA base model.")
    settings = {"samples": 8, "sequence_length": 32, "steps": 4, "heal_steps": 2}
    convert(str(base), folder / "out", 0.3, calibration=[str(folder / "a.txt")], **settings)
    return folder / "out"


@pytest.fixture
def record(converted):
    return read_record(converted)


def card_of(record: Record, folder: Path, base: Path) -> ModelCard:
    write_card(record, folder, base)
    return ModelCard.load(folder / "README.md")


def test_card_of_a_conversion(converted, record):
    card = ModelCard.load(converted / "README.md")  # huggingface_hub's own reading
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert set(data["tags"]) == {"fermisvd", "low-rank", "compression"}
    assert {key: data[key] for key in data if key.startswith("licen")} == {
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
    }
    assert data["language"] == ["en"]
    assert "base_model" not in data and "datasets" not in data  # a folder and a file: no one else has them
    text = card.text
    assert text.strip().startswith("# base-model, 30.")
    for said in (
        f"{record.perplexity.before:.4f}",
        f"{record.perplexity.after:.4f}",
        f"{record.totals.removed:.1%}",
        "FermiGrad ranks",
        "pivga form",
        "vllm serve .",
        "(ranks.png)",
    ):
        assert said in text
    assert (converted / "ranks.png").read_bytes().startswith(PNG)
    assert str(converted.parent) not in (converted / "README.md").read_text()


def test_the_lines_on_loading_run_as_they_stand(converted, monkeypatch):
    text = (converted / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(converted)
    found: dict = {}
    exec(code, found)
    assert isinstance(found["model"], type(AutoModelForCausalLM.from_pretrained(converted)))
    assert found["tokenizer"]("def f(x):")["input_ids"]


def test_hub_names_are_metadata(record, tmp_path):
    base = tmp_path / "models--lab--base" / "snapshots" / "0123abc"
    base.mkdir(parents=True)
    record.model, record.revision = "lab/base", "0123abc"
    record.settings["calibration"] = ["Salesforce/wikitext:wikitext-2-raw-v1@3", "a.txt@1", "b.jsonl"]
    card = card_of(record, tmp_path, base)
    data = card.data.to_dict()
    assert data["base_model"] == "lab/base"
    assert data["datasets"] == ["Salesforce/wikitext"]
    assert "license" not in data
    assert "[lab/base](https://huggingface.co/lab/base) (revision `0123abc`)" in card.text


def test_base_card_that_cannot_be_read_is_said(record, tmp_path, caplog):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert "license" not in card_of(record, tmp_path, base).data.to_dict()
    assert "base/README.md" in caplog.text and "no license" in caplog.text


def test_card_without_matplotlib_has_no_figure_and_that_is_said(record, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        card = card_of(record, tmp_path, tmp_path / "base")
    assert "ranks.png" not in card.text and [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "no ranks figure: matplotlib cannot be imported" in caplog.text and "fermisvd[report]" in caplog.text
    assert "vllm serve" in card.text


def test_layers_left_dense_are_in_the_card(record, tmp_path):
    record.left_dense = {f"model.layers.{i}.mlp.experts.gate_up_proj": 1000 for i in range(3)}
    record.left_dense |= {"model.layers.1.mixer.in_proj.weight": 70}
    record.why_dense = {"model.layers.1.mixer.in_proj.weight": "beside a recurrence"}
    text = card_of(record, tmp_path, tmp_path / "base").text
    assert "Left dense: model.layers.*.mlp.experts.gate_up_proj, 3 matrices, 3,000 parameters." in text
    assert "Left dense: model.layers.*.mixer.in_proj.weight, 1 matrices, 70 parameters (beside a recurrence)." in text


def test_name_repository_changes_the_commands_alone(converted, tmp_path):
    shutil.copyfile(converted / "README.md", tmp_path / "README.md")
    name_repository(tmp_path, "ann/x")
    before, after = ((folder / "README.md").read_text().splitlines() for folder in (converted, tmp_path))
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [
        "vllm serve ann/x",
        'model = AutoModelForCausalLM.from_pretrained("ann/x")',
        'tokenizer = AutoTokenizer.from_pretrained("ann/x")',
    ]


def test_calibration_names_tell_nothing_of_the_machine(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    given = [f"{tmp_path}/a.txt@3", str(tmp_path), "lab/set:config@2"]
    assert recorded_names(given) == ["a.txt@3", tmp_path.name, "lab/set:config@2"]


def test_a_model_that_is_only_rounded(tiny_llama, tmp_path):
    """Nothing is factorised: the card speaks of bits, and so does the table."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(300)))
    options: dict[str, Any] = {"samples": 8, "sequence_length": 32, "heal_steps": 0, "refit": False, "weights": "int8"}
    record = convert(tiny_llama, tmp_path / "out", bytes=0.4, calibration=[str(text)], **options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its linear layers in int8\n" in card and "rounded in int8 with error feedback" in card
    assert "SVD of its" not in card and "0.0%" not in card
    print_groups(record.groups, console := Console(record=True, width=200))
    assert console.export_text().count("int8") == len(record.groups)
