"""Options: each stands once, as a field with its type, default, range and help.

The command line, the keywords of the Python functions and the record of a conversion are made from these fields. A
nested model's options have names of their own (`heal_steps` is `steps` of the healing), so that one flat list of names
serves them all.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fermisvd.errors import OptionError
from fermisvd.precision import Compute

LARGEST = 2**31 - 1  # of any count
BATCH_SIZE, SEED = 8, 0
COMPUTE: Compute = "auto"
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]  # with 0


def option(help: str, *, shown: str | None = None, recorded: bool = True, **limits: Any) -> Any:
    """What stands beside an option's type: its help, what the help shows for the default where that is no value,
    whether a conversion's record names it, and its limits (ge, le, gt)."""
    beside: Any = {"shown": shown} if shown else None
    return Field(description=help, json_schema_extra=beside, exclude=not recorded or None, **limits)


def nested(panel: str, prefix: str = "") -> Any:
    """Of a field that holds settings: their heading in the help, and what stands before their names."""
    return Field(title=panel, json_schema_extra={"prefix": prefix})


@dataclass(frozen=True)
class Option:
    """path: fields that lead to it, of the settings and, if nested, of the inner ones; default: PydanticUndefined where
    one must be given; panel: heading in the help."""

    path: tuple[str, ...]
    field: FieldInfo
    default: Any
    panel: str | None = None


class Settings(BaseModel):
    """A set of options. A nested one is a field of a Settings type, with a default; see `nested`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    panel: ClassVar[str | None] = None  # heading of a class's own options in the help

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option by its name, nested ones included."""
        found: dict[str, Option] = {}
        for name, field in cls.model_fields.items():
            if not isinstance(field.default, Settings):
                found[name] = Option((name,), field, field.default, _owner(cls, name).panel)
                continue
            for inner_name, inner in type(field.default).options().items():
                default = getattr(field.default, inner_name)
                found[f"{extra(field, 'prefix', '')}{inner_name}"] = Option(
                    (name, inner_name), inner.field, default, field.title
                )
        return found

    @classmethod
    def named(cls, **values: Any) -> Self:
        """Settings of these options, by their names; the others have their defaults. A nested model may be given whole.

        Raises OptionError naming the option that is unknown, missing or out of its range.
        """
        options, given = cls.options(), {}
        for name, value in values.items():
            if name in cls.model_fields and isinstance(value, Settings):
                given[name] = given.get(name, {}) | value.model_dump()
                continue
            if name not in options:
                raise OptionError(f"--{name.replace('_', '-')}: no such option")
            first, *inner = options[name].path
            if inner:
                given.setdefault(first, cls.model_fields[first].default.model_dump())[inner[0]] = value
            else:
                given[first] = value
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            raise OptionError(f"{_name_of(problem['loc'], options)}{_reason(problem)}") from None

    def by_name(self) -> dict[str, Any]:
        """JSON-able value of every recorded option by its name: which `named` takes (sequences as lists)."""
        dump = self.model_dump(mode="json")
        outer = {name: option for name, option in type(self).options().items() if option.path[0] in dump}
        return {
            name: dump[option.path[0]] if len(option.path) == 1 else dump[option.path[0]][option.path[1]]
            for name, option in outer.items()
        }


class Batched(Settings):
    """Of what runs a model."""

    panel = "Run"

    batch_size: Annotated[Count, option("Windows a forward pass.")] = BATCH_SIZE
    compute: Annotated[
        Compute, option("Type of the model's passes; auto: bfloat16 where the device is fast at it.")
    ] = COMPUTE


class Seeded(Settings):
    """Of what draws random numbers."""

    panel = "Run"

    seed: Annotated[Natural, option("The same seed, the same checkpoint.")] = SEED


def extra(field: FieldInfo, key: str, default: Any = None) -> Any:
    """What `option` or `nested` put beside the type under that key."""
    values = field.json_schema_extra
    return values.get(key, default) if isinstance(values, dict) else default


def _owner(settings: type[Settings], name: str) -> type[Settings]:
    """The class that declares the field first."""
    return [each for each in settings.__mro__ if issubclass(each, Settings) and name in each.model_fields][-1]


def _name_of(place: tuple[int | str, ...], options: dict[str, Option]) -> str:
    """The option that pydantic's place of an error lies in, with a colon; nothing where an error is about several."""
    for name, option in options.items():
        if place[: len(option.path)] == option.path:
            return f"--{name.replace('_', '-')}: "
    return ""


def _reason(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] in ("missing", "value_error") else f"{message}, got {error['input']!r}"
