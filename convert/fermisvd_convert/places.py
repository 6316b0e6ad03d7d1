"""Folders of our own beside or below what the user names. Nothing else is ever removed: a folder is ours by its exact
name and by a marker file in it, which is written before anything else."""

import os
import shutil
from pathlib import Path

from fermisvd.errors import OutputError

MARKER = "made-by-fermisvd"  # in each folder that may be removed with all that is in it
OURS = ".fermisvd"  # beside OUT: the lock, what is being written, and by default the work directory


def real_path(path: str | Path) -> Path:
    """The path without links; one through a loop of links stays as it is, which pathlib refuses."""
    return Path(os.path.realpath(path))


def make_own(folder: Path) -> Path:
    """An empty folder with the marker; what an earlier run left there is removed.

    Raises OutputError for a folder or file of that name that is not ours, OSError if it cannot be made.
    """
    remove_own(folder)
    return ensure_own(folder)


def ensure_own(folder: Path) -> Path:
    """The folder, made with its marker if it is not there. Raises as `make_own`."""
    check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def remove_own(folder: Path) -> None:
    """Remove a folder of ours with all that is in it, if it is there. Raises OutputError if it is not ours."""
    check_own(folder)
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name != MARKER:  # last, or a kill would leave a folder that nobody owns
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


def check_own(folder: Path) -> None:
    """Raises OutputError for something that is not ours, under a name of ours."""
    if not folder.exists() and not folder.is_symlink():
        return
    empty = folder.is_dir() and not any(folder.iterdir())  # one that a kill left without its marker
    if folder.is_symlink() or not (empty or (folder / MARKER).is_file()):
        raise OutputError(
            f"{folder}: FermiSVD needs this name, and what is there is not its own (no {MARKER}); move it"
        )


def existing(path: Path) -> Path:
    """The path, or what is nearest above it and there."""
    return next(place for place in (path, *path.parents) if place.exists())


def disk_of(path: Path) -> int:
    """Number of the file system that holds the path."""
    return path.stat().st_dev
