"""What is refused before a conversion looks at its model: options that make no sense, and places for OUT.

The model's own checks are in source.py, the text's in text.py, the disk's in space.py; docs/refusals.md lists all.
"""

import math
from pathlib import Path

from fermisvd.budget import check_fraction
from fermisvd.errors import FermiSVDError
from fermisvd.files import check_name
from fermisvd_convert.output import OutputError, check_free, places, writable
from fermisvd_convert.places import check_own
from fermisvd_convert.space import existing
from fermisvd_convert.workspace import SCRATCH


class OptionError(FermiSVDError):
    """An option's value makes no sense, or not together with another's."""


def check_options(
    remove: float,
    *,
    temperature: float = 0.01,
    penalty_growth: float = 1.0,
    plateau: float = 0.0,
    steps: int = 1,
) -> None:
    """Raises BudgetError or OptionError for numbers that a range on the command line does not keep out."""
    check_fraction(remove)
    for name, value in (("temperature", temperature), ("penalty-growth", penalty_growth), ("plateau", plateau)):
        if not math.isfinite(value):
            raise OptionError(f"--{name} must be a finite number, got {value}")
    if steps * math.log(penalty_growth) > math.log(1e100):
        raise OptionError(f"--penalty-growth {penalty_growth}: {steps} --steps of it are beyond every number")


def check_out(out: Path, model: str, work: Path, overwrite: bool) -> None:
    """Nothing but an earlier checkpoint of ours is ever replaced, and nothing is written into MODEL.

    Raises OutputError if OUT or the work directory cannot be there, PlaceError if something else has a name that we
    need.
    """
    source = Path(model).resolve()
    if Path(model).is_dir():
        if source in (out, *out.parents) or out in source.parents:
            raise OutputError(f"{out}: lies inside MODEL, or MODEL inside it; choose another OUT")
        if source in (work, *work.parents):
            raise OutputError(f"{work}: the work directory lies inside MODEL; choose another --work")
    if out in (work, *work.parents):
        raise OutputError(f"{work}: the work directory lies inside OUT; choose another --work")
    check_place(out, "choose another OUT")
    check_name(work)
    if not writable(there := existing(work)):
        raise OutputError(f"{work}: {there} is no folder that can be written to; choose another --work")
    check_own(work / SCRATCH)
    check_free(out, "choose another OUT or pass --overwrite", overwrite)


def check_place(out: Path, remedy: str) -> None:
    """Raises OutputError if a folder cannot be made there, PlaceError if something else has a name that we need."""
    check_name(out)
    place = places(out)
    if not writable(there := existing(place.ours)):
        raise OutputError(f"{out}: {there} is no folder that can be written to; {remedy}")
    for folder in (place.new, place.old):
        check_own(folder)
