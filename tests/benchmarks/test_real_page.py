"""The real model's tables and figure, from a record that is made here with plain numbers, and from none."""

import math

import pytest

from benchmarks.cells import folder_of
from benchmarks.results_page import __main__ as page
from benchmarks.results_page import knobs, real_served
from benchmarks.results_page import real as shown


def cell(parameters: float, wikitext2: float, c4: float, kl: float = 0.0) -> dict:
    """parameters in millions, two bytes each beside 48 million of embeddings that stay."""
    figures = {"wikitext2": {"perplexity": wikitext2, "kl": kl}, "c4": {"perplexity": c4, "kl": 2 * kl}}
    return {"parameters": round(1e6 * parameters), "bytes": 2**20 * (48 + 2 * parameters), "seconds": 1234.5, **figures}


@pytest.fixture
def about() -> dict:
    """Perplexities so that logarithms are whole: dense e^3, the rule e^5 and e^7, the default e^3.5 and e^4."""
    cells = {
        "dense": cell(100, math.e**3, math.e**4),
        "int8, rounded to nearest": cell(100, 20.5, 55.0, 0.01),
        f"{shown.RULE} | 0.2": cell(80, math.e**5, math.e**6, 1.5),
        f"{shown.DEFAULT} | 0.2": cell(79.9, math.e**3.5, math.e**4.25, 0.25),
        f"{shown.RULE} | 0.4": cell(60, math.e**7, math.e**8, 3.0),
        f"{shown.DEFAULT} | 0.4": cell(60, math.e**4, math.e**5, 0.5),
        "depth pruning, healed | 0.2": cell(81, math.inf, 99.0, 0.75),
        "default, another way | 0.3": cell(70, 30.0, 60.0, 0.4),
    }
    return {"protocol": {"model": "smollm2", "evaluation": {"wikitext2": [], "c4": []}}, "cells": cells}


@pytest.fixture
def harness() -> dict:
    """All six tasks right by 40 %, but for one by 70 %, so 45 % in the mean; vLLM's dense row lacks LAMBADA."""
    six = {task: {"acc": 0.4, "acc_stderr": 0.02} for task in shown.TASKS} | {"piqa": {"acc": 0.7, "acc_stderr": 0.01}}
    five = {task: row for task, row in six.items() if task != "lambada_openai"}
    compressed = folder_of(f"{shown.DEFAULT} | 0.2")
    return {"rows": {"smollm2, hf": six, "smollm2, vllm": five, f"{compressed}, vllm": six, "other, hf": six}}


def rows_of(table: str) -> dict[str, list[str]]:
    """By first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_rows_of_a_fraction(about):
    rows = rows_of(shown.perplexity_table(about, 0.2))
    assert rows["20% removed"] == [
        *("parameters, M", "MiB", "made in, s"),
        *("WikiText-2", "KL", "of the rule's loss"),
        *("C4", "KL", "of the rule's loss"),
    ]
    assert rows[shown.DEFAULT] == ["79.9", "208", "1,234", "33.12", "0.2500", "0.250", "70.11", "0.5000", "0.125"]
    assert rows[shown.RULE][3:6] == ["148.41", "1.5000", "1.000"]
    assert rows["depth pruning, healed"][3] == "inf"
    assert rows["default without healing"] == [""] * 9  # not run
    assert set(shown.METHODS) <= rows.keys()


def test_rows_without_the_rule_or_unknown_are_shown(about):
    rows = rows_of(shown.perplexity_table(about, 0.3))
    assert rows["default, another way"] == ["70.0", "188", "1,234", "30.00", "0.4000", "", "60.00", "0.8000", ""]


def test_rows_of_denses_size(about):
    rows = rows_of(shown.perplexity_table(about, None))
    assert rows["dense"] == ["100.0", "248", "1,234", "20.09", "0.0000", "54.60", "0.0000"]
    assert rows["int8, rounded to nearest"][3:5] == ["20.50", "0.0100"] and rows["int4, rounded to nearest"] == [""] * 7


def test_every_cell_has_a_place(about):
    """Also each that benchmarks.quality.real can write, in the order of its own list."""
    tables_of = shown.perplexities(about)
    for removal in (None, 0.2, 0.3, 0.4):
        assert shown.perplexity_table(about, removal) in tables_of
    from benchmarks.quality import real, real_setting

    assert tuple(real.ONCE) == shown.ONCE and set(real.BY_REMOVAL) == set(shown.METHODS)
    assert set(real_setting.EVALUATION) == set(shown.TEXTS) and shown.LONGER == real.HEALED_LONGER
    assert shown.LARGE == real.HEALED_IN_LARGE_STEPS


def test_accuracies_by_model_and_engine(about, harness):
    table = shown.accuracy_table(harness, about["cells"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[:2] for row in lines] == [["dense", "hf"], ["dense", "vllm"], ["other", "hf"], ["default, 0.2", "vllm"]]
    assert lines[0][2:] == ["70.0 ± 1.0", *["40.0 ± 2.0"] * 5, "45.0"]
    assert lines[1][-2:] == ["", ""]  # no LAMBADA, so no mean
    assert shown.main_accuracies(harness, about["cells"]) == pytest.approx(
        {"dense": 0.45, "other": 0.45, "default | 0.2": 0.45}
    )


def test_knobs_are_compared_with_what_they_change():
    cells = {
        "healed for 64 steps | 0.3": cell(70, 30.0, 60.0, 0.3),  # its base comes later
        "as it is | 0.3": cell(70, 32.0, 61.0, 0.4),
        "steps 32 | 0.3": cell(70, 33.0, 62.0, 0.5),
        "healed | 0.3": cell(70, 29.0, 59.0, 0.25),
        "steps 32 | 0.2": cell(80, 25.0, 55.0, 0.1),
    }
    rows = rows_of(knobs.table(cells, ["wikitext2"], 0.3))
    assert rows["as it is"] == ["32.00", "0.4000", "", "1,234"]
    assert rows["steps 32"] == ["33.00", "0.5000", "+25.0%", "1,234"]
    assert rows["healed for 64 steps"] == ["30.00", "0.3000", "+20.0%", "1,234"]
    assert rows_of(knobs.table(cells, ["wikitext2"], 0.2))["steps 32"] == ["25.00", "0.1000", "", "1,234"]
    from benchmarks.quality.knobs import ALL, HEALING_KNOBS

    assert {knobs.base_of(name) for name in HEALING_KNOBS} == {"healed"}
    assert {knobs.base_of(name) for name in ALL if name not in HEALING_KNOBS} == {"as it is"}


def test_what_vllm_answers(monkeypatch):
    same = {"model": "smollm2", "answers": 2, "answers_of_likeliest_tokens": 2, "tokens": 8, "likeliest_tokens": 8}
    other = same | {"model": "small", "answers_of_likeliest_tokens": 1, "likeliest_tokens": 7}
    lengths = [("gsm8k", "a", 3.5), ("gsm8k", "b", 2.0), ("chat", "a", 2.5), ("chat", "b", 1.25)]
    drafts = [{"prompts": kind, "draft": draft, "acceptance_length": length} for kind, draft, length in lengths]
    rows = {
        real_served.PARITY: [same | {"largest_gap": 0.0}, other | {"largest_gap": 0.00012}],
        real_served.DRAFTS: drafts,
    }
    monkeypatch.setattr(real_served, "optional", lambda name: {"rows": rows[name]})
    monkeypatch.setattr(real_served, "recorded", lambda name: name)
    parity, drafted = rows_of(real_served.parity()), rows_of(real_served.drafts())
    assert parity["smollm2"] == ["2 of 2", "8 of 8", "0"] and parity["small"] == ["1 of 2", "7 of 8", "1.2e-04"]
    assert drafted["draft"] == ["gsm8k", "chat"] and drafted["a"] == ["3.50", "2.50"] and drafted["b"][1] == "1.25"


def test_readme(about, harness):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in shown.readme_table(about, harness).splitlines()[4:]
    ]
    assert rows[0] == ["dense", "", "248", "20.09", "45.0"]
    assert rows[1] == ["int8, rounded to nearest", "", "248", "20.50", ""]  # int4 was not run
    assert ["**default**", "20%", "208", "33.12", "45.0"] in rows and ["**default**", "40%", "168", "54.60", ""] in rows
    assert ["depth pruning", "20%", "210", "inf", ""] in rows and not any(row[0] == "width pruning" for row in rows)
    plain = shown.readme_table(about, None)
    assert "| SVD-LLM's rule | 20% |" in plain and "| SVD-LLM's rule | 40% |" not in plain
    assert "| **default** | 40% | 168 | 54.60 |" in plain and "accuracy, %" not in plain
    large = f"default, {shown.LARGE}"
    about["cells"] |= {f"{large} | {remove}": cell(70, 40.0, 60.0) for remove in (0.2, 0.3, 0.4)}
    about["cells"][f"{shown.DEFAULT} | 0.3"] = cell(70, 30.0, 60.0)
    rows = [line for line in shown.readme_table(about, None).splitlines() if "default" in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| default *", "20%"],
        ["| **default**", "20%"],
        ["| **default**", "30%"],  # alone
        ["| default *", "40%"],
        ["| **default**", "40%"],
    ]
    about["cells"] = {key: each for key, each in about["cells"].items() if not key.startswith(f"{shown.DEFAULT} | ")}
    with pytest.raises(SystemExit, match="or no default, which README shows"):
        shown.readme_table(about, harness)


def test_readme_is_written_between_its_marks_only(about, monkeypatch):
    monkeypatch.setattr(shown, "real_record", lambda: about)
    monkeypatch.setattr(shown, "harness_record", lambda: None)
    begin, end = "<!-- real: make results -->\n", "<!-- end of real -->\n"
    text = page.readme(f"a\n{begin}old\n{end}b\n")
    assert text == f"a\n{begin}\n{shown.readme_table(about, None)}\n\n{end}b\n"
    assert page.readme(text) == text and page.readme("no marks\n") == "no marks\n"


def test_without_records_the_page_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shown, "RESULTS", tmp_path)
    parts = shown.PARTS | knobs.PARTS | real_served.PARTS
    assert {part() for part in parts.values()} == {"Not run yet."}
    with pytest.raises(SystemExit, match="not there"):
        shown.readme_part()


def test_the_figure_has_what_was_run(about, harness, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra [report])")
    from benchmarks.results_page.figures import STYLES, draw_real

    assert set(STYLES) <= set(shown.METHODS)
    with_accuracy, without = tmp_path / "one.svg", tmp_path / "two.svg"
    draw_real(with_accuracy, about, harness)
    draw_real(without, about, None)
    for path, accuracy in ((with_accuracy, True), (without, False)):
        text = path.read_text(encoding="utf-8")
        assert "<!-- default -->" in text and "<!-- int8, rounded to nearest -->" in text
        assert ("<!-- mean accuracy of six tasks -->" in text) is accuracy
        assert "width pruning" not in text  # was not run
    wikitext2 = shown.perplexity_of(about, "wikitext2")
    assert shown.points(about, shown.DEFAULT, wikitext2) == [(79.9, math.e**3.5), (60.0, math.e**4)]
    assert shown.points(about, shown.RULE, wikitext2, "bytes") == [(208.0, math.e**5), (168.0, math.e**7)]
    assert shown.points(about, "depth pruning, healed", wikitext2) == []  # infinite
