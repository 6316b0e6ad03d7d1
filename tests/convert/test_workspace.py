import pytest
import torch

from fermisvd_convert.workspace import Workspace, settings_key, write_whole


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
        write_whole(path, fail)
    assert list(tmp_path.iterdir()) == []
    write_whole(path, lambda p: p.write_text("whole"))
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_json_is_made_once_and_again_if_broken(tmp_path):
    workspace, made = Workspace(tmp_path), []
    for _ in range(2):
        assert workspace.json("a", lambda: made.append(1) or {"x": 1}) == {"x": 1}
    assert len(made) == 1
    (tmp_path / "a.json").write_text('{"x":')
    assert workspace.json("a", lambda: made.append(1) or {"x": 2}) == {"x": 2}


def test_tensors_round_trip_and_truncation_is_seen(tmp_path):
    workspace, tensor = Workspace(tmp_path), torch.randn(3, 4, dtype=torch.float64)
    assert not workspace.has_tensors("s", "a.b")
    workspace.save_tensors("s", "a.b", {"t": tensor.T})
    assert torch.equal(workspace.load_tensors("s", "a.b")["t"], tensor.T)
    file = next((tmp_path / "s").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    assert not workspace.has_tensors("s", "a.b")
