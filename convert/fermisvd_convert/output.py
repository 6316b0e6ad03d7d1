"""OUT appears whole or not at all: it is made on its own disk, in a folder of ours, and moved into place at the end.

`new/checkpoint` is what is being written; with the file `finished` beside it, it only waits to be moved, and the next
conversion to the same OUT moves it if this one could not. `old/checkpoint` is an earlier OUT while it is replaced.
Where OUT is not there yet, both are in .fermisvd beside it, and the checkpoint is renamed. Where it is a folder, be it
a mount point, somebody's working directory or one with permissions of its own, both are in .fermisvd inside, and files
are moved one by one, config.json last: without it there is no model. `work` is where `fermisvd heal` keeps how far it
has come, until OUT is in its place.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fermisvd.errors import FermiSVDError, FormatError, OutputError, reason
from fermisvd.format import read_config
from fermisvd.running import distributed
from fermisvd_convert.places import OURS, ensure_own, make_own, remove_own
from fermisvd_convert.workspace import only_one

logger = logging.getLogger("fermisvd")

CHECKPOINT, FINISHED, KEPT, MOVED = "checkpoint", "finished", "kept", "moved"
NOT_CONTENT = {OURS, "lost+found"}  # an otherwise empty OUT may hold these
CONFIG, RECORD = "config.json", "fermisvd.json"


@dataclass(frozen=True)
class Place:
    """Where OUT is made. inside: OUT is there, and files are moved one by one; else it is renamed as a whole."""

    out: Path
    inside: bool

    @property
    def ours(self) -> Path:
        return (self.out if self.inside else self.out.parent) / OURS

    def _named(self, kind: str) -> Path:
        return self.ours / (kind if self.inside else f"{self.out.name}.{kind}")

    @property
    def lock(self) -> Path:
        return self._named("lock")

    @property
    def new(self) -> Path:
        return self._named("new")

    @property
    def old(self) -> Path:
        return self._named("old")

    @property
    def work(self) -> Path:
        """How far `fermisvd heal` has come, for the next run to the same OUT."""
        return self._named("work")

    @property
    def checkpoint(self) -> Path:
        """The folder that is being written."""
        return self.new / CHECKPOINT


def place_of(out: Path) -> Place:
    """Where an OUT is made, by what is there now."""
    return Place(out, out.is_dir())


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder that is there."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def check_free(out: Path, remedy: str, overwrite: bool = False) -> None:
    """Raises OutputError unless OUT is not there, an empty folder, or an earlier checkpoint of ours, and nothing else,
    that is to be replaced."""
    if not os.path.lexists(out) or (out.is_dir() and not _entries(out)):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists; {remedy}")
    try:
        read_config(out)
    except FormatError:
        raise OutputError(f"{out}: --overwrite replaces FermiSVD checkpoints only, and this is none") from None
    if strangers := sorted(files_of(out) - recorded_files(out)):
        raise OutputError(
            f"{out}: --overwrite would remove {strangers[0]}, which is not the checkpoint's; move it away, or choose "
            "another OUT"
        )


def files_of(folder: Path) -> set[str]:
    """All files of a checkpoint's folder, relative to it; not what is in a folder of ours."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path.as_posix() for path in found if path.parts[0] not in NOT_CONTENT}


def list_files(folder: Path) -> list[str]:
    """The files of a checkpoint for its fermisvd.json, which is one of them."""
    return sorted(files_of(folder) | {RECORD})


def recorded_files(out: Path) -> set[str]:
    """The files that a checkpoint was written with; of one that has no list, those not in nested folders."""
    try:
        return set(json.loads((out / RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return {name for name in files_of(out) if "/" not in name}


@contextmanager
def claimed(out: Path) -> Iterator[Place]:
    """OUT for this conversion alone. What a killed one left is removed; a checkpoint that it had finished is put into
    its place, and one that it had moved away is put back.

    Raises OutputError if another conversion has claimed OUT, or if there can be no folder.
    """
    place = place_of(out)
    if distributed.this_process():
        yield place
        return
    made = [folder for folder in (place.ours, *place.ours.parents) if not folder.exists()]
    try:
        place.ours.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({reason(error)})") from None
    with only_one(place.lock, out):
        try:
            for left in (Place(out, inside=False), place):  # the folder may have been made after a kill
                _settle(left)
            yield place_of(out)
        finally:
            inside = Place(out, inside=True)
            if not inside.new.exists() and not inside.work.exists():
                with suppress(OSError):
                    inside.lock.unlink(missing_ok=True)
                    inside.ours.rmdir()
            with suppress(OSError):  # a conversion that was refused leaves no folders on the way to OUT
                for folder in made if not out.exists() else []:
                    if folder == place.ours:
                        place.lock.unlink(missing_ok=True)
                    folder.rmdir()


def _settle(place: Place) -> None:
    """What a killed conversion left."""
    if (place.new / FINISHED).exists():
        if not (place.old / CHECKPOINT).exists() and not (place.old / MOVED).exists():
            check_free(place.out, f"move it away: {place.checkpoint} waits to be put there", overwrite=True)
        _put_into_place(place)
        logger.warning("%s: an earlier conversion had finished it; it is in its place now", place.out)
    elif (place.old / CHECKPOINT).exists() and not (place.out / CONFIG).exists():
        _move(place, place.old / CHECKPOINT, place.out)
    remove_own(place.new)
    remove_own(place.old)


@contextmanager
def unfinished(place: Place) -> Iterator[Path]:
    """An empty folder, to be moved to a claimed OUT by `move_into_place`; gone afterwards, unless it is to be kept.

    All processes may write into it; the first makes, moves and removes it. What goes wrong in it is told of OUT. Raises
    OutputError if there is no space or no permission.
    """
    out, folder, first = str(place.out), str(place.checkpoint), distributed.this_process() == 0
    try:
        if first:
            make_own(place.new)
            place.checkpoint.mkdir()
        distributed.wait_for_all()
        yield place.checkpoint
    except (OSError, SafetensorError) as error:
        if not first and not place.checkpoint.exists():
            raise OutputError(f"{out}: the first process has ended, see its message") from None
        said = reason(error).replace(folder, out)
        raise OutputError(
            f"{out}: cannot be written ({said}); it is left as it was, finished stages are kept"
        ) from None
    except FermiSVDError as error:
        if folder not in str(error) or (place.new / KEPT).exists():
            raise
        raise type(error)(str(error).replace(folder, out)) from error
    finally:
        if first and not (place.new / KEPT).exists() and not (place.new / FINISHED).exists():
            with suppress(OSError):  # another process may still write there: the next conversion removes it
                remove_own(place.new)


@contextmanager
def complete(place: Place) -> Iterator[None]:
    """Around what follows when all weights are written: if it fails, they stay, and the error says where.

    Raises OutputError.
    """
    try:
        yield
    except Exception as error:
        with suppress(OSError):
            (place.new / KEPT).touch()
        finished = (place.new / FINISHED).exists()
        said = reason(error).removeprefix(f"{place.out}: ")
        said = said if finished else said.replace(str(place.checkpoint), str(place.out))
        when = "is moved there by" if finished else "stays there until"
        raise OutputError(
            f"{place.out}: {said}; the checkpoint itself is whole, in {place.checkpoint}, and {when} the next "
            "conversion to OUT"
        ) from error


def move_into_place(place: Place, overwrite: bool) -> None:
    """The finished folder to its name, an earlier checkpoint of that name out of the way first.

    Raises OutputError if there is something that is not to be overwritten.
    """
    if os.path.lexists(place.out) and not overwrite and (not place.out.is_dir() or _entries(place.out)):
        raise OutputError(f"{place.out}: was made by another while the conversion ran; choose another OUT")
    (place.new / FINISHED).touch()
    _put_into_place(place)


def _put_into_place(place: Place) -> None:
    """Goes on wherever an earlier run was stopped in it. Raises OutputError."""
    old = place.old / CHECKPOINT
    try:
        if not (place.old / MOVED).exists():
            ensure_own(place.old)
            if place.out.exists() and _entries(place.out):
                _move(place, place.out, old)
            (place.old / MOVED).touch()
        if place.checkpoint.exists():
            _move(place, place.checkpoint, place.out)
    except OSError as error:
        if old.exists() and not os.path.lexists(place.out):  # renamed as a whole
            with suppress(OSError):
                old.rename(place.out)
                (place.old / MOVED).unlink()
        raise OutputError(f"{place.out}: cannot be put into place ({reason(error)})") from error
    remove_own(place.work)
    remove_own(place.new)
    remove_own(place.old)


def _move(place: Place, source: Path, target: Path) -> None:
    """A checkpoint's folder to another place on the same disk."""
    if not place.inside:
        source.rename(target)
        return
    target.mkdir(exist_ok=True)
    for name in sorted(_entries(source), key=lambda name: (name == CONFIG) == (target == place.out)):
        (source / name).rename(target / name)


def _entries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name not in NOT_CONTENT]
