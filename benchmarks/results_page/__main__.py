"""Writes docs/results.md whole, README's tables between their marks, and the figures, from benchmarks/results.

    python -m benchmarks.results_page            # after a benchmark has written its record
    python -m benchmarks.results_page --check    # writes nothing; fails where page or README are not up to date

page.md is the page's text. A line `<<name>>` in it stands for what PARTS of a file here makes under that name.
A table of README is written where README has its marks, two lines: `<!-- real: make results -->` and
`<!-- end of real -->` for the real model's.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from . import anatomy, cost, grids, knobs, real, real_served, tables
from .tables import README_FRACTIONS, RESULTS, records_read

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
PARTS = tables.PARTS | cost.PARTS | real.PARTS | knobs.PARTS | real_served.PARTS | anatomy.PARTS | grids.PARTS
README_PARTS = {"real": real.readme_part, "served": partial(tables.served_in_words, README_FRACTIONS[0])}


def page() -> str:
    """Raises KeyError for a name of which there is no part, SystemExit for a part or a record that is not shown."""
    lines, used = [], set()
    for line in Path(__file__).with_name("page.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("<<") and line.endswith(">>"):
            used.add(line[2:-2])
            line = PARTS[line[2:-2]]()
        lines.append(line)
    if unused := PARTS.keys() - used:
        raise SystemExit(f"page.md has no line for {', '.join(sorted(unused))}")
    # benchmarks.quality.table puts a record of an earlier protocol aside as quality-MODEL-until-DATE
    kept = {path.stem for path in RESULTS.glob("*.json") if "-until-" not in path.stem}
    if unread := kept - records_read():
        raise SystemExit(f"benchmarks/results has records that the page does not show: {', '.join(sorted(unread))}")
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    """README's text with today's tables between their marks."""
    for name, part in README_PARTS.items():
        begin, end = f"<!-- {name}: make results -->\n", f"<!-- end of {name} -->\n"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{part()}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="docs/results.md from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where something is not up to date")
    check = parser.parse_args().check
    wanted = {PAGE: page(), README: readme(README.read_text(encoding="utf-8"))}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"not up to date: {names}; run python -m benchmarks.results_page" if stale else 0)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    from .figures import draw_load, draw_quality, draw_real  # matplotlib, which --check does not need

    draw_quality(ROOT / "docs" / "quality.svg")
    draw_load(ROOT / "docs" / "load.svg")
    if about := real.real_record():
        draw_real(ROOT / "docs" / "real.svg", about, real.harness_record())
    grids.draw_grids(ROOT / "docs" / "grids.svg")
    anatomy.draw_kept(ROOT / "docs" / "anatomy.svg")


if __name__ == "__main__":
    main()
