"""Names of a record's cells: METHOD, or METHOD | REMOVE for what was made with a fraction removed."""

import re


def method_of(key: str) -> str:
    return key.partition(" | ")[0]


def removal_of(key: str) -> float | None:
    _, _, remove = key.partition(" | ")
    return float(remove) if remove else None


def folder_of(key: str) -> str:
    """A cell's name as one of a folder: words and numbers with hyphens between."""
    return re.sub(r"[^a-z0-9.]+", "-", key.lower()).strip("-")
