"""OUT appears whole or not at all: it is made on its own disk, in a folder of ours, and moved into place at the end.

`OURS/NAME.new/checkpoint` is what is being written; with the file `finished` beside it, it only waits to be moved, and
the next conversion to the same OUT moves it if this one could not. `OURS/NAME.old/checkpoint` is an earlier OUT while
it is replaced. OURS is the folder .fermisvd beside OUT; inside OUT where that is a mount point, or where nothing can be
written beside it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fermisvd import distributed
from fermisvd.errors import FermiSVDError, reason
from fermisvd.format import FormatError, read_config
from fermisvd_convert.places import OURS, ensure_own, make_own, remove_own
from fermisvd_convert.workspace import only_one

CHECKPOINT, FINISHED, KEPT, MOVED = "checkpoint", "finished", "kept", "moved"
NOT_CONTENT = {OURS, "lost+found"}  # an otherwise empty OUT may hold these
CONFIG = "config.json"  # moved in last and away first: without it there is no model


class OutputError(FermiSVDError):
    """OUT cannot be written there."""


@dataclass(frozen=True)
class Places:
    """Where OUT is made. inside: OUT is there and its entries are moved one by one, else it is renamed as a whole."""

    out: Path
    inside: bool

    @property
    def ours(self) -> Path:
        return (self.out if self.inside else self.out.parent) / OURS

    @property
    def lock(self) -> Path:
        return self.ours / f"{self.out.name}.lock"

    @property
    def new(self) -> Path:
        return self.ours / f"{self.out.name}.new"

    @property
    def old(self) -> Path:
        return self.ours / f"{self.out.name}.old"


def places(out: Path) -> Places:
    """By what is there now; the same while a conversion runs."""
    inside = out.is_dir() and (os.path.ismount(out) or not writable(out.parent) or (out / OURS).exists())
    return Places(out, inside)


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder that is there."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def check_free(out: Path, remedy: str, overwrite: bool = False) -> None:
    """Raises OutputError unless OUT is not there, an empty folder, or an earlier checkpoint of ours to be replaced."""
    if not os.path.lexists(out) or (out.is_dir() and not _entries(out)):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists; {remedy}")
    try:
        read_config(out)
    except FormatError:
        raise OutputError(f"{out}: --overwrite replaces FermiSVD checkpoints only, and this is none") from None


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """OUT for this conversion alone. What a killed one left is removed; a checkpoint that it had finished is put into
    its place.

    Raises WorkspaceError if another conversion has claimed OUT, OutputError if there can be no folder.
    """
    if distributed.rank():
        yield
        return
    place = places(out)
    try:
        place.ours.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({reason(error)})") from None
    with only_one(place.lock, out):
        if (place.new / FINISHED).exists():
            _put_into_place(place)
        remove_own(place.new)
        remove_own(place.old)
        yield
        if place.inside and not place.new.exists():
            place.lock.unlink(missing_ok=True)
            with suppress(OSError):
                place.ours.rmdir()


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """An empty folder, to be moved to a claimed OUT by `move_into_place`; gone afterwards, unless it is to be kept.

    What goes wrong in it is told of OUT. Raises OutputError if there is no space or no permission.
    """
    place = places(out)
    folder = place.new / CHECKPOINT
    try:
        make_own(place.new)
        folder.mkdir()
        yield folder
    except (OSError, SafetensorError) as error:
        said = reason(error).replace(str(folder), str(out))
        raise OutputError(
            f"{out}: cannot be written ({said}); it is left as it was, finished stages are kept"
        ) from None
    except FermiSVDError as error:
        if str(folder) not in str(error) or (place.new / KEPT).exists():
            raise
        raise type(error)(str(error).replace(str(folder), str(out))) from error
    finally:
        if place.new.exists() and not (place.new / KEPT).exists():
            remove_own(place.new)


@contextmanager
def complete(out: Path) -> Iterator[None]:
    """Around what follows when all weights are written: if it fails, they stay, and the error says where.

    Raises OutputError.
    """
    place = places(out)
    try:
        yield
    except Exception as error:
        folder = place.new / CHECKPOINT
        with suppress(OSError):
            (place.new / KEPT).touch()
        said = reason(error).replace(str(folder), str(out))
        when = "is moved there by" if (place.new / FINISHED).exists() else "stays there until"
        raise OutputError(
            f"{out}: {said}; the checkpoint itself is whole, in {folder}, and {when} the next conversion to OUT"
        ) from error


def move_into_place(out: Path, overwrite: bool) -> None:
    """The finished folder to its name, an earlier checkpoint of that name out of the way first.

    Raises OutputError if there is something that is not to be overwritten.
    """
    place = places(out)
    if out.exists() and _entries(out) and not overwrite:
        raise OutputError(f"{out}: was made by another while the conversion ran; choose another OUT")
    (place.new / FINISHED).touch()
    _put_into_place(place)


def _put_into_place(place: Places) -> None:
    """Goes on wherever an earlier run was stopped in it. Raises OutputError."""
    new, old = place.new / CHECKPOINT, place.old / CHECKPOINT
    try:
        if not (place.old / MOVED).exists():
            ensure_own(place.old)
            if place.out.exists() and _entries(place.out):
                _move(place, place.out, old)
            (place.old / MOVED).touch()
        if new.exists():
            _move(place, new, place.out)
    except OSError as error:
        if old.exists() and not os.path.lexists(place.out):  # renamed as a whole
            with suppress(OSError):
                old.rename(place.out)
                (place.old / MOVED).unlink()
        raise OutputError(f"{place.out}: cannot be put into place ({reason(error)})") from error
    remove_own(place.new)
    remove_own(place.old)


def _move(place: Places, source: Path, target: Path) -> None:
    """A checkpoint's folder to another place on the same disk."""
    if not place.inside:
        source.rename(target)  # also onto an empty folder
        return
    target.mkdir(exist_ok=True)
    names = sorted(_entries(source), key=lambda name: (name == CONFIG) == (target == place.out))
    for name in names:
        (source / name).rename(target / name)


def _entries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name not in NOT_CONTENT]
