"""A command of the command line from a set of options: one typer option a field, so that the two cannot drift."""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic_core import PydanticUndefined

from fermisvd.settings import Option, Settings, extra


def given(value: object) -> str:
    """A path, text or hub id as it was meant: `~` is the home folder also behind `=`, where a shell leaves it; an empty
    one is a variable that was not set."""
    text = str(value)
    if not text.strip():
        raise typer.BadParameter("is empty")
    return os.path.expanduser(text)


def place(value: object) -> Path:
    """A path as it was meant."""
    return Path(given(value))


def takes(settings: type[Settings]) -> Callable[[Callable], Callable]:
    """The decorated function's parameter `options` becomes the options of these settings; it is given as a dictionary
    of their values by name."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        options = settings.options()

        @wraps(function)
        def command(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in options}
            return function(**values, options={name: v for name, v in chosen.items() if v is not None})

        made = [parameter_of(name, option) for name, option in options.items()]
        made.sort(key=lambda parameter: parameter.default is not ...)  # what must be given stands first
        command.__signature__ = signature.replace(parameters=[*own, *made])  # pyright: ignore[reportAttributeAccessIssue]: what typer reads
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *made]}
        return command

    return decorate


def parameter_of(name: str, option: Option) -> inspect.Parameter:
    """The option as typer takes it: type, limits and default are the field's."""
    kind, limits = kind_of(option.field.annotation), limits_of(option)
    default = ... if option.default is PydanticUndefined else option.default
    shown: dict[str, Any] = {"help": option.field.description, "rich_help_panel": option.panel}
    if (text := extra(option.field, "shown")) is not None:
        default, shown["show_default"] = None, text
    declared = f"--{name.replace('_', '-')}"
    if kind is bool:
        switch = declared if default is False else f"{declared}/--no-{name.replace('_', '-')}"
        info = typer.Option(switch, **shown)
    elif any(isinstance(each, BeforeValidator) for each in option.field.metadata):
        kind, info = str, typer.Option(declared, parser=given, metavar="<str>", **shown)
    elif kind in (int, float):
        info = typer.Option(declared, **limits, **shown)
    elif get_origin(kind) is Literal:
        info = typer.Option(declared, **shown)
    else:
        info = typer.Option(declared, parser=place if kind is Path else given, **shown)
    annotation = kind | None if default is None else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def kind_of(annotation: Any) -> Any:
    """The type that one value of an option has on the command line; list[str] for several."""
    if get_origin(annotation) is Annotated:
        return kind_of(get_args(annotation)[0])
    if get_origin(annotation) is Literal or isinstance(annotation, type):
        return annotation
    if get_origin(annotation) is Sequence:
        return list[str]
    (kind,) = [each for each in get_args(annotation) if each is not NoneType]  # Optional
    return kind_of(kind)


def limits_of(option: Option) -> dict[str, Any]:
    """min and max, as far as they are limits that a value may reach."""
    found: dict[str, Any] = {}

    def look(metadata: Sequence[Any]) -> None:
        for each in metadata:
            for limit, name in (("ge", "min"), ("le", "max")):
                value = getattr(each, limit, None)
                if value is not None:
                    found[name] = value
            look(getattr(each, "metadata", ()))

    def descend(annotation: Any) -> None:
        if get_origin(annotation) is Annotated:
            look(get_args(annotation)[1:])
        for each in get_args(annotation):
            if get_origin(each) is not None:
                descend(each)

    descend(option.field.annotation)
    look(option.field.metadata)
    return found
