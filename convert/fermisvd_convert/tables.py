"""Tables on the terminal: what a conversion is about to do, what it did, what a checkpoint holds."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

from rich.console import Console
from rich.table import Table

from fermisvd_convert.record import GroupRow, Record, TextRecord, totals
from fermisvd_convert.text import RowCounts


def short_name(members: list[str], prefix: str) -> str:
    """model.layers.3.self_attn.q_proj, ....k_proj -> 3.self_attn.q_proj, k_proj."""
    return ", ".join([members[0].removeprefix(prefix), *[member.rpartition(".")[2] for member in members[1:]]])


def _common_parent(names: list[str]) -> str:
    """Leading dotted words that all names share, with the dot after them."""
    words = [name.split(".")[:-1] for name in names]
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))]
    return "".join(f"{word}." for word in shared)


def print_groups(rows: Sequence[GroupRow], console: Console) -> None:
    """Per group and total: form, rank, parameters before and after."""
    prefix = _common_parent([row.members[0] for row in rows])
    table = Table(title=f"linear layers of {prefix.rstrip('.')}")
    table.add_column("group", overflow="fold")
    on_grids = any(row.schemes for row in rows)
    for column in ("form", "side", *(["numbers"] if on_grids else [])):
        table.add_column(column)
    for column in ("rank", "of", "before", "after"):
        table.add_column(column, justify="right")
    for row in rows:
        counts = (f"{row.parameters_before:,}", f"{row.parameters_after:,}")
        side = row.side if row.form == "pivga" else ""
        numbers = [numbers_of(row.schemes)] if on_grids else []
        ranks = (str(row.rank), str(row.full_rank))
        table.add_row(short_name(row.members, prefix), row.form, side, *numbers, *ranks, *counts)
    total = totals(rows)
    counts = (f"{total.parameters_before:,}", f"{total.parameters_after:,}")
    table.add_section()
    table.add_row(
        "total", "", f"{-total.removed:.2%}" if total.removed else "", *([""] if on_grids else []), "", "", *counts
    )
    console.print(table)


def numbers_of(schemes: Mapping[str, str] | None) -> str:
    """int8, int4; or those of each factor, where they differ. How many inputs share a scale is left out."""
    kinds = {factor: scheme.partition("_")[0] for factor, scheme in (schemes or {}).items()}
    if len(set(kinds.values())) <= 1:
        return next(iter(kinds.values()), "")
    return ", ".join(f"{factor} {kind}" for factor, kind in kinds.items())


def left_dense_lines(record: Record) -> list[str]:
    """One line a kind of matrix that no group holds (experts, routers), layers counted, and the reason where there is
    one besides that not every token passes it."""
    kinds: dict[tuple[str, str | None], list[int]] = {}
    for name, count in record.left_dense.items():
        kind = re.sub(r"\.\d+\.", ".*.", name), record.why_dense.get(name)
        kinds.setdefault(kind, []).append(count)
    return [
        f"left dense: {kind}, {len(c)} matrices, {sum(c):,} parameters{f' ({why})' if why else ''}"
        for (kind, why), c in kinds.items()
    ]


def text_lines(text: TextRecord) -> list[str]:
    """What became of each calibration text's rows, and how the first window that is calibrated on begins."""
    counts = [(source.name, RowCounts(source.used, source.skipped, source.refused)) for source in text.sources]
    return [*(f"calibration text {name}: {count}" for name, count in counts), f"it begins: {text.beginning!r}"]


def settings_line(settings: Mapping[str, object]) -> str:
    """The recorded options in a line, those that are left to the program out."""
    given = {name: value for name, value in settings.items() if value is not None}
    return ", ".join(f"{name.replace('_', '-')} {_shown(value)}" for name, value in given.items())


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def print_record(record: Record, console: Console) -> None:
    """The groups, and what became of text, quality and size."""
    print_groups(record.groups, console)
    for line in left_dense_lines(record):
        console.print(line, soft_wrap=True)
    for line in text_lines(record.calibration_text):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    perplexity, size = record.perplexity, record.bytes
    console.print(
        f"perplexity on {perplexity.tokens:,} held-back tokens: {perplexity.before:.4f} before, "
        f"{perplexity.after:.4f} after"
    )
    console.print(f"weights: {size.before / 1e6:,.2f} MB before, {size.after / 1e6:,.2f} MB after")
