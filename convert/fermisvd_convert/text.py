"""Calibration text: files and data sets in, windows of token ids out."""

import codecs
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError

from fermisvd.errors import FermiSVDError

DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"
HELD_BACK_WINDOWS = 32
TEXT_SUFFIXES = {".txt", ".jsonl"}  # of files, not of data sets


class TextError(FermiSVDError):
    """A text cannot be read or is too short."""


@dataclass(frozen=True)
class CalibrationText:
    """windows: (samples, length) token ids; held_back: (up to 32, length), never calibrated on."""

    windows: torch.Tensor
    held_back: torch.Tensor


def calibration_text(tokenizer, sources: Sequence[str], samples: int, length: int) -> CalibrationText:
    """The first `samples` windows of the texts, mixed in proportion to their weights, and the windows after them held
    back.

    sources: SOURCE or SOURCE@WEIGHT, weight 1 by default: web.txt@3 code.txt gives three windows of web for one of
    code. A text with no windows to spare gives up a tenth of them. Raises TextError for a text that gives no window,
    or fewer than two in all.
    """
    wanted = samples + HELD_BACK_WINDOWS
    weighted = [weighted_source(source) for source in sources]
    total = sum(weight for _, weight in weighted)
    placed = []
    for name, weight in weighted:
        own = windows_of(tokenizer, name, length, math.ceil(wanted * weight / total))
        placed += [((i + 0.5) / weight, window) for i, window in enumerate(own)]  # window i of a text is due here
    windows = torch.stack([window for _, window in sorted(placed, key=lambda pair: pair[0])][:wanted])
    if len(windows) < 2:
        raise TextError(
            f"{', '.join(sources)}: {len(windows)} window of {length} tokens, two are needed; "
            "give more text or a smaller --sequence-length"
        )
    held_back = min(HELD_BACK_WINDOWS, max(len(windows) - samples, len(windows) // 10, 1))
    calibration = windows[: min(samples, len(windows) - held_back)]
    return CalibrationText(calibration, windows[len(calibration) :][:held_back])


def weighted_source(source: str) -> tuple[str, float]:
    """Name and weight of SOURCE@WEIGHT; a name that itself ends in @ and a number is a file's. Raises TextError for
    a weight that is not positive."""
    name, mark, number = source.rpartition("@")
    if not mark or Path(source).exists():
        return source, 1.0
    try:
        weight = float(number)
    except ValueError:
        return source, 1.0
    if not 0 < weight < math.inf:
        raise TextError(f"--calibration {source}: a weight must be positive")
    return name, weight


def check_vocabulary(windows: torch.Tensor, vocabulary: int, folder: str | Path) -> None:
    """Raises TextError if a token is none of the model's."""
    if (largest := int(windows.max())) >= vocabulary:
        raise TextError(
            f"{folder}: the tokenizer gives token {largest}, but the model has {vocabulary}; they are not of one model"
        )


def windows_of(tokenizer, source: str, length: int, limit: int | None = None) -> torch.Tensor:
    """Non-overlapping windows of a text, (windows, length), no special tokens added, the remainder dropped.

    source: a text file, a .jsonl file, or a data set (folder or hub id, NAME[:CONFIG]); limit: most windows to make.
    Raises TextError if there is not one whole window.
    """
    needed = None if limit is None else limit * length
    ids: list[int] = []
    for document in _documents(tokenizer, source, needed):
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        try:
            document.encode()
        except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair, which is no character
            raise TextError(f"{source}: not Unicode text ({error.reason}: {document[error.start]!a})") from None
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if needed is not None and len(ids) >= needed:
            break
    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if count == 0:
        raise TextError(f"{source}: {len(ids)} tokens, shorter than one window of {length}")
    return torch.tensor(ids[: count * length]).view(count, length)


def _documents(tokenizer, source: str, needed: int | None) -> Iterator[str]:
    path = Path(source)
    if path.is_file():
        try:
            if path.suffix == ".jsonl":
                yield from _jsonl(tokenizer, path)
            else:
                with path.open(
                    encoding="utf-8", newline=""
                ) as stream:  # no token is longer than 16 characters on average
                    yield stream.read(-1 if needed is None else min(16 * needed, sys.maxsize))
        except UnicodeDecodeError as error:  # which counts from where the reader's buffer begins
            raise TextError(f"{source}: not UTF-8 text ({error.reason} at byte {first_bad_byte(path)})") from None
    else:
        yield from _dataset(tokenizer, source)


def first_bad_byte(path: Path) -> int | None:
    """Where a file stops to be UTF-8; None if it does not."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(2**20)
            pending, _ = decoder.getstate()  # of a character that the chunk before began
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return place - len(pending) + error.start
            if not chunk:
                return None
            place += len(chunk)


def _jsonl(tokenizer, path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise TextError(f"{path}: line {number}: {error}") from None
                yield _row_text(tokenizer, row, f"{path}: line {number}")


def _dataset(tokenizer, source: str) -> Iterator[str]:
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in TEXT_SUFFIXES
    if is_path and not Path(source).exists():
        raise TextError(f"{source}: no such file")  # at once: the hub's client asks again and again
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise TextError(f"--calibration {source}: no such file; for data sets, pip install datasets") from None
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            text = _row_text(tokenizer, row, f"{source}: row {number}")
            if text.strip():
                yield text
    except TextError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TextError(
            f"{source}: neither a file nor a data set that can be loaded ({error.__class__.__name__}: {error})"
        ) from None


def _row_text(tokenizer, row: dict, where: str) -> str:
    """`messages` through the chat template, else `text`, else all string fields, one a line."""
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not tokenizer.chat_template:
            raise TextError(f"{where}: messages, but the model's tokenizer has no chat template")
        try:
            return tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except (TemplateError, TypeError) as error:
            raise TextError(f"{where}: the model's chat template does not take its messages ({error})") from None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    strings = [value for value in row.values() if isinstance(value, str)] if isinstance(row, dict) else []
    if not strings:
        raise TextError(f"{where}: no text in it")
    return "\n".join(strings)
