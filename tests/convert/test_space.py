"""The space that is counted before long work, against what a conversion writes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fermisvd.errors import OutputError
from fermisvd.groups import LinearGroup
from fermisvd_convert.conversion import Conversion
from fermisvd_convert.convert import convert
from fermisvd_convert.memory import Limits
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.preflight import check_room, prepare
from fermisvd_convert.space import check_space, out_bytes, work_bytes
from fermisvd_convert.stages.calibration import statistics_of
from fermisvd_convert.stages.decomposition import KeptDecomposition, decomposition_of
from fermisvd_convert.stages.structure import find_structure


def conversion_of(model: Path, out: Path, work: Path, options: dict) -> Conversion:
    conversion = prepare(str(model), out, ConvertOptions.named(remove=0.3, work=work, **options))
    return check_room(conversion, find_structure(conversion).groups)


def parts_of(conversion: Conversion) -> tuple[KeptDecomposition, list[LinearGroup]]:
    return decomposition_of(conversion, statistics_of(conversion)), find_structure(conversion).groups


def counted(model: Path, out: Path, work: Path, options: dict) -> dict[Path, dict[str, int]]:
    """As preflight counts it."""
    conversion = conversion_of(model, out, work, options)
    decomposition, groups = parts_of(conversion)
    return {out: out_bytes(conversion, groups), work: work_bytes(conversion, decomposition, groups)}


def test_what_is_counted_is_what_is_written(tiny_llama, tmp_path):
    """Estimates against the files of a conversion with every stage: never less, and not much more."""
    text, out, work = (tmp_path / name for name in ("text.txt", "out", "work"))
    text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(300)))
    options = dict(calibration=[str(text)], samples=8, gradient_samples=8, sequence_length=32, steps=2)
    options |= dict(heal_steps=1, refit=True)
    before = counted(tiny_llama, out, work, options)
    convert(tiny_llama, out, 0.3, work=work, **options)
    margin = 2 * 2**20  # "other files" and "other stages" are rounded up by a MiB each
    for folder in (out, work):
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        estimate = sum(before[folder].values())
        assert written <= estimate <= 1.5 * written + margin, (folder.name, written, before[folder])
    shutil.rmtree(out)
    again = counted(tiny_llama, out, work, options)[work]
    assert again["input Gram matrices"] == again["output Gram matrices"] == 0
    assert again["factors"] < before[work]["factors"]
    states = [each["the teacher's states"] for each in (before[work], again)]
    assert states[0] > 0 and states[1] == 0
    text.write_text("".join(f"while {i}:\n    {i}\n\n" for i in range(300)))  # whose states are not those
    assert counted(tiny_llama, out, work, options)[work]["the teacher's states"] == states[0]
    none = replace(conversion_of(tiny_llama, out, work, options), limits=Limits(0, 0))
    assert work_bytes(none, *parts_of(none))["hidden states on the way to them"] == states[0]


def test_folders_on_one_disk_are_counted_together(tmp_path):
    """Each alone would fit."""
    half = shutil.disk_usage(tmp_path).free // 2
    check_space({tmp_path / "a": {"x": half // 2}, tmp_path / "b": {"y": half}})
    with pytest.raises(OutputError, match=r"a: x .*; .*b: y "):
        check_space({tmp_path / "a": {"x": half + 2**30}, tmp_path / "b": {"y": half + 2**30}})
