"""A disk that fills up, by the limit that the system sets to the size of a file: the write fails as on a full one."""

import resource
from contextlib import contextmanager

import pytest
import torch

from fermisvd.errors import OutputError
from fermisvd.running.blocks import HiddenStates
from fermisvd_convert.convert import convert
from fermisvd_convert.output import place_of
from fermisvd_convert.workspace import Workspace
from tests.support.artefacts import made


@contextmanager
def no_room_for(size: int):
    """Files cannot grow past so many bytes: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_full_disk_is_one_clear_error_and_keeps_what_is_there(tmp_path, kind):
    workspace = Workspace(tmp_path)
    workspace.json("a", lambda: {"x": 1})
    with no_room_for(10_000), pytest.raises(OutputError, match=r"File too large.*finished stages are kept"):
        if kind == "json":
            workspace.json("b", lambda: {"x": "y" * 20_000})
        else:
            workspace.save_tensors("s", "b", {"t": torch.ones(5000)})
    again = Workspace(tmp_path)
    assert again.json("a", lambda: 1 / 0) == {"x": 1}
    assert not again.has_tensors("s", "b") and not list(tmp_path.rglob("half-*"))


def test_hidden_states(tmp_path):
    states = HiddenStates(tmp_path / "hidden", 0)
    with (
        no_room_for(10_000),
        pytest.raises(OutputError, match=r"hidden: hidden states cannot be written.*too large"),
    ):
        states.put("last", 0, torch.ones(5000))


def test_conversion_says_so_keeps_its_stages_and_goes_on_with_room(tiny_llama, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    settings = dict(
        calibration=[str(text)], samples=12, sequence_length=32, steps=4, heal_steps=2, batch_size=4, align=1
    )
    convert(str(tiny_llama), tmp_path / "plain", 0.3, work=tmp_path / "plain work", **settings)
    expected = (tmp_path / "plain" / "model.safetensors").read_bytes()
    artefacts = [path.stat().st_size for path in (tmp_path / "plain work").rglob("*.safetensors")]
    assert max(artefacts) < len(expected) - 1

    def attempt(**more):
        convert(str(tiny_llama), out, 0.3, work=tmp_path / "work", **settings, **more)

    with (
        no_room_for(50_000),
        pytest.raises(OutputError, match=r"work/.*cannot be written.*finished stages are kept"),
    ):
        attempt()  # the first Gram matrix has 96 x 96 numbers of 8 bytes
    assert not out.exists() and list((tmp_path / "work").glob("structure-*.json"))
    with no_room_for(len(expected) - 1), pytest.raises(OutputError, match=r"out: cannot be written.*left as it was"):
        attempt()
    assert not out.exists() and not place_of(out).new.exists()
    before = made(tmp_path / "work")
    attempt()
    assert (made(tmp_path / "work") - before).keys() == {"healed"}  # what comes after the checkpoint is written
    assert (out / "model.safetensors").read_bytes() == expected
