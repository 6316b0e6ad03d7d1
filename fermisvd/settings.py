"""Options: each stands once, as a field with its type, default, range and help.

The command line, the keywords of the Python functions and the record of a conversion are made from these fields. A
nested model's options have names of their own (`heal_steps` is `steps` of the healing), so that one flat list of names
serves them all.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fermisvd.errors import FermiSVDError

LARGEST = 2**31 - 1  # of any count
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]  # with 0
Positive = Annotated[float, Field(gt=0)]


class OptionError(FermiSVDError):
    """An option's value makes no sense, or not together with another's."""


@dataclass(frozen=True)
class Option:
    """path: fields that lead to it, of the settings and, if nested, of the inner ones; panel: heading in the help."""

    path: tuple[str, ...]
    field: FieldInfo
    panel: str | None = None


class Settings(BaseModel):
    """A set of options. A nested one is a field of a Settings type; `prefix` stands before its options' names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option by its name, nested ones included."""
        found: dict[str, Option] = {}
        for name, field in cls.model_fields.items():
            inner = field.annotation
            if not (isinstance(inner, type) and issubclass(inner, Settings)):
                found[name] = Option((name,), field)
                continue
            extra = field.json_schema_extra
            prefix = str(extra.get("prefix", "")) if isinstance(extra, dict) else ""
            for inner_name, option in inner.options().items():
                found[prefix + inner_name] = Option((name, *option.path), option.field, field.title)
        return found

    @classmethod
    def named(cls, **values: Any) -> Self:
        """Settings of these options, by their names; the others have their defaults.

        Raises OptionError naming the option that is unknown, missing or out of its range.
        """
        options, nested = cls.options(), {}
        for name, value in values.items():
            if name not in options:
                raise OptionError(f"--{name.replace('_', '-')}: no such option")
            *outer, last = options[name].path
            inside = nested
            for field in outer:
                inside = inside.setdefault(field, {})
            inside[last] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            first = error.errors()[0]
            raise OptionError(f"{_name_of(first['loc'], options)}: {_reason(first)}") from None

    def by_name(self) -> dict[str, Any]:
        """JSON-able value of every option by its name, but for excluded fields: the inverse of `named`."""
        dump, found = self.model_dump(mode="json"), {}
        for name, option in type(self).options().items():
            value: Any = dump
            for field in option.path:
                value = value.get(field, _ABSENT)
                if value is _ABSENT:
                    break
            else:
                found[name] = value
        return found


_ABSENT = object()


def _name_of(place: tuple[int | str, ...], options: dict[str, Option]) -> str:
    """The option that pydantic's place of an error lies in."""
    for name, option in options.items():
        if place[: len(option.path)] == option.path:
            return f"--{name.replace('_', '-')}"
    return ".".join(map(str, place)) or "options"


def _reason(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] in ("missing", "value_error") else f"{message}, got {error['input']!r}"
