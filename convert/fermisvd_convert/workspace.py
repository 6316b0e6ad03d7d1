"""The work directory: every stage's result in a file named by the hash of all that it depends on.

Other settings give another name, so that an unchanged stage is found and skipped. `manifest.jsonl` has a line for each
finished artefact with its hash (each further process has a manifest of its own): what is not in it, or is not what it
says, is made again.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fermisvd.errors import OutputError, reason
from fermisvd.running import distributed
from fermisvd.running.blocks import HiddenStates
from fermisvd.settings import Settings
from fermisvd_convert.places import ensure_own, make_own, remove_own

logger = logging.getLogger("fermisvd")

MANIFEST = "manifest"
SCRATCH = ".fermisvd-scratch"  # what is half-written, and hidden states
METHOD = 4  # raised when the same settings no longer give the same result
PROGRESS, PROGRESS_SECONDS = ".progress", 60
STATE_SECONDS, STATE_PAUSE = 300, 10  # before a stage's tensors are kept; and times as long as that took


def settings_key(*parts: Any) -> str:
    """Short hash of what a stage depends on: JSON-able values, dataclasses and settings of them, and token windows."""
    return hashlib.sha256(json.dumps([METHOD, *parts], sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    if isinstance(value, torch.Tensor):
        return [list(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()]
    return value.model_dump(mode="json") if isinstance(value, Settings) else asdict(value)


def file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: Path, partial: Path, write: Callable[[Path], object]) -> None:
    """Write `partial`, on the same disk, then rename: the file is there whole or not at all.

    Raises OutputError if there is no space, or no permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)}); finished stages are kept") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def only_one(lock: Path, subject: Path) -> Iterator[None]:
    """Hold the lock file while the block runs; the system frees it if the process dies.

    Raises OutputError if another process holds it, or the disk knows no locks.
    """
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise OutputError(f"{subject}: in use by another conversion; wait for it, or choose another") from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(
            f"{subject}: {lock} cannot be locked ({reason(error)}); without a lock two conversions could disturb each "
            "other: choose a folder that can be written to, on a disk that can lock files (a local one)"
        ) from None
    try:
        yield
    finally:
        held.release()


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, which may not be there."""
    return sum(path.stat().st_size for path in folder.glob("*"))


KeepTensors = Callable[[Any, Mapping[str, Mapping[str, torch.Tensor]]], None]


class Workspace:
    """Artefacts of one model's conversions. Where several processes share it, process 0 decides what is found."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._manifest: dict[str, dict[str, int]] = {}  # artefact -> its hashes, bytes of each
        self._checked: set[str] = set()
        self._writing = Lock()  # of the manifest, where several threads keep artefacts
        self.read_manifest()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one converter at a time; what a killed one left half-written is removed. Raises OutputError."""
        if distributed.this_process():
            self.wait_for_all()  # what the first has found
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({reason(error)}); choose another --work") from None
        with only_one(self.folder / ".lock", self.folder):
            make_own(self.scratch)
            try:
                self.read_manifest()  # another may just have finished
                self.wait_for_all()
                yield
            finally:
                remove_own(self.scratch)

    @property
    def scratch(self) -> Path:
        """Removed with all that is in it, before and after a conversion."""
        return self.folder / SCRATCH

    @contextmanager
    def hidden_states(self, room: int, device_room: int = 0) -> Iterator[HiddenStates]:
        """A place for hidden states, empty before and after; see HiddenStates."""
        folder = self.scratch / f"hidden-{distributed.this_process()}"
        make_own(folder)
        try:
            yield HiddenStates(folder, room, device_room)
        finally:
            remove_own(folder)

    def wait_for_all(self) -> None:
        """Wait for the other processes, and learn what they have finished."""
        distributed.wait_for_all()
        if distributed.process_count() > 1:
            self.read_manifest()

    def read_manifest(self) -> None:
        """Learn what other processes have finished. A line that a kill cut off is none."""
        for file in self.folder.glob(f"{MANIFEST}*.jsonl"):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._manifest.setdefault(entry["artefact"], {})[entry["sha256"]] = entry["bytes"]
                except (ValueError, KeyError, TypeError):
                    continue

    def stage(self, kind: str, *depends_on: Any) -> "Stage":
        """The stage of this kind whose result depends on these values, as of `settings_key`."""
        return Stage(self, f"{kind}-{settings_key(*depends_on)}")

    def json(
        self,
        name: str,
        make: Callable[[], Any],
        whole: Callable[[Any], bool] = lambda _: True,
        together: bool = False,
    ) -> Any:
        """The JSON artefact `name`, made and kept if it is not there, not as it was written, or by `whole` lacks its
        tensors. together: all processes make it, with one result; else the first alone."""
        artefact, found = f"{name}.json", None
        if distributed.this_process() == 0 and self._intact(artefact):
            value = json.loads((self.folder / artefact).read_text(encoding="utf-8"))
            found = [value] if whole(value) else None
        if found := distributed.from_first(found):
            self._forget_progress(name)
            return found[0]
        value = make() if together else None
        if distributed.this_process() == 0:
            with distributed.alone():
                value = value if together else make()
            text = json.dumps(value, indent=1)
            self._keep(artefact, lambda p: p.write_text(text, encoding="utf-8"))
            self._forget_progress(name)
            value = json.loads(text)  # keys become strings: the same the first time and later
        return distributed.from_first(value)

    def progress(self, name: str) -> tuple[Any, Callable[[Any], None]]:
        """How far an unfinished stage has come, or None; and what keeps it, once a minute, by process 0."""
        artefact, kept = f"{name}{PROGRESS}.json", time.monotonic()
        found = None
        if distributed.this_process() == 0 and self._intact(artefact):
            found = json.loads((self.folder / artefact).read_text(encoding="utf-8"))

        def keep(value: Any) -> None:
            nonlocal kept
            if distributed.this_process() == 0 and time.monotonic() - kept >= PROGRESS_SECONDS:
                self._keep(artefact, lambda p: p.write_text(json.dumps(value), encoding="utf-8"))
                kept = time.monotonic()

        return distributed.from_first(found), keep

    def tensor_progress(self, name: str) -> tuple[tuple[Any, "KeptTensors"] | None, KeepTensors]:
        """As `progress`, of the first process: a JSON value and sets of tensors by name, replaced as a whole.

        There is one such state at a time, since of a large model two may not fit on the disk: while it is replaced
        there is none. It is kept first after STATE_SECONDS, and so seldom that it takes no more than a part of the
        time.
        """
        artefact, folder = f"{name}{PROGRESS}.json", f"{name}{PROGRESS}"
        due, found = time.monotonic() + STATE_SECONDS, None
        if self._intact(artefact):
            value = json.loads((self.folder / artefact).read_text(encoding="utf-8"))
            tensors = KeptTensors(self, folder, value["names"])
            found = (value["value"], tensors) if all(self.has_tensors(folder, each) for each in tensors) else None

        def keep(value: Any, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
            nonlocal due
            if (begin := time.monotonic()) < due:
                return
            needed = sum(tensor.nbytes for values in tensors.values() for tensor in values.values())
            if needed > shutil.disk_usage(self.folder).free + _size(self.folder / folder):
                logger.warning("%s: no space to keep how far %s has come (%s)", self.folder, name, decimal(needed))
                due = begin + max(STATE_SECONDS, 1)
                return
            (self.folder / artefact).unlink(missing_ok=True)
            ensure_own(self.folder / folder)
            for each, values in tensors.items():
                self.save_tensors(folder, each, dict(values))
            text = json.dumps({"value": value, "names": list(tensors)})
            self._keep(artefact, lambda p: p.write_text(text, encoding="utf-8"))
            due = (end := time.monotonic()) + max(STATE_SECONDS, STATE_PAUSE * (end - begin))

        return found, keep

    def _forget_progress(self, name: str) -> None:
        """Of a stage that is done."""
        if distributed.this_process() == 0:
            (self.folder / f"{name}{PROGRESS}.json").unlink(missing_ok=True)
            remove_own(self.folder / f"{name}{PROGRESS}")

    def has_tensors(self, stage: str, name: str) -> bool:
        return self._intact(self._tensors(stage, name))

    def save_tensors(self, stage: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
        contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        self._keep(self._tensors(stage, name), lambda p: save_file(contiguous, p))

    def load_tensors(self, stage: str, name: str) -> dict[str, torch.Tensor]:
        """Raises OutputError if the artefact is not as it was written."""
        artefact = self._tensors(stage, name)
        if not self._intact(artefact):
            raise OutputError(f"{self.folder / artefact}: changed while the conversion runs; run it again")
        with safe_open(self.folder / artefact, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def _tensors(self, stage: str, name: str) -> str:
        return f"{stage}/{name}.safetensors"

    def _keep(self, artefact: str, write: Callable[[Path], Any]) -> None:
        path = self.folder / artefact
        if path.is_dir():
            raise OutputError(f"{path}: a folder where an artefact goes; remove it")
        ensure_own(self.scratch)
        partial = f"half-{distributed.this_process()}-{artefact.replace('/', ' ')}"  # threads keep several at once
        write_whole(path, self.scratch / partial, write)
        entry = {
            "artefact": artefact,
            "settings": artefact.partition("/")[0].removesuffix(".json").removesuffix(".progress").rpartition("-")[2],
            "sha256": file_hash(path),
            "bytes": path.stat().st_size,
        }
        manifest = self.folder / f"{MANIFEST}{distributed.this_process() or ''}.jsonl"  # each process its own
        try:
            with self._writing, manifest.open("ab") as file:
                file.write(b"\n" + json.dumps(entry).encode() + b"\n")  # first a new line, if a kill cut off the last
        except OSError as error:
            raise OutputError(f"{manifest}: cannot be written ({reason(error)}); finished stages are kept") from None
        self._manifest.setdefault(artefact, {})[entry["sha256"]] = entry["bytes"]
        self._checked.add(artefact)

    def _intact(self, artefact: str) -> bool:
        """Whether the artefact is what the manifest says; its bytes are read once a run."""
        known, path = self._manifest.get(artefact, {}), self.folder / artefact
        try:
            if path.stat().st_size not in known.values():
                return False
            if artefact not in self._checked:
                if file_hash(path) not in known:
                    return False
                self._checked.add(artefact)
            return True
        except OSError:
            return False


@dataclass(frozen=True)
class KeptTensors(Mapping[str, dict[str, torch.Tensor]]):
    """Sets of tensors by name, each read when it is asked for. folder: that they lie in."""

    workspace: Workspace
    folder: str
    names: list[str]

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        return self.workspace.load_tensors(self.folder, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Stage:
    """A step of a conversion whose result is kept: found in the workspace under its name, or made and kept there.

    name: the kind of stage, and the hash of all that its result depends on.
    """

    workspace: Workspace
    name: str

    def json(
        self, make: Callable[[], Any], whole: Callable[[Any], bool] = lambda _: True, together: bool = False
    ) -> Any:
        """Its JSON result; see Workspace.json."""
        return self.workspace.json(self.name, make, whole, together)

    def progress(self) -> tuple[Any, Callable[[Any], None]]:
        """How far it has come, and what keeps that; see Workspace.progress."""
        return self.workspace.progress(self.name)

    def tensor_progress(self) -> tuple[tuple[Any, KeptTensors] | None, KeepTensors]:
        """How far it has come, tensors included; see Workspace.tensor_progress."""
        return self.workspace.tensor_progress(self.name)

    def has(self, tensors: str) -> bool:
        """Whether its tensors of that name are there."""
        return self.workspace.has_tensors(self.name, tensors)

    def save(self, tensors: str, values: dict[str, torch.Tensor]) -> None:
        self.workspace.save_tensors(self.name, tensors, values)

    def load(self, tensors: str) -> dict[str, torch.Tensor]:
        """Raises OutputError if they are not as they were written."""
        return self.workspace.load_tensors(self.name, tensors)

    def bytes_written(self) -> int:
        """Bytes of its tensors that are there."""
        return _size(self.workspace.folder / self.name)
