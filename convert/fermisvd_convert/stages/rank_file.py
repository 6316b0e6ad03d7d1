"""Ranks of a file: a table of one's own, or of an earlier conversion."""

import json
import math
from pathlib import Path

from fermisvd.compress import GroupsRule
from fermisvd.errors import OptionError
from fermisvd.groups import LinearGroup
from fermisvd.joining import fused_layers, joined


def ranks_from_file(path: Path, groups: list[LinearGroup], rule: GroupsRule) -> tuple[list[LinearGroup], list[float]]:
    """Groups and ideal ranks of a JSON file {group's first member: rank}, or of an earlier conversion's fermisvd.json,
    whose own groups are taken over by --groups auto.

    Raises OptionError if the file is unreadable, or its groups are not the model's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values.get("groups"), list):
            if rule == "auto":
                groups = groups_of_file(path, values["groups"], groups)
            values = {group["members"][0]: group["rank"] for group in values["groups"]}
        values = values.get("mu", values)
        ranks = {str(name): float(rank) for name, rank in values.items()}
    except OptionError:  # a ValueError too, which has said what is wrong
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise OptionError(f"{path}: not a file of ranks ({error})") from None
    for name, rank in ranks.items():
        if not 0 < rank < math.inf:
            raise OptionError(f"{path}: {name} has rank {rank}, a positive number is needed")
    names = {group.name for group in groups}
    if strangers := ranks.keys() - names:
        raise OptionError(f"{path}: {min(strangers)} is no group of the model (--groups must be the same)")
    if missing := names - ranks.keys():
        raise OptionError(f"{path}: {min(missing)} has no rank in the file (--groups must be the same)")
    return groups, [ranks[group.name] for group in groups]


def groups_of_file(path: Path, entries: list[dict], groups: list[LinearGroup]) -> list[LinearGroup]:
    """The model's separate groups joined as the file's entries say. Raises OptionError if they do not fit."""
    first = {entry["members"][0]: list(entry["members"]) for entry in entries}
    chosen, left = [], list(groups)
    while left:
        members = first.get(left[0].name, [])
        parts, left = left[: len(members)], left[len(members) :]
        if not parts or [group.name for group in parts] != members or len(fused_layers(parts)) != 1:
            name = (parts or left)[0].name
            raise OptionError(f"{path}: its group of {name} is none of the model's")
        chosen.append(joined(parts))
    return chosen
