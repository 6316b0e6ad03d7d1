"""The work directory: every stage's result in a file named by the hash of all that it depends on.

Nothing is ever overwritten: other settings give another name, so that an unchanged stage is found and skipped.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def settings_key(*parts: Any) -> str:
    """Short hash of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then rename: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Workspace:
    """Artefacts of one model's conversions."""

    def __init__(self, folder: Path):
        self.folder = folder

    def json(self, name: str, make: Callable[[], Any], whole: Callable[[Any], bool] = lambda _: True) -> Any:
        """The JSON artefact `name`, made and kept if it is not there, not readable, or by `whole` lacks its tensors."""
        path = self.folder / f"{name}.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if whole(value):
                return value
        except (OSError, ValueError):
            pass
        value = make()
        write_whole(path, lambda p: p.write_text(json.dumps(value, indent=1), encoding="utf-8"))
        return value

    def has_tensors(self, stage: str, name: str) -> bool:
        try:
            with safe_open(self._tensors(stage, name), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def save_tensors(self, stage: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
        contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        write_whole(self._tensors(stage, name), lambda p: save_file(contiguous, p))

    def load_tensors(self, stage: str, name: str) -> dict[str, torch.Tensor]:
        with safe_open(self._tensors(stage, name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def _tensors(self, stage: str, name: str) -> Path:
        return self.folder / stage / f"{name}.safetensors"
