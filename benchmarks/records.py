"""What every record of a benchmark says beside its figures."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def new_record(command: str, protocol: dict) -> dict:
    """Protocol, command, machine, date and versions."""
    return {
        "protocol": protocol,
        "command": command,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "date": time.strftime("%F"),
        "versions": {package: version(package) for package in ("fermisvd", "torch", "transformers")},
    }


def write_record(name: str, record: dict) -> None:
    """results/NAME.json, whole or not at all."""
    partial = RESULTS / f".{name}.{os.getpid()}"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, RESULTS / f"{name}.json")


def commit() -> str:
    """The repository's commit; + where files of it are changed."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, cwd=RESULTS, capture_output=True, text=True).stdout.strip()
