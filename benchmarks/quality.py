"""The README's quality table: perplexity of every form, grouping and rank rule at 20, 30 and 40 % removed.

    python benchmarks/quality.py                       # run what is missing, then rewrite the table in README.md
    python benchmarks/quality.py --only stories260K    # one model
    python benchmarks/quality.py --table-only

Finished cells are kept in benchmarks/results/quality-MODEL.json and skipped the next time, unless the protocol or the
version has changed, or --fresh is given. stories260K needs the shared
data beside the repository; without it only the demo model is measured.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from fermisvd import load_model
from fermisvd.budget import Form, uniform_rank
from fermisvd.calibration import gram_matrices
from fermisvd.decomposition import data_aware_svd
from fermisvd.fermigrad import FermiGradSettings
from fermisvd.groups import Partition, find_groups, stacked_weight
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.source import load_tokenizer
from fermisvd_convert.text import windows_of

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "tests" / "models"))
from stdlib_text import write_texts  # noqa: E402

RULES = {
    "uniform": {"ranks": "uniform"},
    "FermiGrad, penalty": {"ranks": "fermigrad", "constraint": "penalty"},
    "FermiGrad, projection": {"ranks": "fermigrad", "constraint": "projection"},
}
ROUNDED_DOWN = "uniform, rounded down"
REMOVALS = (0.2, 0.3, 0.4)
FORMS, GROUPS = ("svd", "pivga"), ("separate", "joint")
PROTOCOL = {"samples": 256, "gradient_samples": 256, "sequence_length": 256, "align": 1}
EVALUATION_WINDOWS = 96


def models(folder: Path) -> dict[str, dict]:
    """Name -> path, calibration text and evaluation text."""
    texts = write_texts(folder)
    found = {
        "stdlib-2m": {
            "path": ROOT / "tests" / "models" / "stdlib-2m",
            "calibration": texts["calibration"],
            "evaluation": texts["validation"],
        }
    }
    stories = SHARED / "checkpoints" / "stories260K"
    if stories.is_dir():
        text = SHARED / "text"
        found["stories260K"] = {
            "path": stories,
            "calibration": text / "tinystories.train.txt",
            "evaluation": text / "tinystories.valid.txt",
        }
    return found


def results_file(name: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"quality-{name}.json"


def new_results() -> dict:
    return {
        "protocol": {**PROTOCOL, "evaluation_windows": EVALUATION_WINDOWS, "fermigrad": asdict(FermiGradSettings())},
        "command": "python benchmarks/quality.py",
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "date": time.strftime("%F"),
        "versions": {package: version(package) for package in ("fermisvd", "torch", "transformers")},
        "cells": {},
    }


def rounded_down(path: Path, groups: Partition, form: Form, remove: float, windows: torch.Tensor) -> nn.Module:
    """The dense model with every group at its uniform rank rounded down, in its own type: DESIGN's uniform rows.

    They leave up to one rank a group unspent, so the converter does not write them. windows: calibration text.
    """
    model = load_model(path)
    layers = find_groups(model, groups)
    grams = gram_matrices(model, [group.source for group in layers], windows.split(8))
    for group in layers:
        factors = data_aware_svd(stacked_weight(model, group), grams[group.source])
        a, b = factors.truncated(int(uniform_rank(group, remove, form)))
        with torch.no_grad():
            for member, part in zip(group.members, (a @ b).split(list(group.member_rows)), strict=True):
                model.get_submodule(member).weight.copy_(part)
    return model


def measure(only: str | None, fresh: bool) -> None:
    """Fill the JSON files cell by cell."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models(Path(scratch)).items():
            if only not in (None, name):
                continue
            out = results_file(name)
            results = new_results()
            if out.exists() and not fresh:
                earlier = json.loads(out.read_text())
                if all(earlier.get(key) == results[key] for key in ("protocol", "versions")):
                    results["cells"] = earlier["cells"]
            windows = windows_of(load_tokenizer(model["path"]), str(model["evaluation"]), 256, EVALUATION_WINDOWS)
            cells = results["cells"]
            if "dense" not in cells:
                cells["dense"] = evaluate(load_model(model["path"]), windows).as_dict()
            text = windows_of(load_tokenizer(model["path"]), str(model["calibration"]), 256, PROTOCOL["samples"])
            for form, groups, remove in itertools.product(FORMS, GROUPS, REMOVALS):
                key = f"{form} | {groups} | {ROUNDED_DOWN} | {remove}"
                if key not in cells:
                    down = rounded_down(model["path"], groups, form, remove, text)
                    cells[key] = evaluate(down, windows).as_dict()
                    print(name, key, f"{cells[key]['perplexity']:.3f}", flush=True)
                    out.write_text(json.dumps(results, indent=1) + "\n")
            for form, groups, rule, remove in itertools.product(FORMS, GROUPS, RULES, REMOVALS):
                key = f"{form} | {groups} | {rule} | {remove}"
                if key in cells:
                    continue
                folder = Path(scratch) / "out"
                begin = time.perf_counter()
                report = convert(
                    str(model["path"]),
                    folder,
                    remove,
                    form=form,
                    groups=groups,
                    calibration=[str(model["calibration"])],
                    work=Path(scratch) / "work" / name,
                    overwrite=True,
                    **PROTOCOL,
                    **RULES[rule],
                )
                result = evaluate(load_model(folder), windows, load_model(model["path"]))
                cells[key] = {
                    **result.as_dict(),
                    "removed": report["totals"]["removed"],
                    "seconds": round(time.perf_counter() - begin, 1),
                }
                print(name, key, f"{result.perplexity:.3f}", f"{cells[key]['seconds']} s", flush=True)
                out.write_text(json.dumps(results, indent=1) + "\n")


def table() -> str:
    """Markdown: a row for form, groups and rule, a column for each model and fraction."""
    found = {name: results_file(name) for name in ("stdlib-2m", "stories260K")}
    cells = {name: json.loads(path.read_text())["cells"] for name, path in found.items() if path.exists()}
    columns = [(name, remove) for name in cells for remove in REMOVALS]
    head = [f"{name} ({cells[name]['dense']['perplexity']:.3f}), {remove:.0%}" for name, remove in columns]
    lines = ["| form, groups, ranks | " + " | ".join(head) + " |", "|---" * (len(columns) + 1) + "|"]
    for form, groups, rule in itertools.product(FORMS, GROUPS, [ROUNDED_DOWN, *RULES]):
        values = []
        for name, remove in columns:
            cell = cells[name].get(f"{form} | {groups} | {rule} | {remove}")
            values.append(f"{cell['perplexity']:.3f}" if cell else "")
        lines.append(f"| {form}, {groups}, {rule} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def write_readme() -> None:
    """Put the table between its marks in README.md."""
    begin, end = "<!-- quality table: make table -->\n", "<!-- end of quality table -->"
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{table()}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table_only:
        measure(arguments.only, arguments.fresh)
    write_readme()
