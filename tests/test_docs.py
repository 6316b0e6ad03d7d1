"""README and docs: short, one sentence a line, and true where a program can tell."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, DESIGN, METHOD = ROOT / "README.md", ROOT / "docs" / "design.md", ROOT / "docs" / "method.md"
RESULTS = ROOT / "docs" / "results.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "NOTES.md",
]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
URL = re.compile(r"\s*(?:[-*] )?<?https?://\S+>?")
TWO_SENTENCES = re.compile(r"[a-z0-9)\]`%\"][.?!] [A-Z`]")


def lines_of(page: Path) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines()


def numbered(page: Path, in_fences: bool) -> Iterator[tuple[int, str]]:
    """Numbered lines inside or outside code fences, that are no row of a table."""
    fenced = False
    for number, line in enumerate(lines_of(page), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced is in_fences and not line.lstrip().startswith("|"):
            yield number, line


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside code fences and tables, that are no bare address."""
    return ((number, line) for number, line in numbered(page, in_fences=False) if not URL.fullmatch(line))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_is_short():
    assert len(lines_of(README)) <= 110


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_has_one_sentence_a_line_of_at_most_100_characters(page):
    long = [f"{number}: {line}" for number, line in prose(page) if len(line) > 100]
    double = [f"{number}: {line}" for number, line in prose(page) if TWO_SENTENCES.search(re.sub(r"^\d+\. ", "", line))]
    assert not long and not double, "\n".join([*long, *double])


@pytest.mark.parametrize("page", [page for page in PAGES if page != RESULTS], ids=name_of)
def test_code_has_lines_of_at_most_100_characters(page):
    """Not on the results' page, which quotes each record's command as it was."""
    assert not [f"{number}: {line}" for number, line in numbered(page, in_fences=True) if len(line) > 100]


def test_the_readmes_python_is_the_example():
    """Line by line; only the example takes its three names from the command line, and prints what came out."""
    page, example = README.read_text(encoding="utf-8"), lines_of(ROOT / "examples" / "quickstart.py")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    given = "MODEL, TEXT, OUT = "
    shown = [given if line.startswith(given) else line for line in block.splitlines() if line]
    own = ('"""', "import sys", "print(")
    there = [given if line.startswith(given) else line for line in example if line and not line.startswith(own)]
    assert shown == there


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = (line.lstrip("# ") for _, line in prose(page) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def trees(page: Path) -> Iterator[str]:
    """Paths that the page's trees name: blocks fenced as text, a folder's files four spaces to its right."""
    for block in re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        folders: list[str] = []
        for line in block.splitlines():
            name = line.split()[0]
            depth = (len(line) - len(line.lstrip())) // 4
            folders[depth:] = [name]
            yield "".join(folders)


def test_the_tree_names_what_is_there():
    named = list(trees(DESIGN))
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("package", ["fermisvd", "convert/fermisvd_convert", "vllm_plugin/fermisvd_vllm"])
def test_the_design_names_every_module(package):
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    trivial = {name for name in there if name.endswith(("__init__.py", "__main__.py"))}
    assert not there - trivial - set(trees(DESIGN))


def test_the_functions_beside_the_equations_are_there():
    missing = []
    for name in sorted(set(re.findall(r"`(fermisvd(?:\.\w+)+)`", METHOD.read_text(encoding="utf-8")))):
        module, *rest = name.split(".")
        found = importlib.import_module(module)
        try:
            for part in rest:
                module = f"{module}.{part}"
                found = getattr(found, part, None) or importlib.import_module(module)
        except ImportError:
            missing.append(name)
    assert not missing
