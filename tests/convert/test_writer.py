from pathlib import Path

import pytest

from fermisvd_convert.workspace import WorkspaceError
from fermisvd_convert.writer import OutputError, move_into_place, unfinished


def test_unfinished_folder_is_gone_or_in_place(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), unfinished(out) as partial:
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with unfinished(out) as partial:
        (partial / "a").write_text("whole")
        move_into_place(partial, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_what_a_killed_conversion_left_is_cleared(tmp_path):
    """It died while it wrote, or between the two renames of --overwrite."""
    out = tmp_path / "out"
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".out.partial" / "old tensor").write_text("left")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("the earlier checkpoint")
    with unfinished(out) as partial:
        assert [path.name for path in partial.iterdir()] == [".lock"]
        assert (out / "a").read_text() == "the earlier checkpoint"
        (partial / "a").write_text("new")
        move_into_place(partial, out)
    assert (out / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_output(tmp_path):
    out = tmp_path / "out"
    with unfinished(out) as partial:
        (partial / "a").write_text("first")
        with pytest.raises(WorkspaceError, match=r"out: in use by another conversion"), unfinished(out):
            pass
        assert (partial / "a").read_text() == "first"


def test_full_disk_leaves_no_output(tmp_path):
    with pytest.raises(OutputError, match=r"No space left.*left as it was"), unfinished(tmp_path / "out"):
        Path("/dev/full").write_text("x" * 10**6)
    assert list(tmp_path.iterdir()) == []
