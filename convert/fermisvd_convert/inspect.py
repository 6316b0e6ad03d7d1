"""What a compressed checkpoint holds, read from its config and headers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fermisvd.budget import factor_parameters
from fermisvd.files import TensorInfo, read_headers
from fermisvd.format import (
    LOWRANK_A,
    LOWRANK_B,
    PERMUTATION,
    SKELETON,
    Group,
    validate_checkpoint,
)
from fermisvd_convert.record import GroupRow, Totals, totals


@dataclass(frozen=True)
class Summary:
    """groups: compressed ones; tensors: how many; bytes: of the weight files; provenance: as config.json has it."""

    format_version: int
    groups: list[GroupRow]
    totals: Totals
    tensors: int
    bytes: int
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        groups = [row.model_dump(exclude={"kept_energy", "spectrum"}) for row in self.groups]
        return vars(self) | {"groups": groups, "totals": self.totals.model_dump()}


def inspect_checkpoint(folder: Path) -> Summary:
    """Compressed groups, their ranks and parameters, tensors, bytes, provenance. Raises FormatError if broken."""
    config, headers = validate_checkpoint(folder), read_headers(folder)
    rows = [_group_row(group, headers) for group in config.groups]
    files = {info.file for info in headers.values()}
    size = sum(file.stat().st_size for file in files)
    return Summary(config.format_version, rows, totals(rows), len(headers), size, config.provenance)


def _group_row(group: Group, headers: dict[str, TensorInfo]) -> GroupRow:
    rows, columns = _matrix_size(group, headers)
    return GroupRow(
        members=list(group.members),
        form=group.form,
        side=group.side,
        rank=group.rank,
        full_rank=min(rows, columns),
        parameters_before=rows * columns,
        parameters_after=int(factor_parameters(group.rank, rows, columns, group.form)),
    )


def _matrix_size(group: Group, headers: dict[str, TensorInfo]) -> tuple[int, int]:
    """(m, n) of the stacked matrix, from the shapes of the group's tensors."""
    if group.side == "rows":
        return headers[f"{group.name}.{PERMUTATION}"].shape[0], headers[f"{group.name}.{SKELETON}"].shape[1]
    part, shared = (LOWRANK_A, LOWRANK_B) if group.form == "svd" else (SKELETON, PERMUTATION)
    return sum(headers[f"{m}.{part}"].shape[0] for m in group.members), headers[f"{group.name}.{shared}"].shape[-1]
