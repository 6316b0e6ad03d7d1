"""Can vLLM serve a checkpoint? The plugin is asked, in a process of its own: vLLM's state and its log stay there, and
the converter imports neither."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fermisvd.errors import FormatError

MOST_SECONDS = 1800
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class NoAnswer(FormatError):
    """The process that asks vLLM has ended, or takes too long: vLLM is broken here, or out of memory."""


def ask(folder: Path, tensor_parallel_size: int = 1, trust_remote_code: bool = False) -> dict[str, Any]:
    """The fields of fermisvd_vllm.answer.Answer for a folder; one without weights is asked about its layers alone.

    Raises NoAnswer if the process ends without an answer.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    with TemporaryDirectory() as place:
        to = Path(place) / "answer.json"
        command = [sys.executable, "-P", "-m", "fermisvd_vllm.check", str(folder), str(to)]
        command += ["--tensor-parallel-size", str(tensor_parallel_size)]
        command += ["--trust-remote-code"] if trust_remote_code else []
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR"}
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"{folder}: vLLM was asked for {MOST_SECONDS} s and gave no answer") from None
        if not to.exists():
            said = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
            raise NoAnswer(f"{folder}: the process that asks vLLM ended without an answer: {said[-1].strip()}")
        return json.loads(to.read_text(encoding="utf-8"))


def why_not(answer: Mapping[str, Any]) -> str | None:
    """Why the folder cannot be served, in one line; None if it can, as far as was asked."""
    if answer["refusal"] is None and answer["failure"] is not None:
        return f"vLLM {answer['vllm']} does not serve such a model, compressed or not: {answer['failure']}"
    return answer["refusal"]


def lines(answer: Mapping[str, Any], tensor_parallel_size: int) -> Iterator[str]:
    """What a folder that is served is served as, a line for each finding."""
    taken = f"all {answer['loaded']} tensors have their place"
    if answer["vllm"]:
        yield f"vLLM {answer['vllm']} serves it as {answer['model']}: {taken}"
    else:
        yield f"vLLM is not installed here and was not asked; by the plugin's arithmetic {taken}"
    for what in ("compressed", "dense"):
        if answer[what]:
            yield f"{what}: {', '.join(f'{count} x {kind}' for kind, count in answer[what].items())}"
    held = answer["held"]
    yield (
        f"a process of {tensor_parallel_size} holds {held['factors']:,} numbers in compressed layers, of which "
        f"{held['replicated']:,} replicated; dense {held['dense']:,}"
    )
