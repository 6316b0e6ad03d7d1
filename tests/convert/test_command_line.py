"""Whatever options the command line is given: a whole checkpoint, or exit code 2 and one line that says why.

Many more examples than `make test` runs, about twenty minutes:

    python -m pytest tests/convert/test_command_line.py -m slow
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fermisvd.format import validate_checkpoint
from fermisvd_convert.cli import app

PROFILE: dict[str, Any] = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

letters = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")  # what a shell can pass
junk = st.text(letters, max_size=6) | st.sampled_from(
    ["", "nan", "inf", "-inf", "-1", "0", "0.5", "1e400", "1e-320", str(2**31), str(2**70), "auto", "x", "--", "@", "."]
)


def numbers(values):
    return values.map(str)


GENERAL = {
    "--form": st.sampled_from(["pivga", "svd"]),
    "--groups": st.sampled_from(["auto", "joint", "separate"]),
    "--whitening": st.sampled_from(["kfac", "input"]),
    "--batch-size": numbers(st.integers(1, 9)),
    "--minimum-rank": numbers(st.integers(1, 12)),
    "--align": st.sampled_from(["auto", "1", "2", "5"]),
    "--dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    "--seed": numbers(st.integers(0, 3)),
}
FERMIGRAD = {
    "--gradient-samples": numbers(st.integers(1, 12)),
    "--constraint": st.sampled_from(["projection", "penalty"]),
    "--temperature": numbers(st.floats(1e-6, 1)),
    "--penalty-growth": numbers(st.floats(1, 3)),
    "--plateau": numbers(st.floats(0, 1)),
    "--count": st.sampled_from(["svd", "pivga"]),
}
FLAGS = ["--refit", "--no-refit", "--overwrite", "--trust-remote-code"]
ODD_TEXTS = ["short.txt", "empty.txt", "latin.txt", "broken.jsonl", "code.txt@0", "code.txt@nan", "nothing.txt"]
ODD_MODELS = ["./nowhere", "nobody/nothing", "code.txt", ".", ""]
ODD_OUTS = ["{new}/below", "there", "code.txt/out", "{model}/out", "", "."]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder that examples start in: texts of every kind, ranks, and places where no OUT can be."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "code.txt").write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(90)))
    (folder / "rows.jsonl").write_text('{"text": "while True:\\n    break"}\n' * 90)
    (folder / "short.txt").write_text("x")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 90)
    (folder / "broken.jsonl").write_text("{")
    (folder / "ranks.json").write_text('{"a": 1}')
    (folder / "there").mkdir()
    return folder


@st.composite
def command(draw):
    """Arguments of `fermisvd convert` that make sense, {model} and {new} standing for folders, with up to two of them
    replaced by something odd."""
    given = {
        "--remove": str(draw(st.floats(0.05, 0.9))),
        "--samples": str(draw(st.integers(2, 12))),
        "--sequence-length": str(draw(st.integers(4, 64))),
        "--heal-steps": str(draw(st.integers(0, 2))),
        "--work": "{new}.work",
        "--ranks": draw(st.sampled_from(["fermigrad", "uniform"])),
        **draw(st.fixed_dictionaries({}, optional=GENERAL)),
    }
    if given["--ranks"] == "fermigrad":
        given |= {"--steps": str(draw(st.integers(1, 3))), **draw(st.fixed_dictionaries({}, optional=FERMIGRAD))}
        if given.get("--constraint") != "penalty":
            given.pop("--penalty-growth", None)
    model, out, flags = "{model}", "{new}", draw(st.lists(st.sampled_from(FLAGS), max_size=2))
    texts = draw(st.lists(st.sampled_from(["code.txt", "rows.jsonl", "code.txt@2"]), min_size=1, max_size=3))
    for odd in draw(
        st.lists(st.sampled_from(["MODEL", "OUT", "TEXT", "WORK", "RANKS", "one more", *given]), max_size=2)
    ):
        if odd == "MODEL":
            model = draw(st.sampled_from(ODD_MODELS))
        elif odd == "OUT":
            out = draw(st.sampled_from(ODD_OUTS))
        elif odd == "TEXT":
            texts.append(draw(st.sampled_from(ODD_TEXTS)))
        elif odd == "WORK":
            given["--work"] = draw(st.sampled_from(["there", "{new}/work", "code.txt", "{model}/work"]))
        elif odd == "RANKS":
            given["--ranks"] = draw(st.sampled_from(["ranks.json", "code.txt", "there", "greedy", "uniform"]))
        elif odd == "one more":
            given[draw(st.sampled_from([*FERMIGRAD, "--revision", "--device", "--no-such-option"]))] = draw(junk)
        elif odd not in ("--steps", "--heal-steps"):
            given[odd] = draw(junk)
        else:  # 2147483647 of them are no mistake, but too many for a test
            given[odd] = draw(st.sampled_from(["-1", "x", "", "nan", "1.5", str(2**70)]))
    options = [part for pair in given.items() for part in pair]
    return ["convert", model, out, *options, *flags, "--calibration", *texts]


def names(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def converts_or_refuses(arguments, model, texts, monkeypatch) -> str:
    """Runs the command; "converted", or the message."""
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        here = Path(shutil.copytree(texts, Path(folder, "here")))
        patch.chdir(here)
        source = shutil.copytree(model, here / "model")
        arguments = [part.replace("{model}", str(source)).replace("{new}", "new") for part in arguments]
        before = names(here)
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100000", "TERM": "dumb"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        made = {path.parts[0] for path in names(here) - before if not path.parts[0].endswith("work")} - {".fermisvd"}
        made -= {"there"} if "--work" in arguments and arguments[arguments.index("--work") + 1] == "there" else set()
        if result.exit_code == 0:
            assert made == {Path(arguments[2]).parts[0]}, made  # an empty folder that is there will do, too
            validate_checkpoint(here / arguments[2])
            return "converted"
        assert result.exit_code == 2, result.output
        assert not made, f"a partial OUT: {made}"
        lines = [line for line in result.output.splitlines() if line.startswith(("fermisvd: ", "│"))]
        assert len(lines) == 1 and "Traceback" not in result.output, result.output
        return lines[0]


@pytest.mark.long
@settings(max_examples=40, derandomize=True, **PROFILE)
@given(command())
def test_any_options(smallest_llama, texts, arguments):
    with pytest.MonkeyPatch.context() as patch:
        outcome = converts_or_refuses(arguments, smallest_llama, texts, patch)
        event("converted" if outcome == "converted" else "refused")


@pytest.mark.slow
@settings(max_examples=1500, **PROFILE)
@given(command())
def test_any_options_at_length(smallest_llama, texts, arguments):
    with pytest.MonkeyPatch.context() as patch:
        outcome = converts_or_refuses(arguments, smallest_llama, texts, patch)
        event("converted" if outcome == "converted" else "refused")


def test_a_plain_command_converts(smallest_llama, texts, monkeypatch):
    """The property is not met by refusing everything."""
    given = {
        "--remove": 0.3,
        "--samples": 4,
        "--sequence-length": 16,
        "--heal-steps": 1,
        "--steps": 1,
        "--work": "work",
    }
    options = [str(part) for pair in given.items() for part in pair]
    arguments = ["convert", "{model}", "{new}", *options, "--calibration", "code.txt@2", "rows.jsonl"]
    assert converts_or_refuses(arguments, smallest_llama, texts, monkeypatch) == "converted"
