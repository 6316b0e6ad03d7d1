"""Do two processes give the ranks and the perplexity of one, and how much sooner, on one core each?

    python -m benchmarks.cost.distributed ../shared/data/checkpoints/stories260K TEXT
    python -m benchmarks.cost.distributed tests/support/stdlib-2m TEXT --options="--steps 32 --samples 128"

Results: benchmarks/results/distributed-MODEL.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.records import new_record, write_record


def convert(processes: int, model: Path, text: Path, options: list[str], scratch: Path) -> dict:
    out, work = scratch / f"out-{processes}", scratch / f"work-{processes}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *launch,
        "-m",
        "fermisvd_convert",
        "convert",
        model,
        out,
        "--calibration",
        text,
        "--work",
        work,
        "--no-ask-vllm",
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], check=True, env=environment, stdout=subprocess.DEVNULL)
    report = json.loads((out / "fermisvd.json").read_text())
    return {
        "processes": processes,
        "seconds": json.loads((out / "timing.json").read_text()),
        "perplexity": report["perplexity"],
        "kl": [step["kl"] for step in report["trace"]["steps"]],
        "ranks": {group["members"][0]: group["rank"] for group in report["groups"]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--options", default="")
    arguments = parser.parse_args()
    options = ["--remove", "0.3", "--no-bos", *shlex.split(arguments.options)]
    command = f"python -m benchmarks.cost.distributed {arguments.model.name} {arguments.text.name}"
    command += f" --options={arguments.options!r}"
    record = new_record(command, {"options": options, "threads a process": 1})
    with tempfile.TemporaryDirectory() as scratch:
        runs = [convert(n, arguments.model, arguments.text, options, Path(scratch)) for n in (1, 2)]
    record["runs"] = runs
    one, two = runs
    print("ranks equal:", one["ranks"] == two["ranks"])
    print("perplexity:", one["perplexity"], two["perplexity"])
    print(
        "largest relative difference of FermiGrad's losses:",
        max(abs(a / b - 1) for a, b in zip(one["kl"], two["kl"], strict=True)),
    )
    for stage in one["seconds"]:
        print(f"{stage:10} {one['seconds'][stage]:8.2f} s {two['seconds'][stage]:8.2f} s")
    write_record(f"distributed-{arguments.model.name}", record)
