"""Files and data sets in, rows out: every format as a stream, plain or compressed."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import constants

from fermisvd.errors import FermiSVDError
from fermisvd_convert.chats import RowError, holds_text

DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
}
# What begins like this is none of the text formats, whatever it is called.
BEGINNINGS = {
    b"PAR1": "Parquet; its name must end in .parquet",
    b"\x1f\x8b": "gzip; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; its name must end in .zst",
    b"BZh": "bzip2; unpack it first",
    b"\xfd7zXZ\0": "xz; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"ARROW1": "Arrow; save it as Parquet first",
    b"\xff\xff\xff\xff": "Arrow; save it as Parquet first",
    b"%PDF-": "a PDF document; extract its text first",
    codecs.BOM_UTF16_LE: "UTF-16 text; save it as UTF-8 first",
    codecs.BOM_UTF16_BE: "UTF-16 text; save it as UTF-8 first",
}
CHUNK, TEXT_CHUNK = 2**16, 2**24
LONGEST = 2**28  # characters of one JSON value
SAVED = ("state.json", "dataset_dict.json")  # what a data set's save_to_disk leaves
TRAIN = re.compile(r"(^|[/_.-])train([/_.-]|$)", re.IGNORECASE)  # a split's name
BETWEEN = re.compile(r"[\s,]*")  # two JSON values


class TextError(FermiSVDError):
    """A text cannot be read or is too short."""


def rows_of(source: str, characters: int | None = None) -> Generator[tuple[str, Any], None, None]:
    """Where a row stands and what stands there, row by row; a RowError in place of a row that cannot be read.

    source: a file, or a data set (folder or hub id, NAME[:CONFIG]). A plain text is one row, {"text": ...}, of at most
    so many `characters`. Raises TextError where no further row can be read.
    """
    path = Path(source)
    if path.is_dir() and (files := texts_in(path)):
        for file in files:
            yield from rows_of(str(file), characters)
        return
    if path.exists() and not path.is_dir() and not path.is_file():
        raise TextError(f"{source}: a pipe or device, which cannot be read twice; write the text to a file first")
    if not path.is_file():
        yield from _data_set(source)
        return
    form, _ = format_of(path)
    try:
        with opened(path) as stream:
            if form == "Parquet":
                rows = _parquet(stream)
            else:
                _check_text(path, stream)
                # the signature is dropped where there is one; newlines inside a text or a cell stay as they are
                text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None if form == "JSON lines" else "")
                rows = {
                    "JSON lines": _json_lines,
                    "JSON": _json,
                    "CSV": lambda stream: _separated(stream, ","),
                    "TSV": lambda stream: _separated(stream, "\t"),
                }.get(form, lambda stream: _plain(stream, characters))(text)
            for where, row in rows:
                yield f"{source}: {where}" if where else source, row
    except FermiSVDError:
        raise
    except UnicodeDecodeError as error:  # which counts from where the reader's buffer begins
        raise TextError(f"{source}: not UTF-8 text ({error.reason} at byte {first_bad_byte(path)})") from None
    except ImportError as error:
        raise TextError(f'{source}: to read it, pip install "fermisvd[convert]" ({error})') from None
    except Exception as error:  # every reader has errors of its own
        what = " in ".join(filter(None, format_of(path)))
        raise TextError(f"{source}: not readable as {what} ({error})") from None


def texts_in(folder: Path) -> list[Path]:
    """The files of a folder that are texts by their names; those of a train split alone where files are called so.

    Empty for a data set of Arrow files that `datasets` has saved.
    """
    if any((folder / name).exists() for name in SAVED):
        return []
    known = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_text(path)]
    return [path for path in known if TRAIN.search(str(path.relative_to(folder)))] or known


def _is_text(path: Path) -> bool:
    form, _ = format_of(path)
    return not path.name.startswith(".") and (form != "text" or ".txt" in (s.lower() for s in path.suffixes))


def format_of(path: Path) -> tuple[str, str | None]:
    """Format and compression that a file's name tells: ("text", None) for a name of no known ending."""
    name, compression = path.name.lower(), None
    for ending, kind in COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), kind
    return FORMATS.get(Path(name).suffix, "text"), compression


def opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked. One that is cut off raises an error of its own at its end."""
    _, compression = format_of(path)
    if compression == "gzip":
        return io.BufferedReader(gzip.open(path))  # pyright: ignore[reportReturnType]: it reads as a file does
    if compression == "zstd":
        import pyarrow  # pyright: ignore[reportMissingImports]  (an extra)

        # the zstandard package takes a file that is cut off for a whole one
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def first_bad_byte(path: Path) -> int | None:
    """Where a file, unpacked, stops to be UTF-8; None if it does not."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path) as stream:
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


def _check_text(path: Path, stream: BinaryIO) -> None:
    """Raises TextError for a stream that begins as no text does, saying what it is."""
    head = stream.peek(CHUNK)  # pyright: ignore[reportAttributeAccessIssue]: opened buffered
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            raise TextError(f"{path}: not text but {what}")
    if b"\0" in head:
        raise TextError(f"{path}: not text but binary data (a null byte at byte {head.index(0)})")


def _plain(stream: io.TextIOBase, characters: int | None) -> Iterator[tuple[str, object]]:
    parts, room = [], math.inf if characters is None else characters
    while room > 0 and (part := stream.read(int(min(room, TEXT_CHUNK)))):  # not all at once: as much may be asked for
        parts.append(part)
        room -= len(part)
    yield "", {"text": "".join(parts)}


def _json_lines(stream: io.TextIOBase) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = RowError(str(error))
            yield f"line {number}", row


def _json(stream: io.TextIOBase) -> Iterator[tuple[str, object]]:
    """Rows of an array, or rows one after the other; an object that is no row itself may hold one list of them."""
    number = 0
    for value in _json_values(stream):
        rows = [value]
        if isinstance(value, dict) and not holds_text(value):
            lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
            rows = lists[0] if len(lists) == 1 else rows
        for row in rows:
            number += 1
            yield f"row {number}", row


def _json_values(stream: io.TextIOBase) -> Iterator[object]:
    """JSON values that follow each other, and those of an array one by one. Raises ValueError where there is none."""
    decoder, buffer, place, inside, ended = json.JSONDecoder(), "", 0, False, False
    while True:
        place = BETWEEN.match(buffer, place).end()  # pyright: ignore[reportOptionalMemberAccess]: it matches nothing, too
        if place < len(buffer):
            if buffer[place] == ("]" if inside else "["):
                inside, place = not inside, place + 1
                continue
            try:
                value, end = decoder.raw_decode(buffer, place)
                if ended or end < len(buffer):  # else it may go on
                    place = end
                    yield value
                    continue
            except (ValueError, RecursionError) as error:
                if ended or len(buffer) - place > LONGEST:
                    raise ValueError(getattr(error, "msg", error)) from None
        elif ended:
            if inside:
                raise ValueError("the array does not end")
            return
        more = stream.read(max(CHUNK, len(buffer) - place))
        buffer, place, ended = buffer[place:] + more, 0, not more


def _separated(stream: io.TextIOBase, delimiter: str) -> Iterator[tuple[str, object]]:
    """Rows of a table whose first line names the fields. Raises ValueError for one that names two alike."""
    csv.field_size_limit(2**31 - 1)  # a text may well be longer than the module's 128 kB
    lines = csv.reader(stream, delimiter=delimiter, strict=True)  # else an open quote swallows the rest
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise ValueError(f"two columns of one name: {', '.join(header)}")
    start = lines.line_num + 1
    for cells in lines:
        if len(cells) == len(header):
            yield f"line {start}", dict(zip(header, cells, strict=True))
        elif cells:
            yield f"line {start}", RowError(f"{len(cells)} cells, the header has {len(header)}")
        start = lines.line_num + 1


def _parquet(stream: BinaryIO) -> Iterator[tuple[str, object]]:
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]  (an extra)

    with tempfile.TemporaryFile() as file:
        if not isinstance(stream.raw, io.FileIO):  # pyright: ignore[reportAttributeAccessIssue]: opened buffered
            shutil.copyfileobj(stream, file)  # Parquet begins to be read at its end
            stream = file  # pyright: ignore[reportAssignmentType]: it reads as the stream does
        number = 0
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _data_set(source: str) -> Iterator[tuple[str, object]]:
    name, _, configuration = source.partition(":")
    endings = {".txt", *FORMATS, *COMPRESSIONS}
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix.lower() in endings
    if is_path and not Path(name).exists() and not Path(source).exists():
        raise TextError(f"{source}: no such file")  # at once: the hub's client asks again and again
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise TextError(f'{source}: no such file; for data sets, pip install "fermisvd[convert]"') from None
    try:
        if any((Path(name) / saved).exists() for saved in SAVED):
            saved = datasets.load_from_disk(name)
            rows = saved["train"] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}: row {number}", row
    except Exception as error:  # of the hub's client, of the data set's own reader
        reason = f"neither a file nor a data set that can be loaded ({error.__class__.__name__}: {error})"
        offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        remedy = "; it is the default, give a text of your own by --calibration FILE"
        raise TextError(f"{source}: {reason}{offline}{remedy if source == DEFAULT_DATASET else ''}") from None
