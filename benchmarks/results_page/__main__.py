"""Writes docs/results.md whole, README's table between its marks, and the figures, from benchmarks/results.

    python -m benchmarks.results_page            # after a benchmark has written its record
    python -m benchmarks.results_page --check    # writes nothing; fails where page or README are not up to date

page.md is the page's text. A line `<<name>>` in it stands for what tables.PARTS or anatomy.PARTS makes under that name.
"""

import argparse
import sys
from pathlib import Path

from . import anatomy
from .tables import PARTS, RESULTS, readme_table, records_read

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
ALL_PARTS = PARTS | anatomy.PARTS
BEGIN, END = "<!-- results: make results -->\n", "<!-- end of results -->\n"


def page() -> str:
    """Raises KeyError for a name of which there is no part, SystemExit for a part or a record that is not shown."""
    lines, used = [], set()
    for line in Path(__file__).with_name("page.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("<<") and line.endswith(">>"):
            used.add(line[2:-2])
            line = ALL_PARTS[line[2:-2]]()
        lines.append(line)
    if unused := ALL_PARTS.keys() - used:
        raise SystemExit(f"page.md has no line for {', '.join(sorted(unused))}")
    # benchmarks.quality.table puts a record of an earlier protocol aside as quality-MODEL-until-DATE
    kept = {path.stem for path in RESULTS.glob("*.json") if "-until-" not in path.stem}
    if unread := kept - records_read():
        raise SystemExit(f"benchmarks/results has records that the page does not show: {', '.join(sorted(unread))}")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """README.md with today's table between its marks."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="docs/results.md from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where something is not up to date")
    check = parser.parse_args().check
    wanted = {PAGE: page(), README: readme()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"not up to date: {names}; run python -m benchmarks.results_page" if stale else 0)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    from .figures import draw_load, draw_quality  # matplotlib, which --check does not need

    draw_quality(ROOT / "docs" / "quality.svg")
    draw_load(ROOT / "docs" / "load.svg")
    anatomy.draw_kept(ROOT / "docs" / "anatomy.svg")


if __name__ == "__main__":
    main()
