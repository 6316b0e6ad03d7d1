from pathlib import Path

import pytest

from fermisvd_convert.workspace import WorkspaceError
from fermisvd_convert.writer import OutputError, claimed, move_into_place, unfinished


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".fermisvd"}


def test_unfinished_folder_is_gone_or_in_place(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), claimed(out), unfinished(out) as partial:
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == set()
    with claimed(out), unfinished(out) as partial:
        (partial / "a").write_text("whole")
        move_into_place(partial, out, overwrite=False)
    assert names(tmp_path) == {"out"} and names(out) == {"a"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_that_another_made_meanwhile_is_kept_unless_it_may_be_replaced(tmp_path, overwrite):
    out = tmp_path / "out"
    with claimed(out), unfinished(out) as partial:
        (partial / "a").write_text("new")
        out.mkdir()
        (out / "a").write_text("another's")
        if overwrite:
            move_into_place(partial, out, overwrite)
        else:
            with pytest.raises(OutputError, match="made by another"):
                move_into_place(partial, out, overwrite)
    assert (out / "a").read_text() == ("new" if overwrite else "another's") and names(tmp_path) == {"out"}


@pytest.mark.parametrize("moved", [False, True])
def test_what_a_killed_conversion_left_is_cleared(tmp_path, moved):
    """It died while it wrote; between the two renames of --overwrite, or behind them."""
    out = tmp_path / "out"
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("the earlier checkpoint")
    if moved:
        out.mkdir()
        (out / "a").write_text("the new one")
    with claimed(out):
        assert (out / "a").read_text() == ("the new one" if moved else "the earlier checkpoint")
        assert names(tmp_path) == {"out"}


def test_two_writers_of_one_output(tmp_path):
    out = tmp_path / "out"
    with claimed(out):
        with pytest.raises(WorkspaceError, match=r"out: in use by another conversion"), claimed(out):
            pass
        with claimed(tmp_path / "other"), unfinished(out) as partial:
            assert partial.is_dir()


def test_full_disk_leaves_no_output(tmp_path):
    with pytest.raises(OutputError, match=r"No space left.*left as it was"), unfinished(tmp_path / "out"):
        Path("/dev/full").write_text("x" * 10**6)
    assert list(tmp_path.iterdir()) == []
