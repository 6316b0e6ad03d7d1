"""The benchmarks' index."""

import ast

from tests.support import ROOT

FOLDER = ROOT / "benchmarks"


def test_index_has_every_script_and_what_its_docstring_says_first():
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `benchmarks.")]
    listed = {cells[1].strip(" `"): cells[2].strip() for row in rows if (cells := row.split("|"))}
    scripts = [path for path in FOLDER.glob("*/*.py") if path.parent.name != "results_page" and path.stem != "__init__"]
    docstrings = {f"benchmarks.{p.parent.name}.{p.stem}": ast.get_docstring(ast.parse(p.read_text())) for p in scripts}
    assert listed == {module: (text or "").partition("\n")[0] for module, text in docstrings.items()}
