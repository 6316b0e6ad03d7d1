import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PatchCollection
from safetensors.torch import load_file
from typer.testing import CliRunner

from fermisvd.errors import FermiSVDError, FormatError
from fermisvd_convert import figures
from fermisvd_convert.cli import app
from fermisvd_convert.convert import convert
from fermisvd_convert.record import Record, decimated, kept_energy, read_record
from fermisvd_convert.stages.calibration import from_strips

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def _style():
    with figures.style():
        yield


def made_up(blocks: int, joint: bool = False, form: str = "pivga", **changes) -> dict:
    """A fermisvd.json of a model of so many blocks, its ranks and spectra different everywhere."""
    groups, full = [], 1024
    for block in range(blocks):
        kinds = [KINDS[:3], KINDS[3:4], KINDS[4:6], KINDS[6:]] if joint else [(kind,) for kind in KINDS]
        for number, members in enumerate(kinds):
            rank = 1 + (137 * block + 61 * number) % (full - 1)
            sigma = np.exp(-np.arange(full) / (50 + 20 * number + block))
            groups.append(
                {
                    "members": [f"model.layers.{block}.{kind}" for kind in members],
                    "form": form if number % 3 else "dense" if form == "svd" else form,
                    "side": "columns",
                    "rank": rank,
                    "full_rank": full,
                    "parameters_before": full**2,
                    "parameters_after": 2 * rank * full,
                    "kept_energy": kept_energy(sigma, rank),
                    "spectrum": decimated(sigma),
                }
            )
    names = [group["members"][0] for group in groups]
    steps = [
        {
            "step": i,
            "kl": 0.01 * (i + 1) ** 0.5,
            "kept": max(0.7, 1 - 0.05 * i),
            "share": [1.06 - 0.01 * i] * len(names),
        }
        for i in range(16)
    ]
    return {
        "model": "made-up",
        "model_sha256": "0" * 64,
        "settings": {"remove": 0.3, "form": form, "count": form, "ranks": "fermigrad"},
        "totals": {"removed": 0.3},
        "groups": groups,
        "trace": {"groups": names, "steps": steps},
        "perplexity": {"before": 10.0, "after": 12.0, "tokens": 8160},
        "bytes": {"before": 100_000_000, "after": 75_000_000},
        **changes,
    }


def record(*args, **changes) -> Record:
    return Record.model_validate(made_up(*args, **changes))


def write(folder, report):
    folder.mkdir(parents=True)
    (folder / "fermisvd.json").write_text(json.dumps(report))
    return folder


def cells(axis) -> dict[tuple[float, float], tuple[float, float]]:
    """What a panel of ranks shows: (block, row) of a cell's middle -> its height and colour value."""
    drawn: Any = next(c for c in axis.collections if isinstance(c, PatchCollection) and c.get_array() is not None)
    boxes = [path.get_extents() for path in drawn.get_paths()]
    middles = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    assert drawn.get_clim()[0] <= min(drawn.get_array()) and max(drawn.get_array()) <= drawn.get_clim()[1]
    return {at: (box.height, value) for at, box, value in zip(middles, boxes, drawn.get_array(), strict=True)}


@pytest.mark.parametrize("joint", [False, True])
def test_every_rank_and_kept_energy_is_in_its_cell(joint):
    report = record(5, joint=joint)
    ranks, energy = figures.draw_ranks(report).axes[:2]
    assert [text.get_text() for text in ranks.get_yticklabels()] == ["q", "k", "v", "o", "gate", "up", "down"]
    for axis, value, number in (
        (ranks, lambda g: g.rank / g.full_rank, lambda g: str(g.rank)),
        (energy, lambda g: 100 * g.kept_energy, lambda g: f"{100 * g.kept_energy:.1f}"),
    ):
        found, written = cells(axis), {text.get_position(): text.get_text() for text in axis.texts}
        assert len(found) == len(written) == len(report.groups)
        for group in report.groups:
            rows = [KINDS.index(name.split(".", 3)[3]) for name in group.members]
            at = (int(group.members[0].split(".")[2]), sum(rows) / len(rows))
            assert found[at] == pytest.approx((len(rows), value(group)))
            assert written[at] == number(group)


@pytest.mark.parametrize("blocks", [1, 5, 32, 33, 126])
def test_ranks_stay_readable(blocks):
    """No number wider than its cell, no tick's label upon the next one, no figure wider than a page can show."""
    figure = figures.draw_ranks(record(blocks))
    figure.canvas.draw()
    axis = figure.axes[0]
    assert figure.get_figwidth() < 17
    cell = axis.transData.transform([(1, 0), (0, 1)]) - axis.transData.transform((0, 0))
    assert bool(axis.texts) == (blocks <= 32)
    for text in axis.texts:
        box = text.get_window_extent()
        assert box.width < cell[0, 0] and box.height < abs(cell[1, 1])
    for ticks in (figure.axes[1].get_xticklabels(), axis.get_yticklabels()):
        boxes = [tick.get_window_extent() for tick in ticks if tick.get_text()]
        assert boxes and not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert all(tick == int(tick) for tick in figure.axes[1].get_xticks())


def test_dense_groups_are_grey():
    report = record(3, form="svd")
    for axis in figures.draw_ranks(report).axes[:2]:
        grey = next(c for c in axis.collections if isinstance(c, PatchCollection) and c.get_array() is None)
        stay = [group for group in report.groups if group.form == "dense"]
        at = {tuple(path.get_extents().min) for path in grey.get_paths()}
        places = [figures.block_and_kind(group.members[0]) for group in stay]
        assert at == {(block - 0.5, KINDS.index(kind) - 0.5) for block, kind in places}
        assert len(cells(axis)) == len(report.groups) - len(stay)
        assert [text.get_text() for text in axis.texts].count("dense") == len(stay) == 9
    assert "grey" in figures.draw_ranks(report).axes[0].get_title()
    assert "grey" not in figures.draw_ranks(record(3)).axes[0].get_title()


def test_members_apart_are_drawn_apart():
    """q and v of block 1 in one group, k alone between them."""
    report = made_up(2)
    q, _, v = report["groups"][7:10]
    q["members"] += v["members"]
    report["groups"].remove(v)
    found = cells(figures.draw_ranks(Record.model_validate(report)).axes[0])
    assert len(found) == 14 and all(height == 1 for height, _ in found.values())
    assert found[1, 0] == found[1, 2] != found[1, 1]


def test_trace():
    report = record(2)
    loss, kept, shares = figures.draw_trace(report).axes
    steps = report.trace.steps
    assert np.array_equal(loss.lines[0].get_xydata(), [(step.step, step.kl) for step in steps])
    assert np.allclose(kept.lines[0].get_ydata(), [100 * step.kept for step in steps])
    assert np.asarray(kept.lines[1].get_ydata())[0] == pytest.approx(70)  # the target
    assert [line.get_label() for line in shares.lines] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert np.allclose(shares.lines[0].get_ydata(), [min(1, 1.06 - 0.01 * i) for i in range(16)])
    other = record(2, settings={"remove": 0.3, "form": "pivga", "count": "svd"})
    assert len(figures.draw_trace(other).axes[1].lines) == 1  # counted in svd, the target is another


def test_trace_names_what_was_one_group_in_it():
    assert list(dict.fromkeys(figures.traced_kinds(record(2, joint=True)))) == ["q+k+v", "o", "gate+up", "down"]
    separate, joined = made_up(2), made_up(2, joint=True)
    joined["trace"] = separate["trace"]  # --groups auto: joined after FermiGrad
    assert figures.traced_kinds(Record.model_validate(joined))[:3] == ["q", "k", "v"]


def test_spectra_and_where_the_rank_cuts():
    report = record(3)
    figure = figures.draw_spectra(report)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["q", "k", "v", "o", "gate", "up", "down"]
    for number, axis in enumerate(panels.values()):
        curves, dots = axis.lines[::2], axis.lines[1::2]
        assert len(curves) == 3
        for block, (curve, dot) in enumerate(zip(curves, dots, strict=True)):
            decay = 50 + 20 * number + block  # sigma_j = exp(-j / decay), of which the curve must be a part
            x, y = curve.get_data()
            assert np.allclose(np.log(y), -1024 * np.array(x) / decay, atol=1e-4)
            rank = report.groups[7 * block + number].rank
            assert np.asarray(dot.get_xydata())[0] == pytest.approx((rank / 1024, math.exp(-rank / decay)), rel=1e-3)
            assert curve.get_color() == dot.get_color()


def test_spectrum_of_zeros_is_left_out():
    report = made_up(1)
    report["groups"][0]["spectrum"] = decimated(np.zeros(1024))
    axes = figures.draw_spectra(Record.model_validate(report)).axes
    assert len(axes[0].lines) == 0 and len(axes[1].lines) == 2


def test_quality_draws_a_line_a_method_and_a_panel_a_model():
    def of(after, size, remove=0.2, model="a", **settings):
        changes = {
            "model_sha256": model,
            "perplexity": {"before": 10.0, "after": after, "tokens": 99},
            "bytes": {"before": 100_000_000, "after": size},
            "totals": {"removed": remove},
        }
        return record(1, settings={"remove": remove, "form": "pivga", "ranks": "fermigrad", **settings}, **changes)

    points = [of(14.0, 60_000_000, 0.4), of(11.0, 80_000_000), of(12.5, 81_000_000, form="svd"), of(13.0, 7, model="b")]
    one, two = figures.draw_quality(points).axes
    drawn = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in one.lines}
    assert drawn == {"dense": [[100, 10]], "form pivga": [[60, 14], [80, 11]], "form svd": [[81, 12.5]]}
    assert {text.get_text() for text in one.texts} == {"20%", "40%"}
    assert {line.get_label() for line in two.lines} == {"dense", "form pivga, ranks fermigrad"}


def test_names_of_layers_and_folders(tmp_path):
    assert figures.block_and_kind("model.layers.12.self_attn.q_proj") == (12, "self_attn.q_proj")
    assert figures.block_and_kind("transformer.h.0.mlp.c_fc") == (0, "mlp.c_fc")
    names = [f"transformer.h.{i}.{kind}" for i in range(2) for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert list(figures.short_kinds(names).values()) == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    assert figures.labels([tmp_path / "x" / "out", tmp_path / "y" / "out"]) == ["x-out", "y-out"]
    assert figures.labels([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    with pytest.raises(FermiSVDError, match="given twice"):
        figures.labels([tmp_path / "x", tmp_path / "y" / ".." / "x"])


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory):
    """FermiGrad, groups as measured; and joint groups at another size, their factors as the SVD gives them."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "a.txt").write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(300)))
    settings = {"calibration": [str(folder / "a.txt")], "samples": 8, "sequence_length": 32, "steps": 4, "align": 1}
    convert(str(tiny_llama), folder / "small", 0.4, heal_steps=2, work=folder / "w", **settings)
    plain = {
        "heal_steps": 0,
        "refit": False,
        "form": "svd",
        "whitening": "input",
        "ranks": "uniform",
        "groups": "joint",
    }
    convert(str(tiny_llama), folder / "plain", 0.3, work=folder / "w", **settings, **plain)
    return folder


def test_kept_energy_is_one_less_the_error_of_what_was_written(converted, tiny_llama):
    """Reference: |W X|^2 and |(W - A B) X|^2 from the tensors on disk and the inputs' Gram matrices."""
    dense, small = load_file(tiny_llama / "model.safetensors"), load_file(converted / "plain" / "model.safetensors")
    grams = next((converted / "w").glob("gram-*"))
    for group in read_record(converted / "plain").groups:
        first = group.members[0]
        weight = torch.cat([dense[f"{name}.weight"] for name in group.members]).double()
        a = torch.cat([small[f"{name}.lowrank_a"] for name in group.members]).double()
        error = weight - a @ small[f"{first}.lowrank_b"].double()
        gram = from_strips(load_file(grams / f"{first}.safetensors"), torch.device("cpu")).double()
        lost = ((error @ gram) * error).sum() / ((weight @ gram) * weight).sum()
        assert group.kept_energy == pytest.approx(1 - lost.item(), abs=2e-5)
        assert group.spectrum is not None and group.spectrum.index[-1] == group.full_rank - 1


@pytest.mark.long
def test_report_command_draws_a_conversion_and_compares(converted, tmp_path):
    outs = [str(converted / "small"), str(converted / "plain")]
    result = CliRunner().invoke(app, ["report", *outs, "--to", str(tmp_path / "to")])
    assert result.exit_code == 0, result.output
    names = {"small-ranks.svg", "small-trace.svg", "small-spectra.svg", "plain-ranks.svg", "plain-spectra.svg"}
    assert {path.name for path in (tmp_path / "to").iterdir()} == names | {"quality.svg"}
    assert all(str(tmp_path / "to" / name) in result.output.replace("\n", "") for name in names)
    for path in (tmp_path / "to").iterdir():
        assert ET.parse(path).getroot().tag.endswith("svg")
    result = CliRunner().invoke(app, ["report", outs[0], "--to", str(tmp_path / "one"), "--format", "png"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"ranks.png", "trace.png", "spectra.png"}


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_bytes_every_time(converted, tmp_path, suffix):
    """In another process too, and whatever the user's own style is."""
    out, style = converted / "small", tmp_path / "matplotlibrc"
    style.write_text("font.size: 20\nlines.linewidth: 9\n")
    figures.draw_figures([out], tmp_path / "a", suffix)
    code = f"draw_figures([Path({str(out)!r})], Path({str(tmp_path / 'b')!r}), {suffix!r})"
    code = f"from pathlib import Path; from fermisvd_convert.figures import draw_figures; {code}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MATPLOTLIBRC": str(style)})
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_earlier_file_is_drawn_as_far_as_it_goes(tmp_path, caplog):
    report = made_up(2, trace={"groups": [], "steps": []})
    for group in report["groups"]:
        del group["kept_energy"], group["spectrum"]
    drawn = figures.draw_figures([write(tmp_path / "old", report)], tmp_path / "to")
    assert [path.name for path in drawn] == ["ranks.svg"]
    assert "old: made by an earlier version, which kept no spectra and no kept energy" in caplog.text
    assert "old: no FermiGrad trace to draw" in caplog.text
    assert len(figures.draw_ranks(Record.model_validate(report)).axes) == 2  # ranks and their colours


@pytest.mark.long
def test_healed_checkpoints_are_no_point_of_quality(tmp_path, caplog):
    outs = [write(tmp_path / name, made_up(1)) for name in ("a", "b", "c")]
    (outs[1] / "healing.json").write_text("{}")
    assert "quality.svg" in {path.name for path in figures.draw_figures(outs, tmp_path / "three")}
    assert "b: healed after its perplexity was measured" in caplog.text
    assert "quality.svg" not in {path.name for path in figures.draw_figures(outs[:2], tmp_path / "two")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("", "broken: Expecting value"),
        (json.dumps(made_up(1))[:-9], "broken"),
        ("[]", "valid dictionary"),
        (b"\xff\xfe", "broken"),
        (json.dumps(made_up(1, groups=[])), "groups: List should have at least 1 item"),
        (json.dumps({**made_up(1), "perplexity": {}}), "perplexity.before: Field required"),
        (json.dumps(made_up(1)).replace("layers.0.", "layers."), "groups.0.members.0: String should match"),
        (json.dumps(made_up(1)).replace('"rank": 62', '"rank": "x"'), "groups.1.rank: Input should be a valid integer"),
        (json.dumps(made_up(1)).replace('"share": [1.06, ', '"share": ['), "shares are not those of 7 groups"),
        (json.dumps(made_up(1)).replace('"sigma": [1.0, ', '"sigma": ['), "indices of"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    out = write(tmp_path / "out", {})
    path = out / "fermisvd.json"
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    good = write(tmp_path / "good", made_up(1))
    with pytest.raises(FormatError) as error:
        figures.draw_figures([good, out], tmp_path / "to")
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert not (tmp_path / "to").exists()
    result = CliRunner().invoke(app, ["report", str(out), "--to", str(tmp_path / "to")])
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    out = write(tmp_path / "out", made_up(1))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["report", str(out), "--to", str(tmp_path / "to")])
    assert result.exit_code == 2 and 'pip install "fermisvd[report]"' in result.output
    assert not (tmp_path / "to").exists()
