"""A stage's file that was cut off, altered, exchanged or lost is made again or refused, never used.

After the tampering a second run must give the undisturbed OUT bit for bit. Many more examples, about half an hour:

    python -m pytest tests/convert/test_artefacts.py -m slow
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fermisvd.errors import FermiSVDError
from fermisvd_convert.convert import convert
from tests.support.artefacts import made

# by the beginning of their names, in the order of the conversion
STAGES = [
    "structure",
    "gram",
    "outputs",
    "dense",
    "factors",
    "teacher",
    "ranks",
    "dense-groups",
    "groups",
    "refit",
    "rescale",
    "healed",
]
PROFILE: dict[str, Any] = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def settled(smallest_llama, tmp_path_factory):
    """Folder with an undisturbed `out` and its `work`, and what runs the same conversion in another such folder."""
    base = tmp_path_factory.mktemp("artefacts")
    text = base / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(90)))

    def run(folder: Path) -> None:
        options = dict(samples=8, gradient_samples=8, sequence_length=24, steps=2, heal_steps=2, batch_size=4, align=1)
        options |= dict(
            form="svd", refit=True, rescale=True, work=folder / "work", device="cpu", calibration=[str(text)]
        )
        convert(str(smallest_llama), folder / "out", 0.3, **options)

    run(base)
    return base, run


def contents(out: Path) -> dict[str, bytes]:
    """Every file by name, but how long it took."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "timing.json"}


def artefacts(work: Path) -> list[Path]:
    return sorted(path for path in work.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0x40
    path.write_bytes(data)


def cut(path: Path, where: float) -> None:
    path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])


def lengthen(path: Path, where: float) -> None:
    path.write_bytes(path.read_bytes() + b" " * (1 + int(9 * where)))


def replace_by_folder(path: Path, _) -> None:
    path.unlink()
    path.mkdir()


def exchange(path: Path, where: float) -> None:
    """With another of its stage, or of its kind: a whole file in the wrong place."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p.suffix == path.suffix and p != path]
    if not others:
        return path.unlink()
    other = sorted(others)[int(where * len(others))]
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def change_a_number(path: Path, where: float) -> None:
    """JSON that is still JSON: one digit is another."""
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data) if byte in b"0123456789"] or [0]
    place = digits[int(where * len(digits))]
    data[place] = ord("1") if data[place] != ord("1") else ord("2")
    path.write_bytes(data)


TAMPERINGS = {
    "flipped": flip,
    "cut off": cut,
    "emptied": lambda path, _: path.write_bytes(b""),
    "longer": lengthen,
    "lost": lambda path, _: path.unlink(),
    "exchanged": exchange,
    "garbage": lambda path, _: path.write_text('{"mu": {}, "groups": []}'),
    "a number changed": change_a_number,
    "a folder": replace_by_folder,
}


def disturbed(settled, folder: Path, tamper, kept=STAGES) -> str:
    """Copies the work directory but for the stages not in `kept`, tampers with it and runs again: "rebuilt", or the
    refusal's message. Whatever OUT there is, is the undisturbed one."""
    base, run = settled
    work = Path(shutil.copytree(base / "work", folder / "work"))
    for path in list(work.iterdir()):
        if path.name.startswith(tuple(f"{stage}-" for stage in STAGES if stage not in kept)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tamper(work)
    try:
        run(folder)
    except (FermiSVDError, OSError) as error:
        assert not (folder / "out").exists()
        return str(error)
    assert contents(folder / "out") == contents(base / "out")
    return "rebuilt"


def test_every_stage_is_kept(settled):
    assert set(STAGES) == made(settled[0] / "work").keys()


@pytest.mark.long
@pytest.mark.parametrize("tampering", ["flipped", "cut off", "exchanged", "a number changed"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_tampered_with_is_made_again(settled, tmp_path, stage, tampering):
    """Every file of the stage; those after it are gone, so that they must be made of it."""

    def tamper(work):
        files = [path for path in artefacts(work) if path.relative_to(work).parts[0].startswith(f"{stage}-")]
        assert files
        for number, path in enumerate(files):
            if tampering != "exchanged" or number % 2 == 0:  # there and back again would be no exchange
                TAMPERINGS[tampering](path, 0.7)

    assert disturbed(settled, tmp_path, tamper, STAGES[: STAGES.index(stage) + 1]) == "rebuilt"


@pytest.mark.long
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_the_manifest_that_was_tampered_with(settled, tmp_path, tampering):
    def tamper(work):
        for path in [path for path in artefacts(work) if path.name.startswith("manifest")]:
            TAMPERINGS[tampering](path, 0.7)

    result = disturbed(settled, tmp_path, tamper)
    assert result == "rebuilt" or (tampering == "a folder" and "manifest" in result)


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_in_an_artefacts_place_is_named(settled, tmp_path, stage):
    def tamper(work):
        first = next(path for path in artefacts(work) if path.relative_to(work).parts[0].startswith(f"{stage}-"))
        replace_by_folder(first, 0)
        names.append(first.stem)

    names: list[str] = []
    result = disturbed(settled, tmp_path, tamper, STAGES[: STAGES.index(stage) + 1])
    assert result == "rebuilt" or names[0] in result


@st.composite
def tamperings(draw):
    """Up to three changes, and the stages that are left."""
    change = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(list(TAMPERINGS)), st.floats(0, 0.999))
    return draw(st.lists(change, min_size=1, max_size=3)), draw(st.sets(st.sampled_from(STAGES)))


def any_tampering(settled, changes, lost):
    def tamper(work):
        for place, tampering, where in changes:
            files = artefacts(work)
            if files:
                TAMPERINGS[tampering](files[int(place * len(files))], where)

    with tempfile.TemporaryDirectory() as folder:
        disturbed(settled, Path(folder), tamper, [stage for stage in STAGES if stage not in lost])


@pytest.mark.long
@settings(max_examples=25, derandomize=True, **PROFILE)
@given(tamperings())
def test_any_tampering(settled, drawn):
    any_tampering(settled, *drawn)


@pytest.mark.slow
@settings(max_examples=1000, **PROFILE)
@given(tamperings())
def test_any_tampering_at_length(settled, drawn):
    any_tampering(settled, *drawn)
