"""Kill -9 a conversion at a random moment, run it again, and compare what it writes with an undisturbed run's.

python tests/convert/kill.py 50 --seed 0      # about 15 minutes on two cores; tests run a few
"""

import argparse
import json
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

DEMO = Path(__file__).parent.parent / "models" / "stdlib-2m"
SETTINGS = (
    "--remove 0.3 --samples 16 --gradient-samples 16 --sequence-length 48 --batch-size 4 --steps 16 --heal-steps 16"
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
        shutil.copy(DEMO / name, folder)
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    return folder


def command(model: Path, folder: Path, more: str = "") -> list[str]:
    options = ["--calibration", str(model / "text.txt"), "--work", str(folder / "work"), "--refit", *more.split()]
    return [
        sys.executable,
        "-m",
        "fermisvd_convert",
        "convert",
        str(model),
        str(folder / "out"),
        *SETTINGS.split(),
        *options,
    ]


def written(out: Path) -> dict[str, bytes]:
    """All files but the one that holds times."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != "timing.json"}


def last_stage(folder: Path) -> str:
    """Kind of the artefact that was finished last before the kill."""
    manifest = folder / "work" / "manifest.jsonl"
    lines = [line for line in manifest.read_text().splitlines() if line] if manifest.exists() else []
    if (folder / "out").exists():
        return "all"
    for line in reversed(lines):
        try:
            return json.loads(line)["artefact"].partition("-")[0]
        except ValueError:
            continue
    return "nothing"


def kill_and_resume(model: Path, folder: Path, delay: float) -> str:
    """The stage behind which the conversion was killed, `delay` seconds after its first artefact or its start."""
    process = subprocess.Popen(command(model, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "work").exists():
        time.sleep(0.01)  # imports are of no interest
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stage = last_stage(folder)
    assert not (folder / "out").exists() or stage == "all"
    subprocess.run([*command(model, folder), "--overwrite"], check=True, capture_output=True, text=True)
    return stage


def survive(kills: int, seed: int, scratch: Path) -> Counter:
    """How often a conversion was killed behind each stage. Raises AssertionError if a file differs afterwards."""
    model, draw = make_model(scratch / "model"), random.Random(seed)
    begin = time.monotonic()
    process = subprocess.Popen(command(model, scratch / "plain"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (scratch / "plain" / "work").exists():
        time.sleep(0.01)
    begin = time.monotonic()
    assert process.wait() == 0
    seconds, expected, stages = time.monotonic() - begin, written(scratch / "plain" / "out"), Counter()
    for number in range(kills):
        folder = scratch / str(number)
        stage = kill_and_resume(model, folder, draw.uniform(0, seconds))
        found = written(folder / "out")
        assert found.keys() == expected.keys(), (number, stage)
        different = [name for name, content in found.items() if content != expected[name]]
        assert not different, f"kill {number} behind {stage}: {different} differ"
        left = [path.name for path in folder.iterdir() if path.name not in ("out", "work")]
        assert not left, left
        stages[stage] += 1
        shutil.rmtree(folder)
        print(f"{number + 1} of {kills}: killed behind {stage}, same output", flush=True)
    return stages


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(dict(survive(arguments.kills, arguments.seed, Path(scratch))))
