"""Calibration text: files and data sets in, windows of token ids out."""

import logging
import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fermisvd_convert.chats import RowError, row_text
from fermisvd_convert.progress import bar
from fermisvd_convert.rows import TextError, rows_of

logger = logging.getLogger("fermisvd")

BOS, SKIP_BAD_ROWS = True, False
HELD_BACK_WINDOWS = 32
MEASURED_WINDOWS = 320  # a tenth of these is held back
CHARACTERS = 16  # no token is longer on average
BEGINNING = 200  # characters of the first window that are shown


@dataclass
class RowCounts:
    """Rows of a text: used; skipped, as they are empty; refused. A plain text is one row."""

    used: int = 0
    skipped: int = 0
    refused: int = 0

    def __str__(self) -> str:
        left_out = [f"{n:,} {why}" for n, why in ((self.skipped, "empty"), (self.refused, "refused")) if n]
        return ", ".join([f"{self.used:,} {'row' if self.used == 1 else 'rows'} used", *left_out])


@dataclass(frozen=True)
class Windows:
    """ids: (windows, length); bos: whether each begins with the tokenizer's BOS because it adds one."""

    ids: torch.Tensor
    rows: RowCounts
    bos: bool


@dataclass(frozen=True)
class CalibrationText:
    """windows: (samples, length) token ids; held_back: (up to 32, length), never calibrated on; rows: of each source;
    beginning: of the first window, as text; bos: as of Windows."""

    windows: torch.Tensor
    held_back: torch.Tensor
    rows: list[tuple[str, RowCounts]]
    beginning: str
    bos: bool

    def record(self, names: Sequence[str]) -> dict:
        """As JSON, the sources under these names."""
        sources = [{"name": name, **asdict(rows)} for name, (_, rows) in zip(names, self.rows, strict=True)]
        return {"sources": sources, "beginning": self.beginning}


def calibration_text(
    tokenizer,
    sources: Sequence[str],
    samples: int,
    length: int,
    *,
    bos: bool = BOS,
    skip_bad_rows: bool = SKIP_BAD_ROWS,
) -> CalibrationText:
    """Windows of the texts, mixed in proportion to their weights: the first are held back, the next `samples` are
    calibrated on.

    sources: SOURCE or SOURCE@WEIGHT, weight 1 by default: web.txt@3 code.txt gives three windows of web for one of
    code. Held back is a tenth of the windows that the texts give, up to 32: which ones depends on texts and length
    alone, so that what is measured on them can be compared. bos, skip_bad_rows: as of windows_of. Raises TextError for
    a text that gives no window, or fewer than two in all.
    """
    wanted = max(MEASURED_WINDOWS, samples + HELD_BACK_WINDOWS)
    weighted = [weighted_source(source) for source in sources]
    names = [os.path.realpath(name) if Path(name).exists() else name for name, _ in weighted]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TextError(f"{twice[0]}: given twice; to count for more it takes a weight, TEXT@2")
    total = sum(weight for _, weight in weighted)
    placed, rows, measured, with_bos = [], [], 0, False
    for name, weight in weighted:
        own = read_windows(tokenizer, name, length, math.ceil(wanted * weight / total), bos, skip_bad_rows)
        placed += [((i + 0.5) / weight, window) for i, window in enumerate(own.ids)]  # window i of a text is due here
        measured += min(len(own.ids), math.ceil(MEASURED_WINDOWS * weight / total))  # whatever `samples` is
        rows.append((name, own.rows))
        with_bos = own.bos
    windows = torch.stack([window for _, window in sorted(placed, key=lambda pair: pair[0])])
    if len(windows) < 2:
        raise TextError(
            f"{', '.join(sources)}: {len(windows)} window of {length} tokens, two are needed; "
            "give more text or a smaller --sequence-length"
        )
    held_back = min(HELD_BACK_WINDOWS, max(1, measured // 10))
    calibration = windows[held_back:][:samples]
    beginning = tokenizer.decode(calibration[0])[:BEGINNING]
    for name, count in rows:
        logger.warning("%s: %s", name, count)
    logger.warning("the calibration text begins: %r", beginning)
    return CalibrationText(calibration, windows[:held_back], rows, beginning, with_bos)


def recorded_names(sources: Sequence[str]) -> list[str]:
    """Calibration sources as a record names them: a data set of the hub by its id, a file or folder by its last name,
    for where it lay says nothing elsewhere."""
    return [Path(each).name if Path(weighted_source(each)[0]).exists() else each for each in sources]


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
        raise TextError(f"{source}: a weight must be positive")
    return name, weight


def check_vocabulary(windows: torch.Tensor, vocabulary: int, folder: str | Path) -> None:
    """Raises TextError if a token is none of the model's."""
    if (largest := int(windows.max())) >= vocabulary:
        raise TextError(
            f"{folder}: the tokenizer gives token {largest}, but the model has {vocabulary}; they are not of one model"
        )


def windows_of(
    tokenizer,
    source: str,
    length: int,
    limit: int | None = None,
    *,
    bos: bool = BOS,
    skip_bad_rows: bool = SKIP_BAD_ROWS,
) -> torch.Tensor:
    """Non-overlapping windows of a text, (windows, length), the remainder dropped; rows end with the tokenizer's EOS.

    source: a file or a data set (folder or hub id, NAME[:CONFIG]) of the formats of rows.py and the rows of chats.py;
    limit: most windows to make; bos: begin each with the tokenizer's BOS if it adds one to a text, and the window has
    none of its own; skip_bad_rows: go on without rows that are refused. Raises TextError for a row that is refused, and
    if there is not one whole window.
    """
    return read_windows(tokenizer, source, length, limit, bos, skip_bad_rows).ids


def read_windows(
    tokenizer, source: str, length: int, limit: int | None, bos: bool = BOS, skip_bad_rows: bool = SKIP_BAD_ROWS
) -> Windows:
    """As windows_of, with what became of the rows."""
    needed, characters = None if limit is None else limit * length, CHARACTERS
    ids, counts, cut_off = _token_ids(tokenizer, source, needed, characters, skip_bad_rows)
    while cut_off:  # a tokenizer of longer tokens
        characters *= 8
        ids, counts, cut_off = _token_ids(tokenizer, source, needed, characters, skip_bad_rows)
    first = added_bos(tokenizer) if bos else None
    windows = cut(ids, length, limit, first)
    if not windows:
        left_out = f" ({counts})" if counts.skipped or counts.refused else ""
        raise TextError(f"{source}: {len(ids)} tokens, shorter than one window of {length}{left_out}")
    return Windows(torch.tensor(windows), counts, first is not None)


def _token_ids(
    tokenizer, source: str, needed: int | None, characters: int, skip_bad_rows: bool
) -> tuple[list[int], RowCounts, bool]:
    """Token ids of a source until there are as many as needed; and whether there are fewer because a text was cut off
    at so many characters a token."""
    counts, ids, cut_off = RowCounts(), [], False
    with (
        closing(rows_of(source, None if needed is None else characters * needed)) as rows,
        bar("read text", needed, "token", scale=True) as shown,
    ):
        for where, row in rows:
            room = None if needed is None else characters * (needed - len(ids))
            try:
                text = row_text(tokenizer, row)
                cut_off |= room is not None and len(text) >= room
                tokens = _tokens(tokenizer, text[:room])
            except RowError as error:
                if not skip_bad_rows:
                    raise TextError(f"{where}: {error}") from None
                counts.refused += 1
                continue
            if not tokens:
                counts.skipped += 1
                continue
            if ids and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            ids += tokens
            counts.used += 1
            shown.reach(len(ids))
            if needed is not None and len(ids) >= needed:
                break
    return ids, counts, cut_off and needed is not None and len(ids) < needed


def cut(ids: list[int], length: int, limit: int | None, bos: int | None) -> list[list[int]]:
    """Windows of `length` ids one after the other, each with `bos` before it unless it begins with one."""
    windows, place = [], 0
    while limit is None or len(windows) < limit:
        before = [] if bos is None or ids[place : place + 1] == [bos] else [bos]
        window = before + ids[place : place + length - len(before)]
        if len(window) < length:
            break
        windows.append(window)
        place += length - len(before)
    return windows


def added_bos(tokenizer) -> int | None:
    """The token that the tokenizer puts before a text when the model is served; None if it puts none."""
    bare, served = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos = tokenizer.bos_token_id
    return bos if bos is not None and served[:1] == [bos] != bare[:1] else None


def _tokens(tokenizer, text: str) -> list[int]:
    """Without special tokens. Raises RowError for what the tokenizer does not take."""
    if not text:
        return []
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises bare ones
        raise RowError(f"the tokenizer does not take it ({error})") from None
