"""What a conversion did: the closing table, fermisvd.json and the model card."""

import re
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fermisvd.budget import Form, group_parameters, stays_dense
from fermisvd.groups import LinearGroup


def group_rows(groups: list[LinearGroup], ranks: list[int], form: Form) -> list[dict]:
    """One record a group: members, form as stored, side, rank, full_rank, parameters before and after."""
    return [
        {
            "members": list(group.members),
            "form": "dense" if stays_dense(group, rank, form) else form,
            "side": group.side,
            "rank": rank,
            "full_rank": group.full_rank,
            "parameters_before": group.dense_parameters,
            "parameters_after": int(group_parameters(group, rank, form)),
        }
        for group, rank in zip(groups, ranks, strict=True)
    ]


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


def print_report(report: dict, console: Console) -> None:
    print_groups(report["groups"], console)
    for line in left_dense_lines(report["left_dense"]):
        console.print(line)
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    console.print(
        f"perplexity on {report['perplexity']['tokens']:,} held-back tokens: {before:.4f} before, {after:.4f} after"
    )
    size = report["bytes"]
    console.print(f"weights: {size['before'] / 1e6:,.2f} MB before, {size['after'] / 1e6:,.2f} MB after")


def model_card(report: dict, out: Path) -> str:
    """README.md of the checkpoint."""
    base, settings = report["model"], report["settings"]
    perplexity, total = report["perplexity"], report["totals"]
    front = [] if Path(base).exists() else [f"base_model: {base}"]
    return "\n".join(
        [
            "---",
            *front,
            "library_name: transformers",
            "tags: [fermisvd, low-rank, compression]",
            "---",
            f"# {Path(base).name}, {total['removed']:.1%} of its linear parameters removed",
            "",
            f"Compressed by FermiSVD {report['versions']['fermisvd']} (arXiv 2512.03062): "
            f"{settings['form']} form, {settings['ranks']} ranks, {settings['groups']} groups, "
            f"{settings['whitening']} whitening, {settings['heal_steps']} steps of distillation.",
            "",
            "| | before | after |",
            "|---|---|---|",
            f"| compressible parameters | {total['parameters_before']:,} | {total['parameters_after']:,} |",
            f"| held-back calibration perplexity | {perplexity['before']:.4f} | {perplexity['after']:.4f} |",
            "",
            "Serve: `pip install 'fermisvd[vllm]'`, then `vllm serve PATH_OR_ID`.",
            "",
            "Load: `import fermisvd`, then `AutoModelForCausalLM.from_pretrained(PATH_OR_ID)`.",
            "",
            "Every group's rank is in `fermisvd.json`.",
            *[f"\n{line[0].upper()}{line[1:]}." for line in left_dense_lines(report["left_dense"])],
            "",
        ]
    )
