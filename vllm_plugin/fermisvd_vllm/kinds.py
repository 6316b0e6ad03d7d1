"""Which class a part of a vLLM layer is of: by form and side of its group, and whether its factors are on grids."""

from collections.abc import Mapping, Sequence

from fermisvd.errors import FormatError
from fermisvd.format import Group
from fermisvd_vllm.grid_parts import DenseGridPart, GridPart, PivGaColumnsGridPart, PivGaRowsGridPart, SvdGridPart
from fermisvd_vllm.parts import DensePart, GroupPart, Part, PivGaColumnsPart, PivGaRowsPart, SvdPart

KINDS: dict[tuple[str, str | None], type[GroupPart]] = {  # by form and side of the group
    ("svd", None): SvdPart,
    ("pivga", "columns"): PivGaColumnsPart,
    ("pivga", "rows"): PivGaRowsPart,
}


GRID_KINDS: dict[tuple[str, str | None], type[GridPart]] = {
    ("svd", None): SvdGridPart,
    ("pivga", "columns"): PivGaColumnsGridPart,
    ("pivga", "rows"): PivGaRowsGridPart,
    ("dense", None): DenseGridPart,
}


def part_of(members: Sequence[int], group: Group | None) -> Part:
    """The part of members at these positions of a layer."""
    if group is None:
        return DensePart(members)
    return (GRID_KINDS if group.schemes else KINDS)[group.form, group.side](members, group)


def parts_of(member_names: Sequence[str], groups: Mapping[str, Group], layer: str) -> list[Part] | None:
    """Parts of a layer with these members, in order of their first member; None if all of them are dense.

    groups: member name -> its group. Raises FormatError if a group reaches out of the layer.
    """
    position = {name: i for i, name in enumerate(member_names)}
    parts: dict[str, Part] = {}
    for name in member_names:
        group = groups.get(name)
        if group is None:
            parts[name] = part_of([position[name]], None)
            continue
        strangers = [member for member in group.members if member not in position]
        if strangers:
            raise FormatError(f"group {group.name}: {strangers[0]} is no part of {layer}, the layer vLLM fuses it into")
        if group.name not in parts:
            parts[group.name] = part_of([position[member] for member in group.members], group)
    return one_product(list(parts.values())) if any(part.group for part in parts.values()) else None


def one_product(parts: Sequence[Part]) -> list[Part]:
    """The parts, dense matrices on one grid being one part: one product, of an input that is rounded once."""
    found: dict[object, list[Part]] = {}
    for part in parts:
        grid = tuple((part.group.schemes or {}).items()) if part.group and part.group.form == "dense" else None
        found.setdefault(grid or part, []).append(part)
    return [alike[0] if len(alike) == 1 else _joined(alike) for alike in found.values()]


def _joined(parts: Sequence[Part]) -> Part:
    """One part for the members of several dense groups on one grid."""
    group = parts[0].group
    assert group is not None
    members = sorted(member for part in parts for member in part.members)
    return part_of(members, group)
