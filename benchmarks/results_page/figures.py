"""The figures of docs/results.md as SVG files, the same bytes for the same records and matplotlib."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from .real import DEPTH, HEADS, LARGE, LONGER, ONCE, TEXTS, WIDTH, main_accuracies, perplexity_of, points, text_names
from .tables import (
    BEST_PEER,
    DEFAULT,
    FORMS,
    MIB,
    PAPER,
    RULE,
    by_parameters,
    load_names,
    lost,
    quality_records,
    record,
    removals,
    speed_of,
    speed_ratio,
)

plt.rcParams["svg.hashsalt"] = "fermisvd"
# A colour a way of making it smaller; solid is healed as a conversion heals, dash-dotted in large steps, dashed longer,
# dotted not at all
STYLES = {
    DEFAULT: "C0o-",
    f"default, {LARGE}": "C0o-.",
    f"default, {LONGER}": "C0o--",
    "default without healing": "C0o:",
    "default, neither refitted nor healed": "C0x:",
    "default, rescaled, neither refitted nor healed": "C0+:",
    PAPER: "C1s:",
    RULE: "C7s:",
    f"{DEPTH}, healed": "C2^-",
    f"{DEPTH}, {LARGE}": "C2^-.",
    f"{DEPTH}, {LONGER}": "C2^--",
    f"{WIDTH}, healed": "C3v-",
    f"{WIDTH}, {LARGE}": "C3v-.",
    f"{WIDTH}, {LONGER}": "C3v--",
    f"{HEADS}, healed": "C4v-",
    f"{HEADS}, {LONGER}": "C4v--",
}


def draw_quality(path: Path) -> None:
    """Log-perplexity over dense against the fraction removed, a panel a model."""
    found = quality_records()
    panels, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False)
    for axis, (name, about) in zip(axes[0], found.items(), strict=True):
        cells = about["cells"]
        for number, method in enumerate(about["protocol"]["methods"]):
            points = [(100 * r, lost(cells, method, r)) for r in removals(cells) if f"{method} | {r}" in cells]
            if points:
                axis.plot(*zip(*points, strict=True), f"C{number}", marker="o", label=method)
        if name in BEST_PEER:
            dense = cells["dense"]["perplexity"]
            peer = [(100 * r, math.log(p / dense)) for r, p in BEST_PEER[name].items()]
            axis.plot(*zip(*peer, strict=True), "k--", marker="x", label="best peer")
        axis.set(title=name, xlabel="% of linear parameters removed", ylim=(0, None))
    axes[0][0].set_ylabel("log-perplexity over dense")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda pair: len(pair[0]))
    panels.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    panels.tight_layout(rect=(0, 0.16, 1, 1))
    panels.savefig(path, metadata={"Date": None})


def draw_load(path: Path) -> None:
    """Tokens/s over dense by case, a panel a record; dashed what the parameters promise."""
    names = load_names()
    panels, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.8), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        about = record(name)
        cases = [case for case in about["runs"] if speed_of(case)]
        for number, form in enumerate(FORMS[1:], 1):
            ratios = [speed_ratio(about["runs"], case, form) for case in cases]
            axis.plot(cases, ratios, f"C{number}o-", label=form)
            if promised := by_parameters(about, form):
                axis.axhline(promised, color=f"C{number}", linestyle="--", linewidth=1)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=name.removeprefix("load-"), ylabel="tokens/s over dense")
        axis.tick_params(axis="x", rotation=35)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        axis.legend()
    panels.tight_layout()
    panels.savefig(path, metadata={"Date": None})


def draw_real(path: Path, about: dict, harness: dict | None) -> None:
    """The real model: perplexity on each text against the linear parameters that are kept, on the first text against
    the bytes of all weights, where rounded models are too, and mean accuracy where lm-eval was run; dense is a line."""
    texts, accuracy = text_names(about), main_accuracies(harness, about["cells"])
    shown = [(perplexity_of(about, text), "parameters", f"perplexity, {TEXTS.get(text, text)}") for text in texts]
    shown.append((shown[0][0], "bytes", shown[0][2]))
    if accuracy:
        shown.append((accuracy, "parameters", "mean accuracy of six tasks"))
    panels, grid = plt.subplots(2, 2, figsize=(9, 8.6))
    axes = grid.flatten()
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, (y, size, title) in zip(axes, shown, strict=False):
        for method, style in STYLES.items():
            if found := points(about, method, y, size):
                axis.plot(*zip(*found, strict=True), style, label=method)
        if "dense" in y:
            axis.axhline(y["dense"], color="black", linewidth=1, label="dense")
        for number, name in enumerate(ONCE[1:] if size == "bytes" else ()):
            if name in y:
                axis.plot(about["cells"][name]["bytes"] / MIB, y[name], "k" + "*x"[number], label=name)
        if y is not accuracy:
            axis.set(yscale="log")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which("{x:g}")
        axis.set(ylabel=title, xlabel="linear parameters kept, M" if size == "parameters" else "weights, MiB")
    labels = {
        label: line
        for axis in axes[: len(shown)]
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    panels.legend(list(labels.values()), list(labels), loc="lower center", ncol=2, frameon=False)
    panels.tight_layout(rect=(0, 0.19, 1, 1))
    panels.savefig(path, metadata={"Date": None})
    plt.close(panels)
