"""Texts of five kinds, from the shared folder and the Python standard library: training and held-back parts."""

import json
from pathlib import Path

from tests.support import SHARED
from tests.support.stdlib_text import training_documents, validation_text

KINDS = ("stories", "web", "code", "maths", "encyclopedia")
HELD_BACK = 0.08  # of the kinds that come without a validation text of their own
CODE_CHARACTERS = 5_000_000  # of the standard library, so that code does not outweigh the rest


def _maths(path: Path) -> str:
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join(f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems)


def kind_texts(kind: str, shared: Path = SHARED) -> tuple[str, str]:
    """Training and held-back text of a kind; no passage is in both."""
    if kind == "stories":
        train, valid = ((shared / f"text/tinystories.{part}.txt").read_text("utf-8") for part in ("train", "valid"))
        return train, valid
    if kind == "code":
        return "\n\n".join(training_documents(with_tests=False))[:CODE_CHARACTERS], validation_text()
    if kind == "maths":
        text = _maths(shared / "tasks/gsm8k.train.jsonl")
    else:
        name = {"web": "c4.txt", "encyclopedia": "wikipedia.txt"}[kind]
        text = (shared / "text" / name).read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_BACK))
    return text[:cut], text[cut:]


def write_kinds(folder: Path, shared: Path = SHARED) -> dict[str, dict[str, Path]]:
    """{kind: {"calibration": path, "validation": path}}, written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = {}
    for kind in KINDS:
        paths[kind] = {}
        for part, text in zip(("calibration", "validation"), kind_texts(kind, shared), strict=True):
            paths[kind][part] = folder / f"{kind}.{part}.txt"
            paths[kind][part].write_text(text, encoding="utf-8")
    return paths
