"""The page's part of benchmarks.quality.grids: factors in few bits, beside dense models in as few."""

from pathlib import Path

from .tables import RESULTS, markdown, record, recorded

NAMES = tuple(path.stem for path in sorted(RESULTS.glob("grids-*.json")))
TYPES = {"auto": "bfloat16"}


def named(case: str) -> str:
    """As the table says it: auto is the model's type, and a fraction is removed."""
    *words, last = case.split(", ")
    words = [TYPES.get(word, word) for word in words]
    return ", ".join([*words, f"{float(last):.0%} removed" if last.replace(".", "").isdigit() else last])


def table(cells: dict[str, dict]) -> str:
    """A row a case, most bytes first: bytes of the linear layers, as a part of bfloat16's, perplexity and KL."""
    whole = cells["dense"]["bytes"]
    rows = sorted(cells.items(), key=lambda item: -item[1]["bytes"])
    lines = [
        [named(case), f"{cell['bytes'] / whole:.3f}", f"{cell['perplexity']:.3f}", f"{cell.get('kl', 0):.4f}"]
        for case, cell in rows
    ]
    return markdown(["", "bytes", "perplexity", "KL"], lines)


def lines_of(cells: dict[str, dict]) -> dict[str, list[tuple[float, float]]]:
    """Of each way and type, the part of bfloat16's bytes and the KL at each fraction removed; of dense models a point a
    type."""
    whole, lines = cells["dense"]["bytes"], {}
    for case, cell in cells.items():
        if case != "dense":
            *words, _ = named(case).split(", ")
            lines.setdefault(", ".join(words), []).append((cell["bytes"] / whole, cell["kl"]))
    return {name: sorted(points) for name, points in lines.items()}


def draw_grids(path: Path) -> None:
    """KL against bytes, a panel a model."""
    import matplotlib.pyplot as plt  # as figures.py sets it up

    panels, axes = plt.subplots(1, len(NAMES), figsize=(7.5 * len(NAMES), 4.6), squeeze=False)
    for axis, name in zip(axes[0], NAMES, strict=True):
        for number, (label, points) in enumerate(lines_of(record(name)["cells"]).items()):
            style = "k" + "x+*"[number % 3] if label.startswith("dense") else f"C{number % 10}o-"
            axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=name.removeprefix("grids-"), xlabel="bytes of the linear layers over bfloat16's", yscale="log")
        axis.legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    axes[0][0].set_ylabel("KL to the dense model, nats a token")
    panels.tight_layout()
    panels.savefig(path, metadata={"Date": None})
    plt.close(panels)


def part() -> str:
    found = []
    for name in NAMES:
        found += [f"{name.removeprefix('grids-')}:", table(record(name)["cells"]), recorded(name)]
    return "\n\n".join(found)


PARTS = {"grids": part}
