"""Each option stands once: the command line, the keywords and the record cannot drift from its field."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup
from typer.testing import CliRunner

from fermisvd.compress import CompressOptions
from fermisvd.errors import OptionError
from fermisvd.fermigrad import FermiGradSettings
from fermisvd.settings import Count, Settings, extra, nested, option
from fermisvd_convert import cli
from fermisvd_convert.command import takes
from fermisvd_convert.commands import READ_BY, app
from fermisvd_convert.options import ConvertOptions, EvaluateOptions, HealOptions

COMMANDS = {"convert": ConvertOptions, "heal": HealOptions, "evaluate": EvaluateOptions}
OWN = {"convert": {"push_to", "private"}, "heal": set(), "evaluate": {"as_json"}}  # of the command line alone
LEAST = {ConvertOptions: {"remove": 0.2}, HealOptions: {"text": ["a.txt"]}, EvaluateOptions: {"text": "a.txt"}}
EVERY = [(settings, name) for settings in COMMANDS.values() for name in settings.options()]


def flags(command: str) -> dict[str, Any]:
    """The options of a command."""
    group: Any = typer.main.get_command(app)
    found = group.commands[command].params
    return {flag.name: flag for flag in found if flag.param_type_name == "option" and flag.name}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_command_line_as_its_field_says(command):
    options, given = COMMANDS[command].options(), flags(command)
    assert given.keys() - {"help"} == options.keys() | OWN[command]
    for name, each in options.items():
        flag = given[name]
        assert f"--{name.replace('_', '-')}" in flag.opts and flag.help == each.field.description
        assert flag.required == (each.default is PydanticUndefined)
        if (shown := extra(each.field, "shown")) is not None:
            assert flag.default is None and flag.show_default == shown
        elif not flag.required:
            assert flag.default == each.default, name


def test_what_only_one_value_reads_are_options():
    options = ConvertOptions.options()
    assert {owner for owner, _ in READ_BY} | {name for names in READ_BY.values() for name in names} <= options.keys()


TEXTS = st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=3)
SOME = {
    "form": st.sampled_from(["pivga", "svd"]),
    "ranks": st.sampled_from(["fermigrad", "uniform"]),
    "refit": st.none() | st.booleans(),
    "rescale": st.none() | st.booleans(),
    "align": st.none() | st.integers(1, 64),
    "seed": st.integers(0, 2**31 - 1),
    "sequence_length": st.none() | st.integers(2, 4096),
    "bos": st.booleans(),
    "steps": st.integers(1, 999),
    "temperature": st.floats(1e-6, 1),
    "penalty_growth": st.floats(1, 1.2),
    "count": st.none() | st.sampled_from(["pivga", "svd"]),
    "heal_steps": st.integers(0, 999),
    "heal_step_tokens": st.integers(1, 9999),
    "heal_samples": st.none() | st.integers(2, 9999),
    "heal_learning_rate": st.floats(0, 10),
}


@given(st.fixed_dictionaries({"remove": st.floats(0.01, 0.99), "calibration": TEXTS}, optional=SOME))
def test_what_is_recorded_gives_the_same_options_again(values):
    options = ConvertOptions.named(**values)
    recorded = json.loads(json.dumps(options.by_name()))
    assert ConvertOptions.named(**recorded) == options
    assert {name: recorded[name] for name in values} == values
    assert recorded.keys() == ConvertOptions.options().keys() - {
        "work", "device", "max_memory", "ask_vllm", "revision", "overwrite", "trust_remote_code", "skip_bad_rows",
    }  # fmt: skip


@pytest.mark.parametrize(("settings", "name"), EVERY)
def test_a_wrong_value_is_told_by_the_options_name(settings, name):
    with pytest.raises(OptionError, match=rf"^--{name.replace('_', '-')}: "):
        settings.named(**LEAST[settings] | {name: object()})


def test_a_conversion_has_one_budget():
    with pytest.raises(OptionError, match=r"^give one of --remove and --bytes$"):
        ConvertOptions.named()


@pytest.mark.parametrize("settings", LEAST.keys() - {ConvertOptions})
def test_what_must_be_given_is_told_by_its_name(settings):
    (name,) = LEAST[settings]
    assert [each for each, field in settings.options().items() if field.default is PydanticUndefined] == [name]
    with pytest.raises(OptionError, match=f"^--{name}: Field required$"):
        settings.named()


class Brewing(Settings):
    degrees: Annotated[float, option("Of the water.", ge=0, le=100)] = 92.5


class Tea(Settings):
    """Options that no command has: one of every kind."""

    leaf: Annotated[Literal["green", "black"], option("Its kind.")] = "green"
    cups: Annotated[Count, option("How many.")]
    sweet: Annotated[bool, option("With sugar.")] = False
    pot: Annotated[Path | None, option("Where.", shown="none")] = None
    brewing: Annotated[Brewing, nested("The brewing", prefix="brew_")] = Brewing()


@pytest.fixture
def tea():
    """What the command of these options is given, on a command line."""
    made, seen = typer.Typer(), []

    @made.command()
    @takes(Tea)
    def make(*, options: dict[str, Any]) -> None:
        seen.append(options)

    def run(*arguments: str) -> tuple[Any, list[dict]]:
        return CliRunner().invoke(made, arguments, env={"COLUMNS": "100", "TERM": "dumb"}), seen

    return run


def test_a_new_field_is_an_option_at_once(tea):
    result, seen = tea("--cups", "3", "--brew-degrees", "80", "--sweet", "--pot", "~/pot", "--leaf", "black")
    assert result.exit_code == 0, result.output
    (options,) = seen
    assert options == {"cups": 3, "brew_degrees": 80, "sweet": True, "pot": Path("~/pot").expanduser(), "leaf": "black"}
    assert Tea.named(**options).brewing == Brewing(degrees=80)


def test_its_default_range_and_help_are_the_fields(tea):
    result, seen = tea("--cups", "1")
    assert result.exit_code == 0
    assert seen == [{"cups": 1, "brew_degrees": 92.5, "sweet": False, "leaf": "green"}]
    shown = re.sub(r"[│\s]+", " ", tea("--help")[0].output)
    assert all(part in shown for part in ("Of the water.", "The brewing", "92.5", "0<=x<=100", "[default: (none)]"))
    for wrong, name in ((["--brew-degrees", "101"], "--brew-degrees"), (["--leaf", "red"], "--leaf"), ([], "--cups")):
        result, _ = tea(*(["--cups", "1"] if wrong else []), *wrong)
        assert result.exit_code == 2 and name in result.output


def test_the_help_lists_the_commands_that_there_are():
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert {name: (command.help or "").partition("\n")[0] for name, command in group.commands.items()} == cli.COMMANDS


def test_a_nested_model_is_taken_whole_and_changed_by_name():
    found = CompressOptions.named(remove=0.3, fermigrad=FermiGradSettings(steps=3, plateau=0.1), steps=5)
    assert found.fermigrad == FermiGradSettings(steps=5, plateau=0.1)


@pytest.mark.parametrize("wrong", [{"penalty_growth": 1e6}, {"penalty": 1e308}])
def test_a_penalty_beyond_numbers_is_refused(wrong):
    with pytest.raises(OptionError, match="--penalty"):
        CompressOptions.named(remove=0.3, constraint="penalty", **wrong)


def test_rescaling_asks_for_the_whitening_that_it_reads():
    assert CompressOptions.named(remove=0.3, rescale=True).whitening == "kfac"
    with pytest.raises(OptionError, match="--rescale"):
        CompressOptions.named(remove=0.3, rescale=True, whitening="input")
    assert not CompressOptions.named(remove=0.3, heal_steps=0, whitening="input").rescales


def test_what_is_not_healed_is_refitted_and_rescaled():
    for options, refits, rescales in (
        ({}, False, False),
        ({"refit": True}, True, False),
        ({"heal_steps": 0}, True, True),
        ({"heal_steps": 0, "refit": False}, False, False),
    ):
        found = CompressOptions.named(remove=0.3, **options)
        assert (found.refits, found.rescales) == (refits, rescales)
    assert CompressOptions.named(remove=0.3, rescale=True).rescales
    assert not CompressOptions.named(remove=0.3, heal_steps=0, rescale=False).rescales


@pytest.mark.parametrize(("flag", "message"), [("--rescale", "--whitening kfac"), ("--no-rescale", "no such folder")])
def test_what_is_switched_off_needs_no_owner(tmp_path, flag, message):
    """Another check stops the command that passes this one."""
    options = ["--remove", "0.2", "--whitening", "input", flag]
    found = CliRunner().invoke(app, ["convert", str(tmp_path / "none"), str(tmp_path / "out"), *options])
    assert found.exit_code == 2 and message in " ".join(found.output.replace("│", " ").split())
