"""Records that are filled cell by cell, by runs that may go on beside each other.

A cell's name is METHOD, or METHOD | REMOVE for what was made with a fraction removed.
"""

import fcntl
import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import records


def kept(name: str) -> dict | None:
    """The record of that name, if there is one."""
    path = records.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def begin(name: str, fresh: dict, forget: Iterable[str] = ()) -> None:
    """See that there is a record like the empty one of today, without the cells to forget. Raises SystemExit for one of
    another protocol or other versions."""
    with locked(name):
        record = kept(name) or fresh
        if not same_protocol(record, fresh):
            raise SystemExit(f"results/{name}.json is of another protocol or other versions; move it away")
        for key in forget:
            record["cells"].pop(key, None)
        records.write_record(name, record)


def put(name: str, fresh: dict, key: str, cell: dict) -> None:
    """Add a cell to a record. fresh: an empty one of today. Raises SystemExit where the record is no longer of its
    protocol and versions."""
    with locked(name):
        record = kept(name)
        if record is None or not same_protocol(record, fresh):
            raise SystemExit(f"results/{name}.json has become one of another protocol; {key} is not written")
        record["cells"][key] = cell | {"date": time.strftime("%F"), "commit": records.commit()}
        records.write_record(name, record)


def same_protocol(one: dict, other: dict) -> bool:
    return all(one[key] == other[key] for key in ("protocol", "versions"))


@contextmanager
def locked(name: str) -> Iterator[None]:
    """A record for one run at a time."""
    with (Path(tempfile.gettempdir()) / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def method_of(key: str) -> str:
    return key.partition(" | ")[0]


def removal_of(key: str) -> float | None:
    _, _, remove = key.partition(" | ")
    return float(remove) if remove else None


def folder_of(key: str) -> str:
    """A cell's name as one of a folder: words and numbers with hyphens between."""
    return re.sub(r"[^a-z0-9.]+", "-", key.lower()).strip("-")
