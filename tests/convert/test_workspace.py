import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fermisvd.errors import OutputError
from fermisvd_convert import workspace as workspace_module
from fermisvd_convert.places import MARKER
from fermisvd_convert.workspace import MANIFEST, Workspace, settings_key, write_whole


def test_key_depends_on_every_setting():
    keys = {settings_key(1, "a"), settings_key(2, "a"), settings_key(1, "b"), settings_key([1, "a"])}
    assert len(keys) == 4
    assert settings_key({"a": 1, "b": 2}) == settings_key({"b": 2, "a": 1})


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"

    def fail(partial):
        partial.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(path, tmp_path / "half", fail)
    assert list(tmp_path.iterdir()) == []
    write_whole(path, tmp_path / "half", lambda p: p.write_text("whole"))
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ['{"x":', '{"x": 3}', ""])
def test_json_is_made_once_and_again_if_changed(tmp_path, damage):
    made = []
    for _ in range(2):
        assert Workspace(tmp_path).json("a", lambda: made.append(1) or {"x": 1}) == {"x": 1}
    assert len(made) == 1
    (tmp_path / "a.json").write_text(damage)
    assert Workspace(tmp_path).json("a", lambda: made.append(1) or {"x": 2}) == {"x": 2}


def test_artefact_that_the_manifest_does_not_know_is_not_used(tmp_path):
    Workspace(tmp_path).save_tensors("s", "a", {"t": torch.ones(2)})
    Workspace(tmp_path).json("b", lambda: 1)
    (tmp_path / f"{MANIFEST}.jsonl").unlink()
    found = Workspace(tmp_path)
    assert not found.has_tensors("s", "a")
    assert found.json("b", lambda: 2) == 2


def test_tensors_round_trip_and_damage_is_seen(tmp_path):
    tensor = torch.randn(3, 4, dtype=torch.float64)
    assert not Workspace(tmp_path).has_tensors("s", "a.b")
    Workspace(tmp_path).save_tensors("s", "a.b", {"t": tensor.T})
    assert torch.equal(Workspace(tmp_path).load_tensors("s", "a.b")["t"], tensor.T)
    file = next((tmp_path / "s").iterdir())
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"x", bytes([*whole[:-3], whole[-3] ^ 1, *whole[-2:]]), b""):
        file.write_bytes(damaged)
        assert not Workspace(tmp_path).has_tensors("s", "a.b")
        with pytest.raises(OutputError, match=r"a\.b\.safetensors"):
            Workspace(tmp_path).load_tensors("s", "a.b")


def test_manifest_has_hash_and_settings_and_survives_a_cut_line(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.save_tensors("gram-0123", "a", {"t": torch.ones(2)})
    with (tmp_path / f"{MANIFEST}.jsonl").open("ab") as file:
        file.write(b'{"artefact": "gram-01')  # killed while it wrote
    workspace.json("ranks-4567", lambda: {"x": 1})
    lines = (tmp_path / f"{MANIFEST}.jsonl").read_text().splitlines()
    entries = {entry["artefact"]: entry for line in lines if line.endswith("}") for entry in [json.loads(line)]}
    assert {name: entry["settings"] for name, entry in entries.items()} == {
        "gram-0123/a.safetensors": "0123",
        "ranks-4567.json": "4567",
    }
    import hashlib

    content = (tmp_path / "ranks-4567.json").read_bytes()
    assert entries["ranks-4567.json"]["sha256"] == hashlib.sha256(content).hexdigest()
    again = Workspace(tmp_path)
    assert again.has_tensors("gram-0123", "a") and again.json("ranks-4567", lambda: 1 / 0) == {"x": 1}


@pytest.mark.long
def test_second_converter_is_refused_and_a_dead_one_forgotten(tmp_path):
    script = "import sys, time; from pathlib import Path; from fermisvd_convert.workspace import Workspace\n"
    script += "with Workspace(Path(sys.argv[1])).locked():\n    print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    try:
        with pytest.raises(OutputError, match="in use by another conversion"), Workspace(tmp_path).locked():
            pass
    finally:
        other.kill()
        other.wait()
    (tmp_path / "s").mkdir()
    scratch = Workspace(tmp_path).scratch
    (scratch / "half-0-a.safetensors").write_text("left by a kill")
    (scratch / "hidden-1").mkdir()
    (scratch / "hidden-1" / "before 0 0.safetensors").write_text("left by a kill")
    with Workspace(tmp_path).locked():
        assert [path.name for path in scratch.iterdir()] == [MARKER]
    assert not scratch.exists()


def test_nothing_of_the_users_is_removed(tmp_path):
    """Names like ours, in the folder that the user named: all of them stay, byte for byte."""
    (tmp_path / "hidden-project").mkdir()
    (tmp_path / "s").mkdir()
    mine = [tmp_path / name for name in ("hidden-project/a", "hidden-notes.txt", "s/.mine.partial", "hidden-0")]
    for path in mine:
        path.write_text(path.name)
    workspace = Workspace(tmp_path)
    with workspace.locked(), workspace.hidden_states(0) as hidden:
        hidden.put("last", 0, torch.ones(3))
        workspace.save_tensors("s", "t", {"t": torch.ones(2)})
    assert all(path.read_text() == path.name for path in mine)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_something_else_under_the_scratch_folders_name_is_refused_and_kept(tmp_path, kind):
    scratch = Workspace(tmp_path).scratch
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    if kind == "folder":
        (tmp_path / "mine").rename(scratch)
    elif kind == "file":
        scratch.write_text("mine")
    else:
        scratch.symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match=scratch.name), Workspace(tmp_path).locked():
        pass
    assert (scratch if kind == "file" else scratch / "a").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_without_locks_is_named_with_the_remedy(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = pytest.raises(OutputError, match=r"\.lock cannot be locked.*on a disk that can lock")
    with expected, Workspace(tmp_path).locked():
        pass


def test_progress_is_kept_once_a_minute_and_found_again(tmp_path, monkeypatch):
    found, keep = Workspace(tmp_path).progress("ranks-1")
    assert found is None
    keep({"step": 1})
    assert Workspace(tmp_path).progress("ranks-1")[0] is None
    monkeypatch.setattr(workspace_module, "PROGRESS_SECONDS", 0)
    keep({"step": 2})
    assert Workspace(tmp_path).progress("ranks-1")[0] == {"step": 2}


def test_tensor_progress_is_one_whole_state_until_the_stage_is_done(tmp_path, monkeypatch):
    def kept() -> tuple | None:
        found, _ = Workspace(tmp_path).stage("healed", 1).tensor_progress()
        return found and (found[0], {name: tensors["t"].tolist() for name, tensors in found[1].items()})

    def state(value: int) -> tuple[list, dict]:
        return [value], {"a": {"t": torch.full((2,), value)}, "b": {"t": torch.full((1,), value)}}

    stage = Workspace(tmp_path).stage("healed", 1)
    stage.tensor_progress()[1](*state(1))
    assert kept() is None  # too early
    monkeypatch.setattr(workspace_module, "STATE_SECONDS", 0)
    keep = stage.tensor_progress()[1]
    keep(*state(2))
    assert kept() == ([2], {"a": [2, 2], "b": [2]})
    keep(*state(3))
    assert kept() == ([2], {"a": [2, 2], "b": [2]})  # not again at once
    monkeypatch.setattr(workspace_module, "STATE_PAUSE", 0)
    keep = stage.tensor_progress()[1]
    keep(*state(4))
    assert kept() == ([4], {"a": [4, 4], "b": [4]})
    save, files = Workspace.save_tensors, []

    def killed(self, folder, name, tensors):
        if files:
            raise KeyboardInterrupt
        files.append(name)
        save(self, folder, name, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "save_tensors", killed)
        keep(*state(5))
    assert kept() is None  # neither half
    keep(*state(6))
    file = tmp_path / f"{stage.name}.progress" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert kept() is None
    stage.json(dict)
    assert kept() is None and not list(tmp_path.glob("*.progress*"))


def test_without_space_a_state_is_not_kept_and_said_so(tmp_path, monkeypatch, caplog):
    """Neither an error, which would end the healing, nor half a state."""
    monkeypatch.setattr(workspace_module, "STATE_SECONDS", 0)
    full = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(workspace_module.shutil, "disk_usage", lambda _: full)
    stage = Workspace(tmp_path).stage("healed", 1)
    stage.tensor_progress()[1]([1], {"a": {"t": torch.zeros(8)}})
    assert stage.tensor_progress()[0] is None and "no space to keep how far healed-" in caplog.text
