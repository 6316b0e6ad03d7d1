"""The page's part of benchmarks.quality.anatomy: tables of where the loss comes from, and anatomy.svg."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .tables import markdown, record, recorded

NAME = "anatomy-smollm2"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def by_part(title: str) -> str:
    """A row a part: what is left of the KL without it, what it makes alone, and the fraction of it that is kept."""
    about = record(NAME)
    rows = [
        [part, f"{found['without']:.3f}", f"{found['alone']:.3f}", f"{kept_of(part):.0%}"]
        for part, found in in_order(about[title]).items()
    ]
    first = {"by kind": "layers", "by depth": "blocks"}[title]
    whole = f"KL without them (all: {about['kl']:.3f})"
    return markdown([first, whole, "KL of them alone", "parameters kept"], rows)


def in_order(parts: dict[str, dict]) -> dict[str, dict]:
    """Kinds as the model has them; blocks as they are recorded."""
    return {kind: parts[kind] for kind in KINDS if kind in parts} or parts


def kept_of(part: str) -> float:
    """The fraction of the parameters of a kind, or of blocks such as "5 to 9", that is kept."""
    kept, sizes = record(NAME)["kept"], record(NAME)["sizes"]
    if part in kept:
        return sum(kept[part]) / len(kept[part])
    first, last = map(int, part.split(" to "))
    left = {kind: sum(row[first : last + 1]) for kind, row in kept.items()}
    return sum(sizes[kind] * left[kind] for kind in kept) / (sum(sizes.values()) * (last + 1 - first))


def by_tokens() -> str:
    """A row a group of tokens, by place and by rarity."""
    about, rows = record(NAME), []
    for title, label in (("by place", "place"), ("by rarity", "next token")):
        for name, found in about[title].items():
            shares = f"{found['tokens']:.1%}", f"{found['share']:.1%}"
            rows.append([f"{label}: {name}", *shares, f"{found['kl']:.3f}", f"{found['rise']:.3f}"])
    return markdown(["tokens", "of all tokens", "of all KL", "KL a token", "log-perplexity over dense"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "anatomy by kind": partial(by_part, "by kind"),
    "anatomy by depth": partial(by_part, "by depth"),
    "anatomy by tokens": by_tokens,
    f"source of {NAME}": partial(recorded, NAME),
}


def draw_kept(path: Path) -> None:
    """The fraction of parameters kept, by kind of layer and block."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fermisvd"
    kept = record(NAME)["kept"]
    panel, axis = plt.subplots(figsize=(9, 2.9))
    drawn = axis.pcolormesh([kept[kind] for kind in KINDS], vmin=0, vmax=1, cmap="viridis", edgecolors="white")
    axis.set(xlabel="block", title=f"{NAME.removeprefix('anatomy-')}: parameters kept")
    axis.set_yticks([number + 0.5 for number in range(len(KINDS))], KINDS)
    blocks = range(0, len(kept[KINDS[0]]), 5)
    axis.set_xticks([number + 0.5 for number in blocks], [str(number) for number in blocks])
    axis.invert_yaxis()
    panel.colorbar(drawn, pad=0.02)
    panel.tight_layout()
    panel.savefig(path, metadata={"Date": None})
