"""The page's part of benchmarks.quality.knobs: a default changed at a time, on the real model."""

from benchmarks.cells import method_of, removal_of

from .real import MODEL, NOT_RUN, TEXTS, optional, text_names
from .tables import markdown, recorded, removals

NAME = f"knobs-{MODEL}"


def base_of(method: str) -> str:
    """The row that a knob is compared with."""
    return "healed" if method.startswith("healed") else "as it is"


def table(cells: dict[str, dict], texts: list[str], remove: float) -> str:
    """A row a knob: for each text perplexity and KL, and by what part the KL is above that of the default it changes;
    empty where that was not run."""
    rows, head = [], [f"{remove:.0%} removed"]
    for text in texts:
        head += [TEXTS.get(text, text), "KL", "over the default's"]
    for key, cell in cells.items():
        if removal_of(key) != remove:
            continue
        row, base = [method_of(key)], cells.get(f"{base_of(method_of(key))} | {remove}")
        for text in texts:
            change = f"{cell[text]['kl'] / base[text]['kl'] - 1:+.1%}" if base and base is not cell else ""
            row += [f"{cell[text]['perplexity']:.2f}", f"{cell[text]['kl']:.4f}", change]
        rows.append([*row, f"{cell['seconds']:,.0f}"])
    return markdown([*head, "made in, s"], rows)


def part() -> str:
    about = optional(NAME)
    if about is None:
        return NOT_RUN
    tables = [table(about["cells"], text_names(about), remove) for remove in removals(about["cells"])]
    return "\n\n".join([*tables, recorded(NAME)])


PARTS = {"real knobs": part}
