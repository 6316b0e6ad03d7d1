"""What is refused before a conversion looks at its model: options that make no sense, and places for OUT.

The model's own checks are in source.py, the text's in text.py, the disk's in space.py; docs/refusals.md lists all.
"""

import math
import os
from pathlib import Path

from fermisvd.budget import check_fraction
from fermisvd.errors import FermiSVDError
from fermisvd.format import FormatError, read_config
from fermisvd_convert.space import existing
from fermisvd_convert.writer import OutputError


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

    Raises OutputError if OUT or the work directory cannot be there.
    """
    source = Path(model).resolve()
    if Path(model).is_dir():
        if source in (out, *out.parents) or out in source.parents:
            raise OutputError(f"{out}: lies inside MODEL, or MODEL inside it; choose another OUT")
        if source in (work, *work.parents):
            raise OutputError(f"{work}: the work directory lies inside MODEL; choose another --work")
    if out in (work, *work.parents):
        raise OutputError(f"{work}: the work directory lies inside OUT; choose another --work")
    for folder, remedy in ((out.parent, "choose another OUT"), (work, "choose another --work")):
        there = existing(folder)
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: {there} is no folder that can be written to; {remedy}")
    if not out.exists():
        return
    if not overwrite:
        raise OutputError(f"{out}: exists; choose another OUT or pass --overwrite")
    try:
        read_config(out)
    except FormatError:
        raise OutputError(f"{out}: --overwrite replaces FermiSVD checkpoints only, and this is none") from None
