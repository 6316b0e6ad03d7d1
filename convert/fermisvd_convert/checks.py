"""What is refused before a conversion looks at its model: places for OUT and the work directory.

An option's own limits stand with it (options.py); docs/refusals.md lists all refusals.
"""

import os
from pathlib import Path

from fermisvd.errors import OutputError
from fermisvd.files import check_name
from fermisvd_convert.output import check_free, place_of, writable
from fermisvd_convert.places import check_own, disk_of, existing, real_path
from fermisvd_convert.workspace import SCRATCH

LONGEST_NAME = 250  # bytes: what is made beside OUT is called by up to five more


def check_out(out: Path, model: str, work: Path, overwrite: bool) -> None:
    """Nothing but an earlier checkpoint of ours is ever replaced, and nothing is written into MODEL.

    Raises OutputError if OUT or the work directory cannot be there, or if something else has a name that we need.
    """
    source = real_path(model)
    if Path(model).is_dir():
        if source in (out, *out.parents) or out in source.parents:
            raise OutputError(f"{out}: lies inside MODEL, or MODEL inside it; choose another OUT")
        if source in (work, *work.parents):
            raise OutputError(f"{work}: the work directory lies inside MODEL; choose another --work")
    place = place_of(out)
    if any(own in (work, *work.parents) for own in (place.new, place.old, place.lock)):
        raise OutputError(f"{work}: where OUT is made; choose another --work")
    if out in (work, *work.parents):
        raise OutputError(f"{work}: the work directory lies inside OUT; choose another --work")
    check_place(out, "choose another OUT")
    check_name(work)
    if not writable(there := existing(work)):
        raise OutputError(f"{work}: {there} is no folder that can be written to; choose another --work")
    check_own(work / SCRATCH)
    check_free(out, "choose another OUT or pass --overwrite", overwrite)


def check_place(out: Path, remedy: str) -> None:
    """Raises OutputError if a folder cannot be made there, or if something else has a name that we need."""
    check_name(out)
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise OutputError(f"{out}: a name of more than {LONGEST_NAME} bytes; {remedy}")
    place = place_of(out)
    if not writable(there := existing(place.ours)):
        raise OutputError(f"{out}: {there} is no folder that can be written to; {remedy}")
    if disk_of(there) != disk_of(existing(out)):
        raise OutputError(f"{out}: {there} is on another disk, and nothing can be moved from there at once; {remedy}")
    for folder in (place.new, place.old):
        check_own(folder)
