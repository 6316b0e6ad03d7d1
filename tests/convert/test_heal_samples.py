"""Healing trains on windows of its own number: of more text than is calibrated on, by default on none twice."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from fermisvd.teacher import Taught
from fermisvd_convert import preflight
from fermisvd_convert.convert import convert
from fermisvd_convert.stages import healing, teacher
from tests.support.artefacts import made

SMALL = dict(samples=12, gradient_samples=8, sequence_length=16, steps=2, heal_steps=6, batch_size=4, align=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(120)))
    return str(path)


@pytest.fixture
def convert_small(tiny_llama, text, tmp_path):
    def run(name, **options):
        settings = SMALL | {"calibration": [text], "work": tmp_path / "work"} | options
        return convert(str(tiny_llama), tmp_path / name, 0.3, **settings)

    return run


@pytest.fixture
def trained_on(monkeypatch):
    """Windows (samples, length) of each healing: those that it trains on, and those that decide."""
    seen, heal = [], healing.heal

    def spy(student, training, aside, *rest, **more):
        seen.append((training.windows, aside.windows))
        return heal(student, training, aside, *rest, **more)

    monkeypatch.setattr(healing, "heal", spy)
    return seen


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 28),  # 6 steps of 4 windows, and 4 that decide
        ({"heal_steps": 1}, 12),  # no fewer than are calibrated on
        ({"heal_step_tokens": 50}, 21),  # 6 steps of 3 windows, and 3 that decide
        ({"heal_samples": 9}, 9),
        ({"heal_samples": 40}, 40),
    ],
)
def test_windows_that_healing_has(convert_small, trained_on, options, count):
    record = convert_small("out", **options)
    training, aside = trained_on[0]
    assert len(training) + len(aside) == record.settings["heal_samples"] == count
    assert len(torch.cat([training, aside]).unique(dim=0)) == count
    assert record.settings["samples"] == 12


def test_by_default_none_is_trained_on_twice(convert_small, monkeypatch):
    taken, trained, batch = [], [], Taught.batch

    def spy(taught, numbers, device):
        if any(taught is each for each in trained):
            taken.extend(int(number) for number in numbers)
        return batch(taught, numbers, device)

    def heal(student, training, *rest, **more):
        trained.append(training)
        return original(student, training, *rest, **more)

    original = healing.heal
    monkeypatch.setattr(healing, "heal", heal)
    monkeypatch.setattr(Taught, "batch", spy)
    convert_small("out")
    assert sorted(taken) == list(range(24))


def test_a_text_with_fewer_is_no_fault_unless_they_were_asked_for(convert_small, trained_on, caplog):
    with caplog.at_level(logging.WARNING, "fermisvd"):
        record = convert_small("out", heal_steps=1000, heal_learning_rate=0.0)
        there = record.settings["heal_samples"]
        assert 24 < there < 4000 and "more were asked for" not in caplog.text
        convert_small("more", heal_samples=4000)
    assert f"the text gives {there} windows of 16 tokens; more were asked for" in caplog.text
    assert {len(training) + len(aside) for training, aside in trained_on} == {there}


def test_without_healing_none_are_read_for_it(convert_small, monkeypatch):
    asked, read = [], preflight.calibration_text

    def spy(tokenizer, sources, samples, *rest, **more):
        asked.append(samples)
        return read(tokenizer, sources, samples, *rest, **more)

    monkeypatch.setattr(preflight, "calibration_text", spy)
    record = convert_small("out", heal_steps=0, heal_samples=40)
    assert asked == [12] and record.settings["heal_samples"] is None


def test_of_a_longer_text_the_teacher_is_asked_what_is_new(convert_small, monkeypatch, tmp_path):
    """Batches of a text's beginning are found; what is healed is as if nothing had been there."""
    convert_small("first", heal_samples=12)
    first, asked, ask = made(tmp_path / "work"), [], teacher._ask

    def spy(conversion, stage, batches):
        asked.extend(batch for _, batch in batches)
        return ask(conversion, stage, batches)

    monkeypatch.setattr(teacher, "_ask", spy)
    convert_small("second", heal_samples=40)
    assert [len(batch) for batch in asked] == [4] * 7  # of 40 windows 12 are known
    assert (made(tmp_path / "work") - first).keys() == {"teacher", "healed"}
    convert_small("anew", heal_samples=40, work=tmp_path / "other")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "anew"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
