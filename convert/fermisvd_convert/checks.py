"""What is refused before a conversion looks at its model: options that make no sense, and places for OUT.

The model's own checks are in source.py, the text's in text.py, the disk's in space.py; docs/refusals.md lists all.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

from pydantic import Field, ValidationError, validate_call

from fermisvd.budget import check_fraction
from fermisvd.errors import FermiSVDError
from fermisvd.files import check_name
from fermisvd_convert.output import OutputError, check_free, place_of, writable
from fermisvd_convert.places import check_own, real_path
from fermisvd_convert.space import device_of, existing
from fermisvd_convert.workspace import SCRATCH

P = ParamSpec("P")
R = TypeVar("R")
LARGEST = 2**31 - 1  # of any count
LONGEST_NAME = 250  # bytes: what is made beside OUT is called by up to five more
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]  # with 0
Texts = Annotated[Sequence[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class OptionError(FermiSVDError):
    """An option's value makes no sense, or not together with another's."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A program's function that takes what its annotations say, whoever calls it: the command line keeps most of it out
    by itself, a script does not. Raises OptionError naming the argument."""
    called = validate_call(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return called(*args, **kwargs)
        except ValidationError as error:
            if error.title != function.__name__:
                raise
            first = error.errors()[0]
            place = first["loc"][0]
            name = list(signature(function).parameters)[place] if isinstance(place, int) else str(place)
            got = "" if first["type"].startswith("missing") else f", got {first['input']!r}"
            raise OptionError(f"--{name.replace('_', '-')}: {first['msg']}{got}") from None

    return call


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
    """Raises OutputError if a folder cannot be made there, PlaceError if something else has a name that we need."""
    check_name(out)
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise OutputError(f"{out}: a name of more than {LONGEST_NAME} bytes; {remedy}")
    place = place_of(out)
    if not writable(there := existing(place.ours)):
        raise OutputError(f"{out}: {there} is no folder that can be written to; {remedy}")
    if device_of(there) != device_of(existing(out)):
        raise OutputError(f"{out}: {there} is on another disk, and nothing can be moved from there at once; {remedy}")
    for folder in (place.new, place.old):
        check_own(folder)
