"""Checkpoint formats 1 and 2: the config's schema, tensor names, and the checks a reader makes before it computes.

docs/format.md describes the folder. Every check raises FormatError, which names the file, the tensor or the option.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open

from fermisvd.errors import FormatError, reason
from fermisvd.files import COPY, MEND, TensorInfo, check_alone, read_headers
from fermisvd.schemes import PACKED, SCALE, SCHEMES, SHAPE

QUANT_METHOD = "fermisvd"
FORMAT_VERSION = 1  # written where no factor lies on a grid, so that earlier readers take it
GRID_VERSION = 2  # where one does
VERSIONS = (FORMAT_VERSION, GRID_VERSION)

LOWRANK_A, LOWRANK_B = "lowrank_a", "lowrank_b"
SKELETON, INTERPOLATION, PERMUTATION = "skeleton", "interpolation", "permutation"
WEIGHT = "weight"  # of a member that is as it was
MATRIX = "matrix"  # of one that is no product of factors, but on a grid; vLLM transposes GPT-2's `weight` in any form
FACTORS = {  # of a group, by form
    "svd": (LOWRANK_A, LOWRANK_B),
    "pivga": (SKELETON, INTERPOLATION),
    "dense": (MATRIX,),
}
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
TYPE_NAMES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32", torch.int64: "I64"}


class Group(BaseModel):
    """One group of the config: members share B, or D and the permutation; see fermisvd.groups.LinearGroup.

    schemes: the grid of each factor by its name, from version 2 on; none where factors are of a floating-point type.
    form `dense`: the members' own matrices on a grid, of full rank.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: tuple[str, ...] = Field(min_length=1)
    form: Literal["svd", "pivga", "dense"]
    side: Literal["columns", "rows"] | None = None
    rank: int = Field(ge=1, strict=True)
    schemes: dict[str, str] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Group":
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"group {self.members[0]} lists a member twice")
        if (self.form == "pivga") != (self.side is not None):
            raise ValueError(f"group {self.members[0]}: a side belongs to the pivga form, and only to it")
        if self.side == "rows" and len(self.members) > 1:
            raise ValueError(f"group {self.members[0]}: rows side takes one member, it has {len(self.members)}")
        return self

    @model_validator(mode="after")
    def _on_grids(self) -> "Group":
        if self.form == "dense" and self.schemes is None:
            raise ValueError(f"group {self.name}: form dense takes schemes; a plain dense layer is in no group")
        if self.schemes is not None:
            if sorted(self.schemes) != sorted(FACTORS[self.form]):
                raise ValueError(f"group {self.name}: schemes are those of {' and '.join(FACTORS[self.form])}")
            if unknown := sorted(set(self.schemes.values()) - set(SCHEMES)):
                raise ValueError(f"group {self.name}: scheme {unknown[0]!r} is none of {', '.join(SCHEMES)}")
        return self

    @property
    def name(self) -> str:
        return self.members[0]

    def renamed(self, name_of: Callable[[str], str]) -> "Group":
        """The group with other names for its members."""
        return self.model_copy(update={"members": tuple(name_of(member) for member in self.members)})

    def tensors(self, factor: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that a factor (rows x columns) is stored as."""
        if self.schemes is None:
            return {factor: (rows, columns)}
        return SCHEMES[self.schemes[factor]].shapes(factor, rows, columns)

    def types(self, tensor: str) -> set[str]:
        """What a tensor of the group may be, by the last part of its name, in safetensors' words."""
        dtype = self.type_of(tensor)
        return FLOAT_TYPES if dtype is None else {TYPE_NAMES[dtype]}

    def type_of(self, tensor: str) -> torch.dtype | None:
        """The same as a torch type; None for any floating-point one."""
        if tensor == PERMUTATION:
            return torch.int32
        return SCHEMES[self.schemes[factor_of(tensor)]].type_of(tensor) if self.schemes else None


def factor_of(tensor: str) -> str:
    """The factor that a tensor is of: skeleton of skeleton_scale."""
    return next((tensor.removesuffix(end) for end in (SCALE, PACKED, SHAPE) if tensor.endswith(end)), tensor)


class CheckpointConfig(BaseModel):
    """The `quantization_config` entry of config.json. schemes: of version 2, a description of each grid in it, in
    compressed-tensors' words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["fermisvd"] = QUANT_METHOD
    format_version: Literal[1, 2] = FORMAT_VERSION
    groups: tuple[Group, ...]
    schemes: dict[str, dict[str, Any]] | None = None
    provenance: dict[str, Any] = {}

    def renamed(self, name_of: Callable[[str], str]) -> "CheckpointConfig":
        """The config with other names for the groups' members."""
        return self.model_copy(update={"groups": tuple(group.renamed(name_of) for group in self.groups)})

    @model_validator(mode="after")
    def _dense_tensors_are_names(self) -> "CheckpointConfig":
        names = self.provenance.get("dense_tensors", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("provenance.dense_tensors is no list of names")
        return self

    @model_validator(mode="after")
    def _grids_are_described(self) -> "CheckpointConfig":
        used = {scheme for group in self.groups for scheme in (group.schemes or {}).values()}
        if self.format_version == FORMAT_VERSION and (used or self.schemes is not None):
            raise ValueError(f"schemes belong to format_version {GRID_VERSION}")
        if self.format_version == GRID_VERSION and not used:
            raise ValueError(f"format_version {GRID_VERSION} has schemes, and no group has any")
        if (found := set(self.schemes or {})) != used:
            raise ValueError(f"schemes describe {sorted(found)}, the groups have {sorted(used)}")
        for name, described in (self.schemes or {}).items():
            if described != SCHEMES[name].described():
                raise ValueError(f"schemes.{name} is not what this FermiSVD knows by that name")
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


def checkpoint_config(groups: Sequence[Group], provenance: dict[str, Any]) -> CheckpointConfig:
    """The entry of these groups, in the lowest version that has words for them."""
    used = sorted({scheme for group in groups for scheme in (group.schemes or {}).values()})
    if not used:
        return CheckpointConfig(groups=tuple(groups), provenance=provenance)
    schemes = {name: SCHEMES[name].described() for name in used}
    return CheckpointConfig(format_version=GRID_VERSION, groups=tuple(groups), schemes=schemes, provenance=provenance)


def parse_config(values: Mapping[str, Any], where: str = "config.json: quantization_config") -> CheckpointConfig:
    """Validated config. Raises FormatError naming `where` and every field that is off."""
    version = values.get("format_version")
    if version not in VERSIONS or not isinstance(version, int) or isinstance(version, bool):
        raise FormatError(
            f"{where}: format_version is {version!r}, this FermiSVD reads {' and '.join(map(str, VERSIONS))}; "
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
    if group.form == "dense" and rank != min(rows, columns):
        raise FormatError(
            f"group {group.name}: rank {rank} of a dense {rows} x {columns}; correct config.json or convert again"
        )
    each = {"svd": {LOWRANK_A: rank}, "dense": {MATRIX: columns}}.get(group.form, {})
    if group.form == "dense":
        shared = {}
    elif group.form == "svd":
        shared = group.tensors(LOWRANK_B, rank, columns)
    elif group.side == "columns":
        shared = {**group.tensors(INTERPOLATION, rank, columns - rank), PERMUTATION: (columns,)}
        each = {SKELETON: rank}
    else:
        shared = {
            **group.tensors(SKELETON, rank, columns),
            **group.tensors(INTERPOLATION, rows - rank, rank),
            PERMUTATION: (rows,),
        }
    tensors = {f"{group.name}.{name}": shape for name, shape in shared.items()}
    for member, m in zip(group.members, member_rows, strict=True):
        for factor, width in each.items():
            tensors |= {f"{member}.{name}": shape for name, shape in group.tensors(factor, m, width).items()}
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
    wide = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
    if wide.is_floating_point() and not wide.isfinite().all():
        raise FormatError(f"{name}: holds NaN or infinite values; {MEND}")


def check_scales(name: str, scales: torch.Tensor) -> None:
    """Raises FormatError unless the scales of a grid are positive numbers."""
    check_finite(name, scales)
    if not (scales > 0).all():
        raise FormatError(f"{name}: a scale is zero or negative; {MEND}")


def check_shape(name: str, stored: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises FormatError unless the shape that is stored beside packed numbers is the factor's."""
    if stored.tolist() != list(shape):
        raise FormatError(f"{name}: says {stored.tolist()}, but rank and layer ask for {list(shape)}; {MEND}")


def validate_checkpoint(folder: Path) -> CheckpointConfig:
    """The config of a folder all of whose tensors are what it says: names, shapes, types, permutations, finite values.

    Reads every tensor once. Raises FormatError otherwise.
    """
    config, headers = read_checkpoint(folder)
    check_values(headers)
    check_grids(config, headers, folder)
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
    group_of = config.group_of()
    factors = {
        name
        for name in headers
        if (group := group_of.get(name.rpartition(".")[0]))
        and factor_of(name.rpartition(".")[2]) in FACTORS[group.form]
    }
    check_values({name: info for name, info in headers.items() if name not in factors})
    check_grids(config, headers, folder)


def check_headers(config: CheckpointConfig, headers: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raises FormatError if a tensor of a group, or one that provenance lists as dense, is not there as described."""
    under: dict[str, list[str]] = {}
    for name in headers:
        under.setdefault(name.rpartition(".")[0], []).append(name)
    for group in config.groups:
        known = check_group_headers(group, headers, folder)
        for name in (name for member in group.members for name in under.get(member, ())):
            if name not in known and not name.endswith(".bias"):
                raise FormatError(f"{headers[name].file}: {name}: group {group.name} has no such tensor; {MEND}")
    for name in config.provenance.get("dense_tensors", []):
        if name not in headers:
            raise FormatError(f"{folder}: {name}: missing from the checkpoint; {MEND}")


def stacked_shape(group: Group, headers: Mapping[str, TensorInfo], folder: Path) -> tuple[list[int], int]:
    """Rows of each member and the columns of the matrix that a group stands for. They are not in the config but read
    off one tensor each. Raises FormatError if one is missing or has another number of dimensions."""

    def shape_of(tensor: str, dimensions: int = 2) -> tuple[int, ...]:
        return shape_in(headers, tensor, dimensions, folder)

    def sizes_of(member: str, factor: str) -> tuple[int, ...]:
        """Of a factor: of packed numbers only the rows are their tensor's, the columns are stored beside."""
        packed = group.schemes is not None and SCHEMES[group.schemes[factor]].packed
        return shape_of(f"{member}.{factor}{PACKED if packed else ''}")

    def rows_of(factor: str) -> list[int]:
        return [sizes_of(member, factor)[0] for member in group.members]

    def columns_of(factor: str) -> int:
        if group.schemes is not None and SCHEMES[group.schemes[factor]].packed:
            return stored_shape(headers, f"{group.name}.{factor}{SHAPE}", folder)[1]
        return sizes_of(group.name, factor)[1]

    if group.form == "svd":
        return rows_of(LOWRANK_A), columns_of(LOWRANK_B)
    if group.form == "dense":
        return rows_of(MATRIX), columns_of(MATRIX)
    if group.side == "columns":
        return rows_of(SKELETON), shape_of(f"{group.name}.{PERMUTATION}", 1)[0]
    return [shape_of(f"{group.name}.{PERMUTATION}", 1)[0]], columns_of(SKELETON)


def stored_shape(headers: Mapping[str, TensorInfo], tensor: str, folder: Path) -> tuple[int, int]:
    """Rows and columns that a tensor beside packed numbers names. Raises FormatError if it is not there or no shape."""
    shape_in(headers, tensor, 1, folder)
    with safe_open(headers[tensor].file, framework="pt") as shard:
        found = shard.get_tensor(tensor)
    if found.dtype != torch.int64 or found.shape != (2,) or (found < 1).any():
        raise FormatError(f"{headers[tensor].file}: {tensor}: no shape of two positive numbers of int64; {MEND}")
    rows, columns = found.tolist()
    return rows, columns


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


def check_group_headers(group: Group, headers: Mapping[str, TensorInfo], folder: Path) -> set[str]:
    """The names of the group's tensors. Raises FormatError if one is missing or its shape or type is not what the
    config says."""
    expected = expected_tensors(group, *stacked_shape(group, headers, folder))
    for name, shape in expected.items():
        if shape_in(headers, name, len(shape), folder) != shape:
            raise FormatError(
                f"{headers[name].file}: {name}: shape {headers[name].shape}, "
                f"but rank {group.rank} asks for {shape}; {MEND}"
            )
        allowed = group.types(name.rpartition(".")[2])
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
    return set(expected)


def check_values(headers: Mapping[str, TensorInfo]) -> None:
    """Reads the tensors. Raises FormatError for NaN, infinity, or a permutation that is none."""
    for file in sorted({info.file for info in headers.values()}):
        with safe_open(file, framework="pt") as shard:
            for name in (name for name, info in headers.items() if info.file == file):
                tensor = shard.get_tensor(name)
                check_finite(f"{file}: {name}", tensor)
                if name.endswith(f".{PERMUTATION}"):
                    check_permutation(f"{file}: {name}", tensor)


def check_grids(config: CheckpointConfig, headers: Mapping[str, TensorInfo], folder: Path) -> None:
    """Reads what lies beside the numbers of grids. Raises FormatError for a scale that is not positive, or a shape that
    is not the factor's."""
    beside: dict[Path, dict[str, tuple[int, ...]]] = {}  # file -> tensor -> shape of its factor
    for group in (group for group in config.groups if group.schemes):
        rows, columns = stacked_shape(group, headers, folder)
        factors = expected_tensors(group.model_copy(update={"schemes": None}), rows, columns)
        for name in expected_tensors(group, rows, columns):
            if name.endswith((SCALE, SHAPE)):
                member, _, last = name.rpartition(".")
                beside.setdefault(headers[name].file, {})[name] = factors[f"{member}.{factor_of(last)}"]
    for file, names in beside.items():
        with safe_open(file, framework="pt") as shard:
            for name, shape in names.items():
                tensor = shard.get_tensor(name)
                if name.endswith(SCALE):
                    check_scales(f"{file}: {name}", tensor)
                else:
                    check_shape(f"{file}: {name}", tensor, shape)
