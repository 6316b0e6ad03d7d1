"""The figures of docs/results.md: quality.svg and load.svg, the same bytes for the same records and matplotlib."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from .tables import (
    BEST_PEER,
    FORMS,
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
