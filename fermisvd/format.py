"""Checkpoint format 1: the config's schema, tensor names, and the checks a reader makes before it computes.

docs/format.md describes the folder. Every check raises FormatError, which names the file, the tensor or the option.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open

from fermisvd.errors import FormatError, reason
from fermisvd.files import COPY, MEND, TensorInfo, check_alone, read_headers

QUANT_METHOD = "fermisvd"
FORMAT_VERSION = 1

LOWRANK_A, LOWRANK_B = "lowrank_a", "lowrank_b"
SKELETON, INTERPOLATION, PERMUTATION = "skeleton", "interpolation", "permutation"
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


class Group(BaseModel):
    """One group of the config: members share B, or D and the permutation; see fermisvd.groups.LinearGroup."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: tuple[str, ...] = Field(min_length=1)
    form: Literal["svd", "pivga"]
    side: Literal["columns", "rows"] | None = None
    rank: int = Field(ge=1, strict=True)

    @model_validator(mode="after")
    def _consistent(self) -> "Group":
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"group {self.members[0]} lists a member twice")
        if (self.form == "pivga") != (self.side is not None):
            raise ValueError(f"group {self.members[0]}: a side belongs to the pivga form, and only to it")
        if self.side == "rows" and len(self.members) > 1:
            raise ValueError(f"group {self.members[0]}: rows side takes one member, it has {len(self.members)}")
        return self

    @property
    def name(self) -> str:
        return self.members[0]


class CheckpointConfig(BaseModel):
    """The `quantization_config` entry of config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["fermisvd"] = QUANT_METHOD
    format_version: Literal[1] = FORMAT_VERSION
    groups: tuple[Group, ...]
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _dense_tensors_are_names(self) -> "CheckpointConfig":
        names = self.provenance.get("dense_tensors", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("provenance.dense_tensors is no list of names")
        return self

    @model_validator(mode="after")
    def _no_overlap(self) -> "CheckpointConfig":
        seen: set[str] = set()
        for member in (m for group in self.groups for m in group.members):
            if member in seen:
                raise ValueError(f"{member} is a member of two groups")
            seen.add(member)
        return self

    def group_of(self) -> dict[str, Group]:
        """Member name -> its group."""
        return {member: group for group in self.groups for member in group.members}


def parse_config(values: Mapping[str, Any], where: str = "config.json: quantization_config") -> CheckpointConfig:
    """Validated config. Raises FormatError naming `where` and every field that is off."""
    version = values.get("format_version")
    if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
        raise FormatError(
            f"{where}: format_version is {version!r}, this FermiSVD reads {FORMAT_VERSION}; "
            "install the version that wrote it"
        )
    try:
        return CheckpointConfig.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'groups'}: {e['msg']}" for e in error.errors()[:5])
        raise FormatError(f"{where}: {problems}; convert again") from None


def quantization_method(folder: Path) -> str | None:
    """quant_method of a folder's config.json, "fermisvd" for a compressed checkpoint; None for a dense model, or where
    there is no config that can be read."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        entry = values.get("quantization_config") or values.get("compression_config")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    return str(method or "quantized") if entry else None


def read_config(folder: Path) -> CheckpointConfig:
    """The FermiSVD entry of a folder's config.json. Raises FormatError if there is none."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise FormatError(f"{folder}: no folder; give the folder of a compressed checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: {reason(error)}; {COPY}") from None
    entry = values.get("quantization_config") if isinstance(values, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{path}: no quantization_config with quant_method {QUANT_METHOD!r}; "
            "not a FermiSVD checkpoint, convert a dense one"
        )
    return parse_config(entry, str(path))


def expected_tensors(group: Group, member_rows: Sequence[int], columns: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a group whose members are (m_i x n) matrices (docs/format.md).

    Raises FormatError if the rank exceeds the matrix.
    """
    rows, rank = sum(member_rows), group.rank
    if rank > min(rows, columns):
        raise FormatError(
            f"group {group.name}: rank {rank} is larger than the matrix, {rows} x {columns}; "
            "correct config.json or convert again"
        )
    if group.form == "svd":
        shared = {LOWRANK_B: (rank, columns)}
        each = {LOWRANK_A: rank}
    elif group.side == "columns":
        shared = {INTERPOLATION: (rank, columns - rank), PERMUTATION: (columns,)}
        each = {SKELETON: rank}
    else:
        shared = {SKELETON: (rank, columns), INTERPOLATION: (rows - rank, rank), PERMUTATION: (rows,)}
        each = {}
    tensors = {f"{group.name}.{name}": shape for name, shape in shared.items()}
    for member, m in zip(group.members, member_rows, strict=True):
        tensors |= {f"{member}.{name}": (m, width) for name, width in each.items()}
    return tensors


def check_permutation(name: str, permutation: torch.Tensor) -> None:
    """Raises FormatError unless each of 0..n-1 is there once: a GPU gather with others reads foreign memory."""
    n = permutation.numel()
    if not np.array_equal(np.sort(permutation.cpu().numpy(), axis=None), np.arange(n)):
        raise FormatError(
            f"{name}: not a permutation of 0..{n - 1}, an index is out of range or repeated; convert again"
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises FormatError if a floating-point tensor holds NaN or infinity."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise FormatError(f"{name}: holds NaN or infinite values; {MEND}")


def validate_checkpoint(folder: Path) -> CheckpointConfig:
    """The config of a folder all of whose tensors are what it says: names, shapes, types, permutations, finite values.

    Reads every tensor once. Raises FormatError otherwise.
    """
    config, headers = read_checkpoint(folder)
    check_values(headers)
    return config


def read_checkpoint(folder: Path) -> tuple[CheckpointConfig, dict[str, TensorInfo]]:
    """Config and headers of a compressed checkpoint, checked against each other; its folder holds no other weights.

    Raises FormatError naming file, tensor and remedy.
    """
    folder = Path(folder)
    config, headers = read_config(folder), read_headers(folder)
    check_alone(folder, sorted({info.file for info in headers.values()}))
    check_headers(config, headers, folder)
    return config, headers


def validate_before_serving(folder: Path) -> None:
    """All of validate_checkpoint but the values of the groups' factors, which a server checks as it loads them.

    Raises FormatError naming file, tensor and remedy.
    """
    config, headers = read_checkpoint(folder)
    factors = {f"{m}.{name}" for m in config.group_of() for name in (LOWRANK_A, LOWRANK_B, SKELETON, INTERPOLATION)}
    check_values({name: info for name, info in headers.items() if name not in factors})


def check_headers(config: CheckpointConfig, headers: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raises FormatError if a tensor of a group, or one that provenance lists as dense, is not there as described."""
    for group in config.groups:
        check_group_headers(group, headers, folder)
    for name in config.provenance.get("dense_tensors", []):
        if name not in headers:
            raise FormatError(f"{folder}: {name}: missing from the checkpoint; {MEND}")


def stacked_shape(group: Group, headers: Mapping[str, TensorInfo], folder: Path) -> tuple[list[int], int]:
    """Rows of each member and the columns of the matrix that a group stands for. They are not in the config but read
    off one tensor each. Raises FormatError if one is missing or has another number of dimensions."""

    def shape_of(tensor: str, dimensions: int = 2) -> tuple[int, ...]:
        return shape_in(headers, tensor, dimensions, folder)

    if group.form == "svd":
        return [shape_of(f"{member}.{LOWRANK_A}")[0] for member in group.members], shape_of(
            f"{group.name}.{LOWRANK_B}"
        )[1]
    if group.side == "columns":
        rows = [shape_of(f"{member}.{SKELETON}")[0] for member in group.members]
        return rows, shape_of(f"{group.name}.{PERMUTATION}", 1)[0]
    return [shape_of(f"{group.name}.{PERMUTATION}", 1)[0]], shape_of(f"{group.name}.{SKELETON}")[1]


def shape_in(headers: Mapping[str, TensorInfo], tensor: str, dimensions: int, folder: Path) -> tuple[int, ...]:
    """Raises FormatError unless the tensor is there and has so many dimensions."""
    if tensor not in headers:
        raise FormatError(f"{folder}: {tensor}: missing from the checkpoint; {MEND}")
    if len(headers[tensor].shape) != dimensions:
        raise FormatError(
            f"{headers[tensor].file}: {tensor}: {dimensions} dimensions expected, "
            f"shape is {headers[tensor].shape}; {MEND}"
        )
    return headers[tensor].shape


def check_group_headers(group: Group, headers: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raises FormatError if a tensor of the group is missing or its shape or type is not what the config says."""
    rows, columns = stacked_shape(group, headers, folder)
    for name, shape in expected_tensors(group, rows, columns).items():
        if shape_in(headers, name, len(shape), folder) != shape:
            raise FormatError(
                f"{headers[name].file}: {name}: shape {headers[name].shape}, "
                f"but rank {group.rank} asks for {shape}; {MEND}"
            )
        allowed = {"I32"} if name.endswith(f".{PERMUTATION}") else FLOAT_TYPES
        if headers[name].dtype not in allowed:
            raise FormatError(
                f"{headers[name].file}: {name}: type {headers[name].dtype}, "
                f"expected {' or '.join(sorted(allowed))}; {MEND}"
            )
    for member in group.members:
        if f"{member}.weight" in headers:
            raise FormatError(
                f"{headers[f'{member}.weight'].file}: {member}.weight is there, "
                f"but group {group.name} replaces it; {MEND}"
            )


def check_values(headers: Mapping[str, TensorInfo]) -> None:
    """Reads the tensors. Raises FormatError for NaN, infinity, or a permutation that is none."""
    for file in sorted({info.file for info in headers.values()}):
        with safe_open(file, framework="pt") as shard:
            for name in (name for name, info in headers.items() if info.file == file):
                tensor = shard.get_tensor(name)
                check_finite(f"{file}: {name}", tensor)
                if name.endswith(f".{PERMUTATION}"):
                    check_permutation(f"{file}: {name}", tensor)
