"""OUT is whole or not there, whatever happens; only folders of our own are ever removed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fermisvd.errors import OutputError
from fermisvd_convert.output import check_free, claimed, complete, move_into_place, place_of, unfinished
from fermisvd_convert.places import MARKER

CONFIG = '{"quantization_config": {"quant_method": "fermisvd", "format_version": 1, "groups": []}}'


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".fermisvd"}


def fill(folder: Path, word: str) -> None:
    """A checkpoint of four files, one in a nested folder."""
    (folder / "nested").mkdir(parents=True)
    (folder / "nested" / "a").write_text(word)
    (folder / "weights").write_text(word)
    files = ["nested/a", "weights", "config.json", "fermisvd.json"]
    (folder / "fermisvd.json").write_text(json.dumps({"files": files, "word": word}))
    (folder / "config.json").write_text(CONFIG.replace("}}", f', "provenance": {{"word": "{word}"}}}}}}'))


def holds(folder: Path, word: str) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file() and ".fermisvd" not in path.relative_to(folder).parts]
    contents = [path.read_text() for path in files]
    return len(contents) == 4 and all(word in content for content in contents)


@pytest.fixture(params=["beside", "inside"])
def out(request, tmp_path):
    """OUT that is not there, and one that is there, empty."""
    out = tmp_path / "out"
    if request.param == "inside":
        out.mkdir(mode=0o2770)
    return out


def write(out: Path, word: str, overwrite: bool = False) -> None:
    with claimed(out) as place, unfinished(place) as partial:
        fill(partial, word)
        move_into_place(place, overwrite)


def test_unfinished_folder_is_gone_or_in_place(out):
    with pytest.raises(ZeroDivisionError), claimed(out) as place, unfinished(place) as partial:
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert not out.exists() or not names(out)
    write(out, "whole")
    assert holds(out, "whole")
    assert not list(out.parent.rglob("*new")) and not list(out.parent.rglob("*old"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_that_another_made_meanwhile_is_kept_unless_it_may_be_replaced(out, overwrite):
    with claimed(out) as place, unfinished(place) as partial:
        fill(partial, "new")
        if not out.exists():
            out.mkdir()
        fill(out, "another's")
        if overwrite:
            move_into_place(place, overwrite)
        else:
            with pytest.raises(OutputError, match="made by another"):
                move_into_place(place, overwrite)
    assert holds(out, "new" if overwrite else "another's")


class Killed(BaseException):
    """What no handler of the program's catches, as Ctrl-C."""


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("cleared", [False, True])
def test_stopped_at_any_rename_the_next_run_finds_one_checkpoint_whole(
    out, earlier, step, cleared, monkeypatch, tmp_path_factory
):
    """The finished one is put into place. cleared: by Ctrl-C, after which the program clears up; a kill leaves all."""
    if earlier:
        write(out, "earlier")
    renames, rename, at_the_kill = [], Path.rename, tmp_path_factory.mktemp("kill") / "there"

    def counted(self, target):
        renames.append(self)
        if len(renames) > step:
            shutil.copytree(out.parent, at_the_kill)
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        try:
            write(out, "new", overwrite=True)
        except Killed:
            if not cleared:
                shutil.rmtree(out.parent)
                shutil.copytree(at_the_kill, out.parent)
            assert not (out / "config.json").exists() or holds(out, "new") or holds(out, "earlier")
    with claimed(out):
        assert holds(out, "new")
    assert not list(out.parent.rglob("*new")) and not list(out.parent.rglob("*old"))


def test_what_a_killed_conversion_left_half_written_is_cleared(out):
    with pytest.raises(Killed), claimed(out) as place, unfinished(place) as partial:
        (place.new / "kept").touch()  # stands for the kill: nothing is cleared
        fill(partial, "half")
        raise Killed
    with claimed(out):
        assert not out.exists() or not names(out)
        assert not place_of(out).new.exists()


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_folder_of_the_users_under_a_name_of_ours_is_refused_and_kept(tmp_path, kind):
    mine = tmp_path / ".fermisvd" / f"out.{kind}"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=rf"out\.{kind}.*{MARKER}"), claimed(tmp_path / "out"):
        pass
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_two_writers_of_one_output(tmp_path):
    out = tmp_path / "out"
    with claimed(out):
        with pytest.raises(OutputError, match=r"out: in use by another conversion"), claimed(out):
            pass
        with claimed(tmp_path / "other") as place, unfinished(place) as partial:
            assert partial.is_dir()


def test_full_disk_leaves_no_output(tmp_path):
    with pytest.raises(OutputError, match=r"No space left.*left as it was"), unfinished(place_of(tmp_path / "out")):
        Path("/dev/full").write_text("x" * 10**6)
    assert names(tmp_path) == set()


def test_what_fails_when_the_weights_are_written_leaves_them_and_says_where(out):
    with pytest.raises(OutputError) as error, claimed(out) as place, unfinished(place) as partial:
        fill(partial, "whole")
        with complete(place):
            raise RuntimeError("no room for a card")
    said = str(error.value)
    kept = place.checkpoint
    assert said.startswith(f"{out}: no room for a card") and str(kept) in said
    assert holds(kept, "whole")


def test_what_cannot_be_put_into_place_waits_for_the_next_run(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def busy(self, target):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        expected = pytest.raises(OutputError, match=r"resource busy.*whole, in .*moved there by the next conversion")
        with expected, claimed(out) as place, unfinished(place) as partial:
            fill(partial, "whole")
            with complete(place):
                move_into_place(place, overwrite=False)
    assert not out.exists()
    with claimed(out):
        assert holds(out, "whole")


def test_hidden_name_is_not_told(tmp_path):
    from fermisvd.errors import FormatError

    out = tmp_path / "out"
    with pytest.raises(FormatError, match=rf"^{out}/x: broken$"), claimed(out) as place, unfinished(place) as partial:
        raise FormatError(f"{partial}/x: broken")


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    check_free(out, "choose another")
    (out / "lost+found").mkdir()
    check_free(out, "choose another")
    (out / "a").write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another"):
        check_free(out, "choose another")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        check_free(tmp_path / "link", "choose another")


def test_what_waits_is_not_put_over_something_of_the_users(tmp_path):
    """A killed run had finished; meanwhile OUT has become a folder of the user's."""
    out = tmp_path / "out"
    with pytest.raises(Killed), claimed(out) as place, unfinished(place) as partial:
        fill(partial, "whole")
        (place.new / "finished").touch()
        raise Killed
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"out: --overwrite replaces FermiSVD"), claimed(out):
        pass
    assert (out / "thesis.txt").read_text() == "years of work" and holds(place.checkpoint, "whole")
    (out / "thesis.txt").unlink()
    out.rmdir()
    with claimed(out):
        assert holds(out, "whole")


@pytest.mark.parametrize("name", ["thesis.txt", "nested/thesis.txt", "another/config.json", "dangling"])
def test_overwrite_removes_nothing_but_the_checkpoints_own_files(out, name):
    write(out, "earlier")
    check_free(out, "choose another", overwrite=True)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).symlink_to("nowhere") if name == "dangling" else (out / name).write_text("years of work")
    with pytest.raises(OutputError, match=rf"would remove {name}, which is not the checkpoint's"):
        check_free(out, "choose another", overwrite=True)
    (out / "fermisvd.json").unlink()  # a checkpoint without a list: what lies at the top may be its own
    if "/" in name:
        with pytest.raises(OutputError, match="would remove"):
            check_free(out, "choose another", overwrite=True)


def test_a_folder_that_is_there_stays_the_same_folder(tmp_path):
    """With its permissions, and with those who stand in it."""
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before = out.stat()
    write(out, "first")
    write(out, "second", overwrite=True)
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode) and holds(out, "second")
    assert not (out / ".fermisvd").exists()


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a disk of its own")
def test_a_real_mount_point(tmp_path, kind):
    out, source = tmp_path / "out", tmp_path / "source"
    out.mkdir()
    source.mkdir()
    command = ["mount", "-t", "tmpfs", "none", out] if kind == "tmpfs" else ["mount", "--bind", source, out]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:
        write(out, "first")
        assert holds(out, "first")
        write(out, "second", overwrite=True)
        assert holds(out, "second") and not (out / ".fermisvd").exists()
    finally:
        subprocess.run(["umount", out], check=True)


def test_a_conversion_that_was_refused_leaves_no_folders_on_the_way(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(RuntimeError), claimed(out):
        raise RuntimeError("refused")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with claimed(out):
        (out.parent / "theirs").touch()
    assert (out.parent / "theirs").exists()
