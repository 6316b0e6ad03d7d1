import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fermisvd_convert.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, line in (("a.txt", "def f(x):\n    return x\n\n"), ("b.txt", "class C:\n    pass\n\n")):
        (folder / name).write_text(line * 400)
    return folder


def run(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def converted(tiny_llama, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    result = run(
        "convert",
        tiny_llama,
        out,
        "--remove",
        0.25,
        "--form",
        "pivga",
        "--ranks",
        "fermigrad",
        "--groups",
        "joint",
        "--calibration",
        texts / "a.txt",
        texts / "b.txt",
        "--heal-steps",
        2,
        "--samples",
        8,
        "--gradient-samples",
        8,
        "--sequence-length",
        32,
        "--batch-size",
        4,
        "--constraint",
        "projection",
        "--temperature",
        0.02,
        "--steps",
        4,
        "--align",
        "auto",
        "--dtype",
        "auto",
        "--device",
        "cpu",
        "--seed",
        1,
    )
    assert result.exit_code == 0, result.output
    return out, result.output


def test_convert_prints_the_closing_table(converted):
    out, output = converted
    report = json.loads((out / "fermisvd.json").read_text())
    assert "before" in output and f"-{report['totals']['removed']:.2%}" in output
    assert f"{report['perplexity']['after']:.4f}" in output
    assert report["settings"]["calibration"] == ["a.txt", "b.txt"]
    assert report["totals"]["removed"] >= 0.25
    for key in ("rank", "form", "parameters_before", "parameters_after"):
        assert all(key in group for group in report["groups"])


BARS = ("read text", "check weights", "calibrate", "evaluate dense", "decompose", "FermiGrad", "choose dense groups")
BARS += ("compare spectra", "join groups", "refit", "rescale", "write", "heal", "evaluate compressed")


@pytest.mark.long
def test_settings_are_said_before_the_first_stage_and_every_bar_has_a_total(smallest_llama, texts, tmp_path):
    options = (
        "--remove 0.3 --form svd --refit --rescale --samples 8 --sequence-length 24 --steps 2 --heal-steps 2 --align 1 "
        "--no-ask-vllm"
    )
    command = ["convert", smallest_llama, tmp_path / "out", *options.split(), "--calibration", texts / "a.txt"]
    run = [sys.executable, "-m", "fermisvd_convert", *map(str, command)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    line = re.search(rf"^{smallest_llama.name}: (.*)$", said, re.MULTILINE)
    assert line and line.start() < said.index("calibrate:")
    record = json.loads((tmp_path / "out" / "fermisvd.json").read_text())
    for name in ("remove", "form", "refit", "steps", "heal_steps", "align", "seed", "batch_size", "learning_rate"):
        assert f"{name.replace('_', '-')} {record['settings'][name]}" in line[1]
    assert "calibration a.txt" in line[1]
    shown = [part for part in re.split(r"[\r\n]", said) if part.startswith(BARS)]
    for name in BARS:
        states = [part for part in shown if part.startswith(f"{name}:")]
        assert states and all(re.search(r"\d+%\|.*\| *[\d.]+k?/[1-9][\d.]*k? \[", part) for part in states), name


def test_bad_rows_end_every_command_or_are_skipped_and_recorded(smallest_llama, tmp_path):
    rows: list[dict] = [{"text": f"def f{i}(x):\n    return x * {i}\n"} for i in range(200)]
    rows[5:5] = [{"id": "row-5"}, {"text": ""}, {"text": None}]
    text, out = tmp_path / "rows.jsonl", tmp_path / "out"
    text.write_text("\n".join(map(json.dumps, rows)))
    short = ["--sequence-length", 16, "--device", "cpu"]
    few = ["--remove", 0.3, "--ranks", "uniform", "--samples", 4, "--heal-steps", 0, "--no-refit", *short]
    convert = ["convert", smallest_llama, out, "--calibration", text, *few]
    heal = ["heal", out, tmp_path / "healed", "--teacher", smallest_llama, "--text", text, "--samples", 8, "--steps", 1]
    commands = [convert, [*heal, *short], ["evaluate", out, "--text", text, *short]]
    for command in commands:
        refused = run(*command)
        assert refused.exit_code == 2
        assert f"{text}: line 6: no text in its fields (id)" in refused.output
        skipped = run(*command, "--skip-bad-rows", "--no-bos")
        assert skipped.exit_code == 0, skipped.output
        if command is convert:
            assert "calibration text rows.jsonl: 200 rows used, 1 empty, 2 refused" in skipped.stdout
            assert "it begins: " in skipped.stdout
    for name, key in (
        (out / "fermisvd.json", "calibration_text"),
        (tmp_path / "healed" / "healing.json", "training_text"),
    ):
        content = name.read_text()
        read = json.loads(content)[key]
        assert read["sources"] == [{"name": "rows.jsonl", "used": 200, "skipped": 1, "refused": 2}]
        assert 0 < len(read["beginning"]) <= 200 and str(tmp_path) not in content
    assert json.loads((out / "fermisvd.json").read_text())["settings"]["bos"] is False
    assert json.loads((tmp_path / "healed" / "healing.json").read_text())["bos"] is False


def test_evaluate_json_is_one_object(converted, tiny_llama, texts):
    out, _ = converted
    result = run(
        "evaluate", out, "--text", texts / "a.txt", "--reference", tiny_llama, "--sequence-length", 32, "--json"
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values.keys() == {"perplexity", "tokens", "kl", "top1_agreement"}
    assert values["kl"] > 0 and 0 <= values["top1_agreement"] <= 1
    alone = json.loads(run("evaluate", out, "--text", texts / "a.txt", "--sequence-length", 32, "--json").stdout)
    assert alone == {**values, "kl": None, "top1_agreement": None}


def test_inspect(converted):
    out, _ = converted
    values = json.loads(run("inspect", out, "--json").stdout)
    ranks = {tuple(g["members"]): g["rank"] for g in json.loads((out / "fermisvd.json").read_text())["groups"]}
    assert {tuple(g["members"]): g["rank"] for g in values["groups"]}.items() <= ranks.items()
    assert run("inspect", out).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere: no folder"),
        (["evaluate", "./nowhere", "--text", "x"], "./nowhere"),
        (["convert", "./nowhere", "out", "--remove", "0.2"], "no such folder"),
        (["convert", "m", "out"], "--remove"),
        (["convert", "m", "out", "--remove", "x"], "--remove"),
        (["convert", "m", "out", "more", "--remove", "0.2"], "more"),
        (["convert", "m", "out", "--remove", "0.2", "--form", "qr"], "--form"),
        (["convert", "m", "out", "--remove", "0.2", "--ranks", "greedy"], "greedy"),
        (["convert", "m", "out", "--remove", "0.2", "--align", "0"], "--align"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.long
def test_help_is_quick_and_names_the_commands():
    """The command line imports torch only once a command runs."""
    result = subprocess.run(
        [sys.executable, "-m", "fermisvd_convert", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in result.stdout for name in ("convert", "evaluate", "inspect"))
    code = "import sys, fermisvd_convert.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.long
@pytest.mark.parametrize("command", ["report", "inspect"])
def test_a_terminal_that_cannot_show_a_name_ends_no_command(converted, tmp_path, command):
    """ASCII alone, as in a container without a locale; the names are shown escaped."""
    out = shutil.copytree(converted[0], tmp_path / "modèle-小")
    more = ["--to", str(tmp_path / "fígures")] if command == "report" else []
    result = subprocess.run(
        [sys.executable, "-m", "fermisvd_convert", command, str(out), *more],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert result.returncode == 0, result.stderr
    assert b"f\\xedgures" in result.stdout if command == "report" else b"total" in result.stdout


@pytest.mark.parametrize("option", ["--work", "--calibration"])
def test_the_home_folder_is_meant_also_where_a_shell_leaves_it(tiny_llama, tmp_path, monkeypatch, option):
    """bash does not expand ~ behind =, so that a folder of that name would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 300)
    given = {"--work": str(tmp_path / "work"), "--calibration": str(tmp_path / "text.txt")}
    given[option] = "~/" + given[option].rpartition("/")[2]
    options = [f"{name}={value}" for name, value in given.items()]
    quick = "--remove 0.3 --ranks uniform --heal-steps 0 --no-refit --groups joint --samples 8 --sequence-length 32"
    result = run("convert", tiny_llama, "~/out", *quick.split(), *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out", "work", ".fermisvd"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "", "out", "--remove", "0.2"],
        ["convert", "m", "", "--remove", "0.2"],
        ["convert", "m", "out", "--remove", "0.2", "--work", ""],
        ["convert", "m", "out", "--remove", "0.2", "--calibration", " "],
        ["evaluate", "m", "--text", ""],
        ["heal", "out", "", "--text", "a.txt"],
        ["inspect", ""],
    ],
)
def test_an_empty_path_is_a_variable_that_was_not_set(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and "is empty" in result.output
    assert not list(tmp_path.iterdir())


def test_version():
    assert run("--version").output.startswith("fermisvd 0.")


@pytest.mark.long
def test_a_pipe_that_is_closed_is_no_error(converted):
    """`fermisvd report | head`: the reader has seen enough."""
    command = f"{sys.executable} -m fermisvd_convert inspect {converted[0]} | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "fermisvd:" not in result.stderr, result.stderr


@pytest.mark.long
@pytest.mark.parametrize(("rank", "disabled"), [("0", "False"), ("1", "True")])
def test_of_several_processes_the_first_has_bars(rank, disabled):
    code = "import sys; from fermisvd_convert.cli import app; sys.argv = ['fermisvd', 'inspect', '--help']\n"
    code += "try: app()\nexcept SystemExit: pass\nfrom tqdm import tqdm; print(tqdm(total=1).disable)"
    env = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert result.stdout.split()[-1] == disabled
