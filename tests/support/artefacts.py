"""What conversions have made in a work directory: its manifest has a line for each artefact whenever it is made."""

import json
from collections import Counter
from pathlib import Path


def kinds(work: Path) -> list[str]:
    """Kinds of the stages whose artefacts were made (gram, factors, ranks and so on), in their order."""
    found = []
    for manifest in sorted(work.glob("manifest*.jsonl")):
        for line in manifest.read_text(encoding="utf-8").splitlines():
            try:
                stage = json.loads(line)["artefact"].partition("/")[0].partition(".")[0]
            except ValueError:  # an empty line, or one that a kill cut off
                continue
            found.append(stage.rpartition("-")[0])
    return found


def made(work: Path) -> Counter[str]:
    """How many artefacts each kind of stage has made; unchanged by a run that finds all that it needs."""
    return Counter(kinds(work))
