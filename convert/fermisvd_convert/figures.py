"""The figures of `fermisvd report`: ranks and kept energy, FermiGrad's trace, spectra, quality against size.

Drawn from fermisvd.json alone, and the same bytes every time: no date, no random ids, nothing of the user's own style.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fermisvd.errors import FermiSVDError
from fermisvd_convert.record import BLOCK_NUMBER, GroupRow, Record, read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("fermisvd")

STYLE = {"svg.hashsalt": "fermisvd", "font.size": 9, "axes.titlesize": 9, "legend.frameon": False}
NUMBERED_BLOCKS = 32  # up to so many decoder blocks a cell is wide enough for its number
DRAWN_LINES = 300  # more lines than these are stored as pixels


def draw_figures(outs: Sequence[Path], folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw every figure of the checkpoints `outs` into `folder`, which is made if need be; returns the files, in order.

    suffix: svg or png. What a checkpoint's fermisvd.json has no data for is left out, and a log line says so. Raises
    FermiSVDError, and FormatError for a fermisvd.json that is not there or broken, before anything is drawn.
    """
    with style():
        records = dict(zip(labels(outs), map(read_record, outs), strict=True))
        drawn: list[tuple[str, Figure]] = []
        for label, record in records.items():
            prefix = f"{label}-" if len(records) > 1 else ""
            drawn.append((f"{prefix}ranks", draw_ranks(record)))
            if record.trace.steps:
                drawn.append((f"{prefix}trace", draw_trace(record)))
            else:
                logger.warning("%s: no FermiGrad trace to draw, ranks: %s", label, record.settings.get("ranks"))
            if record.has_spectra():
                drawn.append((f"{prefix}spectra", draw_spectra(record)))
            else:
                logger.warning("%s: made by an earlier version, which kept no spectra and no kept energy", label)
        compared = dict(records)
        for label, out in zip(records, outs, strict=True):
            if (out / "healing.json").exists():
                logger.warning("%s: healed after its perplexity was measured; not in quality against size", label)
                del compared[label]
        if len(compared) > 1:
            drawn.append(("quality", draw_quality(list(compared.values()))))
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.{suffix}" for name, _ in drawn]
        for path, (_, figure) in zip(paths, drawn, strict=True):
            save(figure, path)
    return paths


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's own are. Raises FermiSVDError."""
    try:
        import matplotlib
    except ImportError as error:
        raise FermiSVDError(f'matplotlib cannot be imported ({error}): pip install "fermisvd[report]"') from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]: keys are literals there
        yield


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure  # no pyplot: no window, no state

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write an svg or a png by the path's suffix, without what differs from one time to the next."""
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def labels(outs: Sequence[Path]) -> list[str]:
    """A name for each folder: its last part, or as many of its last parts as tell it from the others.

    Raises FermiSVDError if a folder is given twice.
    """
    parts = [out.resolve().parts[1:] for out in outs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise FermiSVDError(f"{', '.join(map(str, outs))}: a folder is given twice")


def block_and_kind(name: str) -> tuple[int, str]:
    """Decoder block and kind of a layer: model.layers.3.self_attn.q_proj -> 3, self_attn.q_proj."""
    match = re.search(BLOCK_NUMBER, name)
    assert match is not None, name
    return int(match[0].strip(".")), name[match.end() :]


def short_kinds(names: Iterable[str]) -> dict[str, str]:
    """Kinds of the layers, in order, and what they are called: q for self_attn.q_proj, unless two would be the same."""
    short = {
        kind: kind.rpartition(".")[2].removesuffix("_proj") for kind in (block_and_kind(name)[1] for name in names)
    }
    count = Counter(short.values())
    return {kind: word if count[word] == 1 else kind for kind, word in short.items()}


def title_of(record: Record) -> str:
    settings = record.settings
    return (
        f"{record.model}, {record.totals.removed:.1%} of the linear parameters removed "
        f"({settings.get('form')} form, {settings.get('ranks')} ranks)"
    )


def draw_ranks(record: Record) -> "Figure":
    """Ranks and, where known, kept energy of every group: decoder blocks across, kinds of layer down.

    A group is one cell, as high as it has members. Numbers are written in the cells where there is room for them.
    """
    blocks = [block_and_kind(group.members[0])[0] for group in record.groups]
    kinds = short_kinds(name for group in record.groups for name in group.members)
    count = max(blocks) - min(blocks) + 1
    width = 2.2 + (max(0.45 * count, 4) if count <= NUMBERED_BLOCKS else 12)
    panels = 2 if record.has_spectra() else 1
    figure = new_figure(width, 0.5 + panels * (0.6 + 0.26 * len(kinds)), title_of(record))
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    dense = "; grey: stays dense" if any(group.form == "dense" for group in record.groups) else ""
    shares = [group.rank / group.full_rank for group in record.groups]
    _draw_cells(axes[0], record, kinds, shares, [str(group.rank) for group in record.groups], (0, 1))
    axes[0].set_title(f"rank r (colour: r / k, k the full rank{dense})")
    if record.has_spectra():
        kept = [100 * (group.kept_energy or 0) for group in record.groups]
        least = min(99, int(min(kept)))
        _draw_cells(axes[1], record, kinds, kept, [f"{energy:.1f}" for energy in kept], (least, 100))
        axes[1].set_title(r"kept energy, % ($\sum_{j<r} \sigma_j^2$ of $\sum_j \sigma_j^2$)")
    axes[-1].set_xlabel("decoder block")
    axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


def _draw_cells(
    axis: "Axes",
    record: Record,
    kinds: dict[str, str],
    values: list[float],
    numbers: list[str],
    limits: tuple[float, float],
) -> None:
    """A cell a group: coloured by its value, from the lower limit to the upper, and grey where it stays dense."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    order = {kind: row for row, kind in enumerate(kinds)}
    blocks = [block_and_kind(group.members[0])[0] for group in record.groups]
    written = max(blocks) - min(blocks) < NUMBERED_BLOCKS
    coloured, colours, dense = [], [], []
    for group, block, value, number in zip(record.groups, blocks, values, numbers, strict=True):
        rows = np.array(sorted(order[block_and_kind(name)[1]] for name in group.members))
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):  # members are neighbours but in odd models
            cell = Rectangle((block - 0.5, run[0] - 0.5), 1, len(run))
            text, bright = number, value > limits[0] + 0.6 * (limits[1] - limits[0])
            if group.form == "dense":
                dense.append(cell)
                text, bright = "dense", True
            else:
                coloured.append(cell)
                colours.append(value)
            if written:
                colour = "black" if bright else "white"
                axis.text(block, run.mean(), text, ha="center", va="center", fontsize=7, color=colour)
    edges = {"edgecolor": "white", "linewidth": 1 if written else 0.3}
    drawn = PatchCollection(coloured, cmap="viridis", **edges)
    drawn.set_array(colours)
    drawn.set_clim(*limits)
    axis.add_collection(drawn)
    axis.add_collection(PatchCollection(dense, facecolor="0.8", **edges))
    axis.set(
        xlim=(min(blocks) - 0.5, max(blocks) + 0.5),
        ylim=(len(kinds) - 0.5, -0.5),
        yticks=range(len(kinds)),
        yticklabels=kinds.values(),
    )
    axis.tick_params(length=0)
    axis.figure.colorbar(drawn, ax=axis, pad=0.02, fraction=0.05, aspect=12)


def draw_trace(record: Record) -> "Figure":
    """FermiGrad by step: the loss, the kept fraction of the parameters, and the mean gate position of each kind."""
    steps = [step.step for step in record.trace.steps]
    figure = new_figure(7.5, 6.5, title_of(record))
    loss, kept, shares = figure.subplots(3, 1, sharex=True, height_ratios=(1, 0.8, 1.3))
    loss.plot(steps, [step.kl for step in record.trace.steps], color="black")
    loss.set(ylabel="KL(teacher || student)\nnats a token", ylim=(0, None))
    kept.plot(steps, [100 * step.kept for step in record.trace.steps], color="black")
    settings = record.settings
    kept.set_ylabel(f"{'bytes' if settings.get('bytes') else 'parameters'}\nkept, %")
    if settings.get("count") == settings.get("form"):  # else the trace counts in another form than the target is given
        target = 100 * (settings.get("bytes") or 1 - settings["remove"])
        kept.axhline(target, color="grey", linestyle=":", linewidth=1)
        kept.annotate(f"target {target:.4g}", (steps[0], target), (0, 3), textcoords="offset points", color="grey")
    by_step = np.clip([step.share for step in record.trace.steps], 0, 1)  # above 1 the gate is fully open
    names = traced_kinds(record)
    for number, kind in enumerate(dict.fromkeys(names)):
        columns = [i for i, name in enumerate(names) if name == kind]
        line = ("-", "--", ":")[number // 10 % 3]
        shares.plot(steps, by_step[:, columns].mean(axis=1), f"C{number % 10}{line}", label=kind)
    shares.set(xlabel="FermiGrad step", ylabel="gate position mu / k,\nmean over blocks")
    shares.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (loss, kept, shares):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def traced_kinds(record: Record) -> list[str]:
    """Kind of each group of the trace: q+k+v where they are one group in it, q where the joining came later."""
    traced = set(record.trace.groups)
    rest = {group.members[0]: [name for name in group.members if name not in traced] for group in record.groups}
    kinds = short_kinds(name for group in record.groups for name in group.members)
    return [
        "+".join(kinds[block_and_kind(name)[1]] for name in [first, *rest.get(first, [])])
        for first in record.trace.groups
    ]


def draw_spectra(record: Record) -> "Figure":
    """Singular values of every group relative to the first, a panel a kind; a dot where the rank cuts."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    kinds = short_kinds(name for group in record.groups for name in group.members)
    order = list(kinds)
    panels: dict[tuple[int, ...], list[GroupRow]] = {}
    for group in record.groups:
        panels.setdefault(tuple(order.index(block_and_kind(name)[1]) for name in group.members), []).append(group)
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(2.4 * across + 1.2, 2.2 * down + 0.9, title_of(record))
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    blocks = [block_and_kind(group.members[0])[0] for group in record.groups]
    dark = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))  # without the yellow, too light for lines
    colours = ScalarMappable(Normalize(min(blocks), max(max(blocks), min(blocks) + 1)), dark)
    many = len(record.groups) > DRAWN_LINES
    for number, (axis, members) in enumerate(zip(axes, sorted(panels), strict=False)):
        axis.set_title("+".join(kinds[order[kind]] for kind in members))
        axis.tick_params(labelbottom=number + across >= len(panels))
        axis.grid(color="0.93")
        for group in panels[members]:
            assert group.spectrum is not None
            sigma = np.array(group.spectrum.sigma)
            known = sigma > 0
            if not known.any():
                continue
            index, relative = np.array(group.spectrum.index)[known], sigma[known] / sigma[0]
            colour = colours.to_rgba(np.array(block_and_kind(group.members[0])[0]))
            axis.semilogy(index / group.full_rank, relative, color=colour, linewidth=0.8, rasterized=many)
            if group.form != "dense":
                height = np.exp(np.interp(group.rank, index, np.log(relative)))
                axis.plot(
                    group.rank / group.full_rank,
                    height,
                    "o",
                    color=colour,
                    markersize=2 if many else 3,
                    rasterized=many,
                )
        axis.minorticks_off()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("j / k (dot: where the rank cuts)", fontsize=9)
    figure.supylabel(r"singular value $\sigma_j / \sigma_0$", fontsize=9)
    bar = figure.colorbar(colours, ax=axes, label="decoder block", fraction=0.03, pad=0.02)
    bar.locator.set_params(integer=True)  # pyright: ignore[reportCallIssue]: it is a MaxNLocator
    return figure


def draw_quality(records: Sequence[Record]) -> "Figure":
    """Perplexity against the size of the weights, a panel a dense model and held-back text, a line a method.

    Checkpoints are of one method if their settings differ in the removed fraction alone.
    """
    panels: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record.model_sha256, record.perplexity.before, record.perplexity.tokens)
        panels.setdefault(key, []).append(record)
    figure = new_figure(5.2 * len(panels) + 0.4, 4.2, "quality against size")
    for axis, compared in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.values(), strict=True):
        first = compared[0]
        axis.plot(first.bytes.before / 1e6, first.perplexity.before, "k*", markersize=9, label="dense")
        lines: dict[str, list[Record]] = {}
        for record, method in zip(compared, methods(compared), strict=True):
            lines.setdefault(method, []).append(record)
        for method, points in lines.items():
            points.sort(key=lambda record: record.bytes.after)
            sizes = [record.bytes.after / 1e6 for record in points]
            axis.plot(sizes, [record.perplexity.after for record in points], "o-", markersize=4, label=method)
            for record in points:
                corner = (record.bytes.after / 1e6, record.perplexity.after)
                removed = f"{record.totals.removed:.0%}"
                axis.annotate(removed, corner, (4, 4), textcoords="offset points", fontsize=7, color="grey")
        axis.set(
            title=first.model,
            xlabel="weights, MB (grey: linear parameters removed)",
            ylabel=f"perplexity, {first.perplexity.tokens:,} held-back tokens",
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    return figure


def methods(records: Sequence[Record]) -> list[str]:
    """What tells the records' settings apart, the budget's fraction aside; form and ranks where nothing does."""
    keys = dict.fromkeys(key for record in records for key in record.settings if key not in ("remove", "bytes"))
    differing = [key for key in keys if len({str(record.settings.get(key)) for record in records}) > 1] or [
        "form",
        "ranks",
    ]
    return [", ".join(f"{key} {record.settings.get(key)}" for key in differing) for record in records]
