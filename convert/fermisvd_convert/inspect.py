"""What a compressed checkpoint holds, read from its config and headers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fermisvd.budget import factor_parameters
from fermisvd.files import read_headers
from fermisvd.format import (
    Group,
    stacked_shape,
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
    rows = [_group_row(group, *stacked_shape(group, headers, folder)) for group in config.groups]
    files = {info.file for info in headers.values()}
    size = sum(file.stat().st_size for file in files)
    return Summary(config.format_version, rows, totals(rows), len(headers), size, config.provenance)


def _group_row(group: Group, member_rows: list[int], columns: int) -> GroupRow:
    rows = sum(member_rows)
    return GroupRow(
        members=list(group.members),
        form=group.form,
        side=group.side,
        rank=group.rank,
        full_rank=min(rows, columns),
        parameters_before=rows * columns,
        parameters_after=int(factor_parameters(group.rank, rows, columns, group.form)),
        schemes=group.schemes,
    )
