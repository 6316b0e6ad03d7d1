"""What a conversion did: the groups' records in fermisvd.json, and the closing table."""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fermisvd.budget import Form, group_parameters, stays_dense
from fermisvd.groups import LinearGroup
from fermisvd_convert.text import RowCounts, weighted_source

SPECTRUM_POINTS = 64


def group_rows(
    groups: Sequence[LinearGroup], ranks: Sequence[int], form: Form, sigma_of: Callable[[LinearGroup], torch.Tensor]
) -> list[dict]:
    """One record a group: members, form as stored, side, rank, full_rank, parameters before and after, kept_energy,
    spectrum.

    sigma_of: gives a group's singular values, (k,) descending.
    """
    rows = []
    for group, rank in zip(groups, ranks, strict=True):
        dense, sigma = stays_dense(group, rank, form), sigma_of(group).double().numpy()
        rows.append(
            {
                "members": list(group.members),
                "form": "dense" if dense else form,
                "side": group.side,
                "rank": rank,
                "full_rank": group.full_rank,
                "parameters_before": group.dense_parameters,
                "parameters_after": int(group_parameters(group, rank, form)),
                "kept_energy": 1.0 if dense else kept_energy(sigma, rank),
                "spectrum": decimated(sigma),
            }
        )
    return rows


def kept_energy(sigma: np.ndarray, rank: int) -> float:
    """sum_{j<r} sigma_j^2 / sum_j sigma_j^2; 1 where there is none to lose. sigma: (k,)."""
    squared = sigma**2
    return float(squared[:rank].sum() / squared.sum()) if squared.any() else 1.0


def decimated(sigma: np.ndarray) -> dict:
    """At most SPECTRUM_POINTS singular values, to five digits, and their indices: {"index": [...], "sigma": [...]}.

    sigma: (k,). Half of the indices are evenly spaced and half geometrically, as a spectrum falls fastest at its head.
    """
    last, half = len(sigma) - 1, SPECTRUM_POINTS // 2
    spread = np.concatenate([np.linspace(0, last, half), np.geomspace(1, last + 1, half) - 1])
    index = np.unique(spread.round().astype(int))
    return {"index": index.tolist(), "sigma": [float(f"{value:.5g}") for value in sigma[index]]}


def calibration_name(source: str) -> str:
    """A calibration source as the report names it: a data set of the hub by its id, a file or folder by its last name,
    for where it lay says nothing elsewhere."""
    return Path(source).name if Path(weighted_source(source)[0]).exists() else source


def totals(rows: list[dict]) -> dict:
    before, after = (sum(row[key] for row in rows) for key in ("parameters_before", "parameters_after"))
    return {
        "parameters_before": before,
        "parameters_after": after,
        "removed": (before - after) / before if before else 0.0,
    }


def short_name(members: list[str], prefix: str) -> str:
    """model.layers.3.self_attn.q_proj, ....k_proj -> 3.self_attn.q_proj, k_proj."""
    return ", ".join([members[0].removeprefix(prefix), *[member.rpartition(".")[2] for member in members[1:]]])


def _common_parent(names: list[str]) -> str:
    """Leading dotted words that all names share, with the dot after them."""
    words = [name.split(".")[:-1] for name in names]
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))]
    return "".join(f"{word}." for word in shared)


def print_groups(rows: list[dict], console: Console) -> None:
    """Per group and total: form, rank, parameters before and after."""
    prefix = _common_parent([row["members"][0] for row in rows])
    table = Table(title=f"linear layers of {prefix.rstrip('.')}")
    table.add_column("group", overflow="fold")
    for column in ("form", "side"):
        table.add_column(column)
    for column in ("rank", "of", "before", "after"):
        table.add_column(column, justify="right")
    for row in rows:
        counts = (f"{row['parameters_before']:,}", f"{row['parameters_after']:,}")
        side = row["side"] if row["form"] == "pivga" else ""
        table.add_row(
            short_name(row["members"], prefix), row["form"], side, str(row["rank"]), str(row["full_rank"]), *counts
        )
    total = totals(rows)
    table.add_section()
    table.add_row(
        "total",
        "",
        f"-{total['removed']:.2%}",
        "",
        "",
        f"{total['parameters_before']:,}",
        f"{total['parameters_after']:,}",
    )
    console.print(table)


def left_dense_lines(left_dense: dict[str, int]) -> list[str]:
    """One line a kind of matrix that no group holds (experts, routers), layers counted."""
    kinds: dict[str, list[int]] = {}
    for name, count in left_dense.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(count)
    return [f"left dense: {kind}, {len(c)} matrices, {sum(c):,} parameters" for kind, c in kinds.items()]


def text_lines(text: dict) -> list[str]:
    """What became of each calibration text's rows, and how the first window that is calibrated on begins."""
    lines = []
    for source in text["sources"]:
        counts = RowCounts(*(source[name] for name in ("used", "skipped", "refused")))
        lines.append(f"calibration text {source['name']}: {counts}")
    return [*lines, f"it begins: {text['beginning']!r}"]


def print_report(report: dict, console: Console) -> None:
    print_groups(report["groups"], console)
    for line in left_dense_lines(report["left_dense"]):
        console.print(line)
    for line in text_lines(report["calibration_text"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    console.print(
        f"perplexity on {report['perplexity']['tokens']:,} held-back tokens: {before:.4f} before, {after:.4f} after"
    )
    size = report["bytes"]
    console.print(f"weights: {size['before'] / 1e6:,.2f} MB before, {size['after'] / 1e6:,.2f} MB after")
