"""A script that calls the converter is told what the command line would have told."""

import math

import pytest

from fermisvd.errors import FermiSVDError, OptionError
from fermisvd.running.distributed import launched
from fermisvd_convert.convert import convert
from fermisvd_convert.heal import heal_checkpoint

WRONG = {
    "form": ["PIVGA", "qr", None],
    "whitening": ["foo"],
    "groups": ["foo"],
    "constraint": ["foo"],
    "count": ["foo"],
    "samples": [0, -1, 8.5, "many"],
    "gradient_samples": [-3],
    "heal_samples": [1, "all"],
    "heal_step_tokens": [0],
    "sequence_length": [0, "long"],
    "batch_size": [0, 8.5, None],
    "temperature": [-1, 50, math.nan],
    "steps": [0, -1],
    "minimum_rank": [-5],
    "penalty_growth": [0, "x"],
    "plateau": [-1],
    "heal_steps": [-1],
    "align": [0, "often"],
    "dtype": ["bf16", "int8"],
    "seed": [-1],
    "max_memory": ["24 apples", 0],
    "overwrite": ["perhaps"],
    "calibration": ["text.txt", [], None, [""], [3]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named_at_once(tmp_path, name, value):
    """No model is there: the value is looked at first of all."""
    with pytest.raises(OptionError, match=rf"^--{name.replace('_', '-')}: "):
        convert(tmp_path / "nowhere", tmp_path / "out", 0.2, **{name: value})
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"^--unheard-of: no such option$"):
        convert(tmp_path / "nowhere", tmp_path / "out", 0.2, unheard_of=1)


@pytest.mark.parametrize(("name", "value"), [("samples", 1), ("steps", 0), ("learning_rate", -1), ("text", "a.txt")])
def test_heal_too(tmp_path, name, value):
    with pytest.raises(OptionError, match=rf"^--{name.replace('_', '-')}: "):
        heal_checkpoint(tmp_path / "nowhere", tmp_path / "healed", **{"text": ["a.txt"], name: value})


def test_right_values_pass(tmp_path):
    """What follows is refused for another reason: there is no such model."""
    options = dict(samples=8, calibration=("a.txt",), align=None, max_memory="24GiB")
    for more in ({}, {"align": "auto", "max_memory": 2**30}):
        with pytest.raises(FermiSVDError, match="no such folder"):
            convert(tmp_path / "nowhere", str(tmp_path / "out"), 0.2, **options | more)


ENVIRONMENTS = [
    ({}, 0),
    ({"RANK": ""}, 0),
    ({"RANK": "1"}, 0),  # a single process, whatever it is told
    ({"RANK": "3", "WORLD_SIZE": "1"}, 0),
    ({"RANK": "1", "WORLD_SIZE": ""}, 0),
    ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, 3),
]


@pytest.mark.parametrize(("environment", "rank"), ENVIRONMENTS)
def test_torchruns_variables_count_where_there_are_several_processes(monkeypatch, environment, rank):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched("RANK") == rank


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2"}])
def test_half_of_torchruns_variables_is_named(monkeypatch, environment):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", environment["WORLD_SIZE"])
    with pytest.raises(FermiSVDError, match=r"WORLD_SIZE.*torchrun"):
        launched("RANK")
