"""Kill -9 a conversion at a random moment, run it again, and compare what it writes with an undisturbed run's.

python -m tests.support.kill 50 --seed 0      # twenty minutes to an hour on two cores; tests run a few
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import DEMO_MODEL
from tests.support.artefacts import kinds

FORMS = ("pivga", "svd")
SETTINGS = (
    "--remove 0.3 --samples 16 --gradient-samples 16 --sequence-length 48 --batch-size 4 --steps 16 --heal-steps 16"
    " --no-ask-vllm"
)


def make_model(folder: Path) -> Path:
    """A random Llama with the demo's tokenizer: large enough for every stage to take a part of the time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    return folder


# hidden states go to files, and FermiGrad and healing keep their state at every step: all of that takes minutes in a
# large model only
PROGRAM = """
from fermisvd_convert import memory, workspace
memory.HIDDEN_PART = workspace.PROGRESS_SECONDS = workspace.STATE_SECONDS = workspace.STATE_PAUSE = 0
from fermisvd_convert.cli import app
app()
"""


def command(model: Path, folder: Path, form: str, more: str = "") -> list[str]:
    options = ["--calibration", str(model / "text.txt"), "--work", str(folder / "work"), "--refit", "--form", form]
    run = [sys.executable, "-c", PROGRAM, "convert", str(model), str(folder / "out")]
    return [*run, *SETTINGS.split(), *options, *more.split()]


def written(out: Path) -> dict[str, bytes]:
    """All files but the one that holds times."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file() and file.name != "timing.json"}


def last_stage(folder: Path) -> str:
    """Kind of the artefact that was finished last before the kill."""
    return (kinds(folder / "work") or ["nothing"])[-1]


def begun(model: Path, folder: Path, form: str, more: str = "") -> subprocess.Popen:
    """A conversion that has come as far as its work directory: imports are of no interest."""
    process = subprocess.Popen(command(model, folder, form, more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "work").exists():
        time.sleep(0.01)
    return process


def kill_and_resume(model: Path, folder: Path, form: str, delay: float, expected: dict, earlier: Path | None) -> str:
    """The stage behind which a conversion was killed, after `delay` seconds; "" if it had ended by then.

    earlier: a checkpoint that is OUT before, to be overwritten.
    """
    if earlier is not None:
        shutil.copytree(earlier, folder / "out")
    process = begun(model, folder, form, "--overwrite")
    time.sleep(delay)
    if process.poll() is not None:
        return ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    stage = last_stage(folder)
    if (folder / "out" / "config.json").exists():  # whole, at any moment
        found = written(folder / "out")
        assert found == expected or (earlier is not None and found == written(earlier)), f"OUT is neither, {stage}"
    subprocess.run(command(model, folder, form, "--overwrite"), check=True, capture_output=True, text=True)
    return stage


def survive(kills: int, seed: int, scratch: Path) -> Counter:
    """How often a conversion was killed behind each stage; both forms in turn, every third time with an earlier OUT.

    Raises AssertionError if a file differs from an undisturbed run's, or something is left beside OUT.
    """
    model, draw = make_model(scratch / "model"), random.Random(seed)
    seconds, expected, stages = {}, {}, Counter()
    for form in FORMS:
        process, begin = begun(model, scratch / form, form), time.monotonic()
        assert process.wait() == 0
        seconds[form], expected[form] = time.monotonic() - begin, written(scratch / form / "out")
    while sum(stages.values()) < kills:
        number = sum(stages.values())
        form, folder = FORMS[number % 2], scratch / str(number)
        other = scratch / FORMS[1 - number % 2] / "out" if number % 3 == 2 else None
        folder.mkdir()
        delay = draw.uniform(0, seconds[form])
        stage = kill_and_resume(model, folder, form, delay, expected[form], other)
        if stage:
            found = written(folder / "out")
            assert found.keys() == expected[form].keys(), (number, stage)
            different = [name for name, content in found.items() if content != expected[form][name]]
            assert not different, f"kill {number} behind {stage}: {different} differ"
            left = {path.name for path in folder.iterdir()} - {"out", "work", ".fermisvd"}
            assert not left, left
            stages[stage] += 1
            print(f"{number + 1} of {kills}: {form} killed behind {stage}, same output", flush=True)
        shutil.rmtree(folder)
    return stages


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(dict(survive(arguments.kills, arguments.seed, Path(scratch))))
