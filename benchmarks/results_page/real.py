"""The real model's record, and lm-eval's of the same model, as tables for page.md and for README.

They are real-MODEL.json of benchmarks.quality.real and harness-MODEL.json of benchmarks.quality.harness. Cells that
were not run are empty, and a record that is not there is said not to be run yet.
"""

import math
import statistics

from benchmarks.cells import folder_of, method_of, removal_of

from .tables import DEFAULT, MIB, PAPER, README_FRACTIONS, RESULTS, RULE, lost, markdown, record, recorded, removals

MODEL = "smollm2"
NOT_RUN = "Not run yet."
LONGER, LARGE = "healed for 1,000 steps", "healed in large steps"
DEPTH, WIDTH, HEADS = "depth pruning", "width pruning, MLP", "width pruning, MLP and heads"
ONCE = ("dense", "int8, rounded to nearest", "int4, rounded to nearest")
METHODS = (
    RULE,
    PAPER,
    "default without healing",
    "default, neither refitted nor healed",
    "default, rescaled, neither refitted nor healed",
    DEFAULT,
    f"default, {LARGE}",
    f"default, {LONGER}",
    "default, mixed calibration",
    "default, svd form",
    *(
        f"{pruned}{healing}"
        for pruned in (DEPTH, WIDTH, HEADS)
        for healing in ("", ", healed", f", {LARGE}", f", {LONGER}")
    ),
)
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}
TASKS = {
    "piqa": "PIQA",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "lambada_openai": "LAMBADA",
}
README_ROWS = {
    RULE: "SVD-LLM's rule",
    PAPER: "the paper's recipe",
    f"{DEPTH}, {LARGE}": "depth pruning *",
    f"{WIDTH}, {LARGE}": "width pruning *",
    f"default, {LARGE}": "default *",
    f"{DEPTH}, healed": "depth pruning",
    f"{WIDTH}, healed": "width pruning",
    DEFAULT: "**default**",
    f"default, {LONGER}": f"**default, {LONGER}**",
}
OURS = (f"default, {LARGE}", DEFAULT, f"default, {LONGER}")  # that README shows at its further fractions


def optional(name: str) -> dict | None:
    return record(name) if (RESULTS / f"{name}.json").exists() else None


def real_record() -> dict | None:
    return optional(f"real-{MODEL}")


def harness_record() -> dict | None:
    return optional(f"harness-{MODEL}")


# Perplexity


def text_names(about: dict) -> list[str]:
    return list(about["protocol"]["evaluation"])


def row_names(about: dict, once: bool) -> list[str]:
    """Those that are known, then what else the record has; once: what nothing is removed from."""
    there = (method_of(key) for key in about["cells"] if (removal_of(key) is None) == once)
    return list(dict.fromkeys([*(ONCE if once else METHODS), *there]))


def perplexity_table(about: dict, remove: float | None) -> str:
    """A row a method, of one fraction removed, or of None for what nothing is removed from: size, time, and for each
    text perplexity, KL to dense and, where something is removed, the share of SVD-LLM's rule's loss."""
    cells, texts = about["cells"], text_names(about)
    title, rows = "nothing removed" if remove is None else f"{remove:.0%} removed", []
    head = [title, "parameters, M", "MiB", "made in, s"]
    for text in texts:
        head += [TEXTS.get(text, text), "KL", *([] if remove is None else ["of the rule's loss"])]
    for name in row_names(about, once=remove is None):
        cell = cells.get(name if remove is None else f"{name} | {remove}")
        row = [name]
        if cell:
            row += [f"{cell['parameters'] / 1e6:.1f}", f"{cell['bytes'] / MIB:.0f}", f"{cell['seconds']:,.0f}"]
            for text in texts:
                row += [f"{cell[text]['perplexity']:,.2f}", f"{cell[text]['kl']:.4f}"]
                row += [] if remove is None else [rule_share(of_text(about, text), name, remove)]
        rows.append([*row, *[""] * (len(head) - len(row))])
    return markdown(head, rows)


def of_text(about: dict, text: str) -> dict[str, dict]:
    """The cells with one text's figures alone."""
    return {key: cell[text] for key, cell in about["cells"].items()}


def rule_share(cells: dict[str, dict], method: str, remove: float) -> str:
    """Log-perplexity over dense as a share of SVD-LLM's rule's; empty where dense or the rule was not run."""
    if not {"dense", f"{RULE} | {remove}"} <= cells.keys():
        return ""
    return f"{lost(cells, method, remove) / lost(cells, RULE, remove):.3f}"


def perplexities(about: dict) -> str:
    """All tables of a record."""
    found = [perplexity_table(about, remove) for remove in (None, *removals(about["cells"]))]
    return "\n\n".join(found)


# lm-eval


def accuracies(harness: dict, cells: dict) -> dict[str, dict[str, dict]]:
    """Rows of lm-eval by engine and by cell of the real model's record, whose models' folders have the cells' names;
    the dense model's is its own. Folders of no cell keep their name."""
    names = {folder_of(key): key for key in cells} | {MODEL: "dense"}
    found: dict[str, dict[str, dict]] = {}
    for row, tasks in harness["rows"].items():
        folder, engine = row.rsplit(", ", 1)
        found.setdefault(engine, {})[names.get(folder, folder)] = tasks
    return found


def mean_accuracy(tasks: dict[str, dict]) -> float | None:
    """Of the six tasks' `acc`; None where one was not run."""
    return statistics.fmean(tasks[task]["acc"] for task in TASKS) if tasks.keys() >= TASKS.keys() else None


def accuracy_table(harness: dict, cells: dict) -> str:
    """Accuracy and its standard error in percent, a row a model and engine; the mean where all six were run."""
    by_engine, rows = accuracies(harness, cells), []
    for key in dict.fromkeys(key for found in by_engine.values() for key in found):
        for engine, found in by_engine.items():
            if key not in found:
                continue
            row = [key.replace(" | ", ", "), engine]
            for task in TASKS:
                cell = found[key].get(task)
                row.append(f"{100 * cell['acc']:.1f} ± {100 * cell['acc_stderr']:.1f}" if cell else "")
            mean = mean_accuracy(found[key])
            rows.append([*row, "" if mean is None else f"{100 * mean:.1f}"])
    return markdown(["model", "engine", *TASKS.values(), "mean"], rows)


def main_accuracies(harness: dict | None, cells: dict) -> dict[str, float]:
    """Mean accuracy by cell, of one engine: transformers', and vLLM's for what that has not."""
    by_engine = accuracies(harness, cells) if harness else {}
    both = by_engine.get("vllm", {}) | by_engine.get("hf", {})
    return {key: mean for key, tasks in both.items() if (mean := mean_accuracy(tasks)) is not None}


# Figures' numbers


def points(about: dict, method: str, y: dict[str, float], size: str = "parameters") -> list[tuple[float, float]]:
    """(size, y) of a method's cells by fraction removed; size: parameters in millions or bytes in MiB."""
    unit = 1e6 if size == "parameters" else MIB
    keys = [f"{method} | {remove}" for remove in removals(about["cells"])]
    return [(about["cells"][key][size] / unit, y[key]) for key in keys if key in about["cells"] and key in y]


def perplexity_of(about: dict, text: str) -> dict[str, float]:
    """By cell, finite ones."""
    found = {key: cell["perplexity"] for key, cell in of_text(about, text).items()}
    return {key: value for key, value in found.items() if math.isfinite(value)}


# Parts of the page


def perplexity_part() -> str:
    about = real_record()
    if about is None:
        return NOT_RUN
    return f"![perplexity against size](real.svg)\n\n{perplexities(about)}\n\n{recorded(f'real-{MODEL}')}"


def accuracy_part() -> str:
    harness = harness_record()
    if harness is None:
        return NOT_RUN
    cells = (real_record() or {"cells": {}})["cells"]
    return f"{accuracy_table(harness, cells)}\n\n{recorded(f'harness-{MODEL}')}"


PARTS = {"real perplexity": perplexity_part, "real accuracy": accuracy_part}


# README


def readme_table(about: dict, harness: dict | None) -> str:
    """The figure, and perplexity on the first text with mean accuracy where it was measured: dense and rounded, then
    what keeps fewer parameters, and ours with still fewer. Raises SystemExit where dense or the default was not run."""
    cells, accuracy = about["cells"], main_accuracies(harness, about["cells"])
    if "dense" not in cells or DEFAULT not in map(method_of, cells):
        raise SystemExit(f"real-{MODEL}.json has no dense, or no {DEFAULT}, which README shows")
    text = text_names(about)[0]

    def row(title: str, removed: str, key: str) -> list[str]:
        cell = cells[key]
        found = [title, removed, f"{cell['bytes'] / MIB:.0f}", f"{cell[text]['perplexity']:,.2f}"]
        mean = f"{100 * accuracy[key]:.1f}" if key in accuracy else ""
        return [*found, mean] if accuracy else found

    rows = [row(name, "", name) for name in ONCE if name in cells]
    first, *further = README_FRACTIONS
    shown = [(method, first) for method in README_ROWS]
    for remove in removals(cells):
        if remove > first:
            shown += [(method, remove) for method in (OURS if remove in further else [DEFAULT])]
    for method, remove in shown:
        if (key := f"{method} | {remove}") in cells:
            rows.append(row(README_ROWS[method], f"{remove:.0%}", key))
    head = ["", "removed", "MiB", "perplexity", *(["accuracy, %"] if accuracy else [])]
    figure = "![perplexity and accuracy by parameters kept](docs/real.svg)"
    return f"{figure}\n\n{markdown(head, rows)}"


def readme_part() -> str:
    """Raises SystemExit without a record."""
    about = real_record()
    if about is None:
        raise SystemExit(f"README shows real-{MODEL}.json, which is not there")
    return readme_table(about, harness_record())
