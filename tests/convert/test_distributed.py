import json
import subprocess
import sys

import pytest

from fermisvd.format import validate_checkpoint
from tests.support import ROOT


def convert(processes: int, model, out, text, work, form="pivga", program="fermisvd_convert", more=()) -> dict:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    numbers = {"remove": 0.3, "samples": 12, "gradient-samples": 12, "sequence-length": 32, "steps": 6}
    numbers |= {"batch-size": 4, "align": 1, "heal-steps": 0 if more else 2}
    options = [part for name, value in numbers.items() for part in (f"--{name}", value)]
    options += ["--calibration", text, "--work", work, "--compute", "float32", "--form", form, "--no-ask-vllm", *more]
    run = [*launch, "-m", program, "convert", model, out, *options]
    done = subprocess.run([str(part) for part in run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    validate_checkpoint(out)
    return json.loads((out / "fermisvd.json").read_text())


def names_of(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.long
@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_two_processes_convert_as_one(tiny_llama, tmp_path, form):
    """Each with models of its own, and with parts of them: the same groups and ranks; perplexity to 1e-4, as sums are
    taken in another order."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    one = convert(1, tiny_llama, tmp_path / "one", text, tmp_path / "work one", form)
    assert any(layer["trials"] for layer in one["choices"]["groups"]) and one["choices"]["joining"]
    programs = {"two": "fermisvd_convert", "divided": "tests.support.converted_divided"}
    for name, program in programs.items() if form == "pivga" else [("divided", programs["divided"])]:
        work = tmp_path / f"work {name}"
        two = convert(2, tiny_llama, tmp_path / name, text, work, form, program)
        assert [(g["members"], g["rank"]) for g in two["groups"]] == [(g["members"], g["rank"]) for g in one["groups"]]
        joined = [[each["joined"] for each in record["choices"]["joining"]] for record in (one, two)]
        assert joined[0] == joined[1]
        for when in ("before", "after"):
            assert two["perplexity"][when] == pytest.approx(one["perplexity"][when], rel=1e-4)
        assert two["perplexity"]["tokens"] == one["perplexity"]["tokens"]
        assert names_of(work) == names_of(tmp_path / "work one")


@pytest.mark.long
def test_two_processes_refit_and_rescale_as_one(tiny_llama, tmp_path):
    """What the first process has refitted is read by both; the same steps, and perplexity to 1e-4."""
    text, more = tmp_path / "text.txt", ("--refit", "--rescale", "--groups", "joint")
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    one, two = (
        convert(count, tiny_llama, tmp_path / str(count), text, tmp_path / f"work {count}", more=more)
        for count in (1, 2)
    )
    steps = [[each["step"] for each in record["choices"]["rescale"]] for record in (one, two)]
    assert steps[0] == steps[1] and any(steps[0])
    assert two["perplexity"]["after"] == pytest.approx(one["perplexity"]["after"], rel=1e-4)


def written(processes: int, model, text, out, work, *failing: str) -> tuple[dict[str, bytes], dict[str, set], str]:
    """The files of OUT but timing.json; which process wrote which files of weights; what was said."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    said_by = out.parent / f"written by {processes}"
    said_by.mkdir(exist_ok=True)
    run = [sys.executable, "-m", *(launch if processes > 1 else []), "tests.support.written_in_processes"]
    run += [str(part) for part in (model, text, out, work, said_by, *failing)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) != bool(failing), done.stderr[-3000:]
    files = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
    files.pop("timing.json", None)
    return files, {path.name: set(path.read_text().split()) for path in said_by.iterdir()}, done.stderr


@pytest.mark.long
def test_two_processes_write_the_files_of_one(tiny_llama, tmp_path):
    """Bit for bit, from the same artefacts. If one of them fails, there is no OUT, and the next conversion makes it."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    one, by_one, _ = written(1, tiny_llama, text, tmp_path / "1", tmp_path / "work")
    for failing in ("0", "1"):
        nothing, _, said = written(2, tiny_llama, text, tmp_path / "2", tmp_path / "work", failing)
        told = [line for line in said.splitlines() if f"process {failing}: " in line]
        assert not nothing and "2: cannot be written (No space left on device)" in told[0]
    two, by_two, _ = written(2, tiny_llama, text, tmp_path / "2", tmp_path / "work")
    assert two == one and not (tmp_path / ".fermisvd" / "2.new").exists()
    assert by_two.keys() == {"0", "1"} and len(by_two["0"]) > 1 and len(by_two["1"]) > 1
    assert by_one["0"] == by_two["0"] | by_two["1"] and not by_two["0"] & by_two["1"]
