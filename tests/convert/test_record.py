"""fermisvd.json: what is written is read back, also what an earlier version wrote."""

import json
from itertools import pairwise

import numpy as np
import pytest
from pydantic import BaseModel

from fermisvd_convert.convert import convert
from fermisvd_convert.record import NAME, SPECTRUM_POINTS, decimated, kept_energy, read_record


@pytest.fixture(scope="module")
def converted(smallest_llama, tmp_path_factory):
    """The record that convert returned, and OUT; every kind of choice is in it."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "a.txt").write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(90)))
    options = dict(calibration=[str(folder / "a.txt")], samples=8, sequence_length=24, steps=2, heal_steps=2, align=1)
    return convert(smallest_llama, folder / "out", 0.3, form="svd", refit=True, **options), folder / "out"


def test_what_is_written_is_read_back(converted, tmp_path):
    returned, out = converted
    assert (
        returned.choices.keys() == {"dense", "groups", "joining", "refit"} and returned.healing and returned.trace.steps
    )
    assert returned.seconds and json.loads((out / "timing.json").read_text()) == returned.seconds
    read = read_record(out)
    assert read == returned.model_copy(update={"seconds": {}})  # the same settings, the same file
    read.write(tmp_path)
    assert (tmp_path / NAME).read_bytes() == (out / NAME).read_bytes()


def without_defaults(model: BaseModel) -> dict:
    """Only what a field has no default for: the least that a version ever wrote."""
    kept = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if field.is_required():
            kept[name] = shortened(value)
    return kept


def shortened(value):
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return without_defaults(value) if isinstance(value, BaseModel) else value


def test_what_an_earlier_version_wrote_is_read(converted, tmp_path):
    returned, _ = converted
    least = without_defaults(returned)
    assert least.keys() == {"model", "settings", "totals", "groups", "perplexity", "bytes"}
    assert least["groups"][0].keys() == {"members", "form", "rank", "full_rank"}
    (tmp_path / NAME).write_text(json.dumps(least))
    read = read_record(tmp_path)
    assert [(row.members, row.rank) for row in read.groups] == [(row.members, row.rank) for row in returned.groups]
    assert returned.has_spectra() and not read.has_spectra()
    assert read.files == [] and read.trace.steps == [] and read.choices == {} and read.healing is None


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 4096])
def test_decimated_spectrum(k):
    sigma = np.sort(np.random.default_rng(k).random(k))[::-1]
    kept = decimated(sigma)
    index = kept["index"]
    assert len(index) == len(kept["sigma"]) <= SPECTRUM_POINTS
    assert index[0] == 0 and index[-1] == k - 1 and all(a < b for a, b in pairwise(index))
    assert kept["sigma"] == pytest.approx([sigma[i] for i in index], rel=1e-4)
    assert json.loads(json.dumps(kept)) == kept


def test_kept_energy():
    assert kept_energy(np.array([3.0, 2.0, 1.0]), 2) == pytest.approx(13 / 14)
    assert kept_energy(np.array([3.0, 2.0, 1.0]), 3) == 1
    assert kept_energy(np.zeros(3), 1) == 1
