"""The record of a conversion, fermisvd.json: written, read and checked by one model.

What an earlier version did not write has a default here.
"""

import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fermisvd.budget import RankedGroup
from fermisvd.errors import FormatError
from fermisvd.grids import grids_of
from fermisvd.groups import LinearGroup, Side

NAME = "fermisvd.json"
BLOCK_NUMBER = r"\.\d+\."  # model.layers.3.self_attn.q_proj: decoder block 3
LayerName = Annotated[str, Field(pattern=BLOCK_NUMBER)]
SPECTRUM_POINTS = 64
LIBRARIES = ("fermisvd", "torch", "transformers", "safetensors", "scipy")


class Spectrum(BaseModel):
    """sigma[i] is the singular value of index[i]."""

    index: list[int] = Field(min_length=1)
    sigma: list[float]

    @model_validator(mode="after")
    def _same_length(self):
        if len(self.index) != len(self.sigma):
            raise ValueError(f"{len(self.index)} indices of {len(self.sigma)} singular values")
        return self


class GroupRow(BaseModel):
    """A group as it is stored; schemes: the grid of each factor that lies on one; kept_energy: sum_{j<r} sigma_j^2 /
    sum_j sigma_j^2."""

    members: list[str] = Field(min_length=1)
    form: str
    side: Side | None = None
    rank: int
    full_rank: int = Field(gt=0)
    parameters_before: int = 0
    parameters_after: int = 0
    schemes: dict[str, str] | None = None
    kept_energy: float | None = None
    spectrum: Spectrum | None = None


class RecordedGroup(GroupRow):
    """One whose layers' names say in which block they are."""

    members: list[LayerName] = Field(min_length=1)


class TraceStep(BaseModel):
    """A FermiGrad step: KL in nats a token, kept fraction of the parameters, mu/k of each group."""

    step: int
    kl: float
    kept: float
    share: list[float]


class Trace(BaseModel):
    """groups: first members, in the order of each step's `share`."""

    groups: list[LayerName] = []
    steps: list[TraceStep] = []

    @model_validator(mode="after")
    def _one_share_a_group(self):
        if any(len(step.share) != len(self.groups) for step in self.steps):
            raise ValueError(f"a step's shares are not those of {len(self.groups)} groups")
        return self


class Totals(BaseModel):
    """Parameters of the compressible layers."""

    parameters_before: int = 0
    parameters_after: int = 0
    removed: float


class Perplexity(BaseModel):
    """On `tokens` held-back tokens of the calibration text."""

    before: float
    after: float
    tokens: int


class Bytes(BaseModel):
    """Size of the weight files."""

    before: int
    after: int


class TextRows(BaseModel):
    """What became of a calibration text's rows."""

    name: str
    used: int = 0
    skipped: int = 0
    refused: int = 0


class TextRecord(BaseModel):
    """beginning: of the first window that is calibrated on."""

    sources: list[TextRows] = []
    beginning: str = ""


class LeftOut(BaseModel):
    """What of MODEL is not in OUT: tensors that are no parameters, files that are no part of a checkpoint."""

    tensors: list[str] = []
    files: list[str] = []


class Record(BaseModel):
    """What a conversion did: fermisvd.json.

    settings: the recorded options by name; left_dense: matrices in no group and their parameters; why_dense: why, of
    those that every token passes; choices: records of what was decided by measurement; files: of the checkpoint, this
    one included; seconds: not written, so that the same settings give the same files however long it took.
    """

    model_config = ConfigDict(protected_namespaces=())

    model: str
    revision: str | None = None
    model_sha256: str = ""
    settings: dict[str, Any]
    calibration_text: TextRecord = TextRecord()
    totals: Totals
    groups: list[RecordedGroup] = Field(min_length=1)
    left_dense: dict[str, int] = {}
    why_dense: dict[str, str] = {}
    left_out: LeftOut = LeftOut()
    versions: dict[str, str] = {}
    trace: Trace = Trace()
    choices: dict[str, list[dict[str, Any]]] = {}
    healing: dict[str, Any] | None = None
    perplexity: Perplexity
    bytes: Bytes
    files: list[str] = []
    seconds: dict[str, float] = Field(default={}, exclude=True)

    def has_spectra(self) -> bool:
        """Whether every group has its spectrum and its kept energy."""
        return all(group.spectrum is not None and group.kept_energy is not None for group in self.groups)

    def write(self, folder: Path) -> None:
        """Into a checkpoint's folder."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=False), indent=1)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_record(out: Path) -> Record:
    """fermisvd.json of a compressed checkpoint. Raises FormatError naming the file, and the field that is wrong."""
    path = out / NAME
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        reason = f"{error.strerror}; OUT is a folder that `fermisvd convert` wrote"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        reason = f"broken: {error}"
    raise FormatError(f"{path}: {reason}")


def check_readable(folder: Path) -> None:
    """Raises FormatError if the folder's fermisvd.json is no JSON object; one that is not there is no fault."""
    _values(folder)


def list_files_anew(folder: Path, files: Sequence[str]) -> None:
    """Put these files into the folder's fermisvd.json, if there is one; the rest of it stays as it is."""
    if values := _values(folder):
        values["files"] = list(files)
        (folder / NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _values(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: broken: {error}") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: broken: not a JSON object")
    return values


def group_rows(ranked: Sequence[RankedGroup], sigma_of: Callable[[LinearGroup], torch.Tensor]) -> list[RecordedGroup]:
    """A row a group. sigma_of: gives a group's singular values, (k,) descending."""
    return [group_row(each, sigma_of(each.group).double().numpy()) for each in ranked]


def group_row(ranked: RankedGroup, sigma: np.ndarray) -> RecordedGroup:
    """sigma: (k,) descending."""
    group, form = ranked.group, "dense" if ranked.stays_dense else ranked.form
    return RecordedGroup(
        members=list(group.members),
        form=form,
        side=group.side,
        rank=ranked.rank,
        full_rank=group.full_rank,
        parameters_before=group.dense_parameters,
        parameters_after=ranked.parameters,
        schemes=grids_of(ranked),
        kept_energy=1.0 if ranked.stays_dense else kept_energy(sigma, ranked.rank),
        spectrum=Spectrum(**decimated(sigma)),
    )


def kept_energy(sigma: np.ndarray, rank: int) -> float:
    """sum_{j<r} sigma_j^2 / sum_j sigma_j^2; 1 where there is none to lose. sigma: (k,)."""
    squared = sigma**2
    return float(squared[:rank].sum() / squared.sum()) if squared.any() else 1.0


def decimated(sigma: np.ndarray) -> dict:
    """At most SPECTRUM_POINTS singular values, to five digits, and their indices: {"index": [...], "sigma": [...]}.

    sigma: (k,). Half of the indices are evenly spaced and half geometrically, as a spectrum falls fastest at its head.
    """
    last, half = len(sigma) - 1, SPECTRUM_POINTS // 2
    spread = np.concatenate([np.linspace(0, last, half), np.geomspace(1, last + 1, half) - 1])
    index = np.unique(spread.round().astype(int))
    return {"index": index.tolist(), "sigma": [float(f"{value:.5g}") for value in sigma[index]]}


def totals(rows: Sequence[GroupRow]) -> Totals:
    before, after = sum(row.parameters_before for row in rows), sum(row.parameters_after for row in rows)
    removed = (before - after) / before if before else 0.0
    return Totals(parameters_before=before, parameters_after=after, removed=removed)


def versions() -> dict[str, str]:
    """Of what computed it."""
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
