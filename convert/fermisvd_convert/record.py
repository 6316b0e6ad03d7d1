"""fermisvd.json as the figures read it: what must be in it, and what earlier versions may lack."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError, model_validator

from fermisvd.errors import FermiSVDError

BLOCK_NUMBER = r"\.\d+\."  # model.layers.3.self_attn.q_proj: decoder block 3
LayerName = Annotated[str, Field(pattern=BLOCK_NUMBER)]


class RecordError(FermiSVDError):
    """No fermisvd.json, or one that cannot be read."""


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
    """A group as `group_rows` records it; earlier versions wrote neither kept_energy nor spectrum."""

    members: list[LayerName] = Field(min_length=1)
    form: str
    rank: int
    full_rank: int = Field(gt=0)
    kept_energy: float | None = None
    spectrum: Spectrum | None = None


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


class Record(BaseModel):
    """What the figures read of fermisvd.json."""

    model: str
    model_sha256: str = ""
    settings: dict
    totals: Totals
    groups: list[GroupRow] = Field(min_length=1)
    trace: Trace = Trace()
    perplexity: Perplexity
    bytes: Bytes

    def has_spectra(self) -> bool:
        """Whether every group has its spectrum and its kept energy."""
        return all(group.spectrum is not None and group.kept_energy is not None for group in self.groups)


def read_record(out: Path) -> Record:
    """fermisvd.json of a compressed checkpoint. Raises RecordError naming the file, and the field that is wrong."""
    path = out / "fermisvd.json"
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        reason = f"{error.strerror}; OUT is a folder that `fermisvd convert` wrote"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        reason = f"broken: {error}"
    raise RecordError(f"{path}: {reason}")
