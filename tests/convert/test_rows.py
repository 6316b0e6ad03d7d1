"""Formats and compressions against Python's own modules and pyarrow: every file gives the rows of the plain jsonl."""

import codecs
import csv
import gzip
import io
import json

import pytest
import torch

from fermisvd_convert import rows as rows_module
from fermisvd_convert.chats import RowError
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.rows import CHUNK, TextError, first_bad_byte, rows_of
from fermisvd_convert.text import read_windows, windows_of

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TEXTS = [f'row {i}: café, "quoted"; a\ttab\r\nand a new line 😀\n' for i in range(200)]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def separated(delimiter):
    stream = io.StringIO(newline="")
    lines = csv.writer(stream, delimiter=delimiter)
    lines.writerow(["id", "text"])
    lines.writerows([row["id"], row["text"]] for row in ROWS)
    return stream.getvalue().encode()


def parquet_file():
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), stream, row_group_size=70)
    return stream.getvalue()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FORMATS = {
    ".jsonl": LINES,
    ".JsonL": LINES.replace(b"\n", b"\r\n\r\n"),
    ".ndjson": codecs.BOM_UTF8 + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".JSON": codecs.BOM_UTF8 + json.dumps({"version": "1.0", "tags": ["a"], "data": ROWS}).encode(),
    ".lines.json": LINES,
    ".csv": separated(","),
    ".CSV": codecs.BOM_UTF8 + separated(","),
    ".tsv": separated("\t"),
    ".parquet": parquet_file(),
}
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),  # two members, as pigz and cat write
    ".zst": zstd,
    ".Zst": lambda data: zstd(data[:999]) + zstd(data[999:]),
}


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return load_tokenizer(demo_model)


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "rows.jsonl"
    path.write_bytes(LINES)
    return windows_of(tokenizer, str(path), 32)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_windows(tokenizer, expected, tmp_path, form, compression):
    path = tmp_path / f"rows{form}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[form]))
    assert [row["text"] for _, row in rows_of(str(path))] == TEXTS
    assert torch.equal(windows_of(tokenizer, str(path), 32), expected)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["rows.txt", "README", "code.py", "a.b.md"])
def test_what_is_unknown_is_text(tmp_path, name, compression):
    path, text = tmp_path / (name + compression), "".join(TEXTS)
    for mark in (b"", codecs.BOM_UTF8):
        path.write_bytes(COMPRESSIONS[compression](mark + text.encode()))
        assert [row for _, row in rows_of(str(path))] == [{"text": text}]
        assert [row for _, row in rows_of(str(path), 50)] == [{"text": text[:50]}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", FORMATS[".parquet"], "not text but Parquet; its name must end in .parquet"),
        ("a.jsonl", FORMATS[".parquet"], "not text but Parquet"),
        ("a.jsonl", gzip.compress(LINES), "not text but gzip; its name must end in .gz"),
        ("a.unknown", zstd(LINES), "not text but zstd; its name must end in .zst"),
        ("a.txt.gz", gzip.compress(gzip.compress(LINES)), "not text but gzip"),
        ("a.docx", b"PK\x03\x04" + bytes(20), "not text but a zip archive; unpack it first"),
        ("a.txt.xz", b"\xfd7zXZ\0" + bytes(20), "not text but xz"),
        ("a.pdf", b"%PDF-1.7 ...", "not text but a PDF document"),
        ("a.txt", "text".encode("utf-16"), "not text but UTF-16 text; save it as UTF-8 first"),
        ("a.csv", b"text\na\0b\n", r"not text but binary data \(a null byte at byte 6\)"),
        ("a.csv", b"id,text,text\n1,a,b\n", "not readable as CSV .two columns of one name: id, text, text"),
        ("a.csv", b'text\n"an open quote\n', "not readable as CSV .unexpected end of data"),
        ("a.parquet", LINES, "not readable as Parquet"),
        ("a.parquet", FORMATS[".parquet"][:-9], "not readable as Parquet"),
        ("a.csv.gz", b"text\nabc\n", "not readable as CSV in gzip .Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "not readable as JSON lines in gzip .Compressed file ended"),
        ("a.jsonl.zst", zstd(LINES)[:-20], "not readable as JSON lines in zstd .Truncated"),
        ("a.parquet.gz", gzip.compress(FORMATS[".parquet"])[:-20], "not readable as Parquet in gzip"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "not readable as JSON .Expecting value"),
        ("a.json", b'[{"text": "a"}', "not readable as JSON .the array does not end"),
        ("a.json", b'{"text": "a"}]', "not readable as JSON"),
        ("a.json", b"[" * 100_000, "not readable as JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "caf\xe9"}'), "not UTF-8 text .invalid continuation byte at byte 13"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(TextError, match=f"{name}: {message}"):
        list(rows_of(str(path)))


@pytest.mark.parametrize(
    ("name", "data", "bad"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text"\n{"text": "two"}\n', "line 2"),
        ("a.jsonl", b'{"text": "one"}\n' + b"[" * 100_000 + b'\n{"text": "two"}\n', "line 2"),
        ("a.csv", b"n,text\n1,one\n2,2,2\n3,two\n", "line 3"),
    ],
)
def test_a_row_that_cannot_be_read_stands_alone(tmp_path, name, data, bad):
    path = tmp_path / name
    path.write_bytes(data)
    (_, first), (where, second), (_, third) = rows_of(str(path))
    assert (first["text"], third["text"]) == ("one", "two")
    assert where.endswith(bad) and isinstance(second, RowError)


def test_json_is_read_a_value_at_a_time(tmp_path):
    """Values longer than a chunk, numbers that a chunk's end cuts in two, rows that follow each other."""
    values = [123456789, {"text": "x" * (3 * CHUNK)}, [1, [2]], "a ] b", None, *range(CHUNK // 4)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(values, indent=indent))
        assert [row for _, row in rows_of(str(path))] == values
    path.write_text('{"text": "a"}\n\n{"text":\n"b"} {"text": "c"}')
    assert [row["text"] for _, row in rows_of(str(path))] == ["a", "b", "c"]


def test_rows_are_streamed(tokenizer, tmp_path, monkeypatch):
    """What is behind the rows that are needed is not read: it would end the run."""
    for name, data in (
        ("a.jsonl", LINES + b"\xff"),
        ("a.json", b"[" + b",".join(json.dumps(row).encode() for row in ROWS * 9) + b"\xff"),
        ("a.csv", FORMATS[".csv"] * 9 + b"\xff"),
        ("a.jsonl.gz", gzip.compress(LINES * 9)[:-20]),
        ("a.jsonl.zst", zstd(LINES * 99)[:-20]),
    ):
        (tmp_path / name).write_bytes(data)
        read = read_windows(tokenizer, str(tmp_path / name), 32, 3)
        assert read.rows.used < 10, name


def test_one_long_row_is_not_tokenised_whole(tokenizer, tmp_path, monkeypatch):
    path, text = tmp_path / "long.jsonl", "def f(x):\n    return x + 1\n" * 100_000
    path.write_text(json.dumps({"text": text}))
    seen = []
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, _call=type(tokenizer).__call__, **options: (
            seen.append(len(text)) or _call(self, text, **options)
        ),
    )
    windows = windows_of(tokenizer, str(path), 32, 5)
    assert max(seen) <= 16 * 32 * 5
    assert windows.flatten().tolist() == tokenizer(text[:4000], add_special_tokens=False)["input_ids"][: 32 * 5]


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match=r'a\.jsonl\.zst: to read it, pip install "fermisvd\[convert\]"'):
        list(rows_of(str(path)))


def test_the_default_text_that_cannot_be_loaded_names_the_remedy(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def no_hub(*args, **kwargs):
        raise RuntimeError("no hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    for offline, said in ((True, "HF_HUB_OFFLINE is set; "), (False, "")):
        monkeypatch.setattr(rows_module.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(TextError) as error:
            list(rows_of(rows_module.DEFAULT_DATASET))
        assert str(error.value).endswith(
            f"(RuntimeError: no hub); {said}it is the default, give a text of your own by --calibration FILE"
        )


def test_first_bad_byte_counts_from_the_files_beginning(tmp_path):
    """Reference: Python's decoder on the whole file."""
    for name, pack in (("text", bytes), ("text.gz", gzip.compress)):
        path = tmp_path / name
        for good, bad in (
            ("é" * 700_000, b"\xe9"),
            ("a", b"\xc3"),
            ("é" * 524_287 + "a", "é".encode()[:1] + b"x"),
            ("", b"\xff"),
        ):
            data = good.encode() + bad
            path.write_bytes(pack(data))
            with pytest.raises(UnicodeDecodeError) as error:
                data.decode()
            assert first_bad_byte(path) == error.value.start
        path.write_bytes(pack(("é" * 700_000).encode()))
        assert first_bad_byte(path) is None
