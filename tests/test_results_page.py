"""docs/results.md and the README's table are what `python -m benchmarks.results_page` writes, to the byte."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_page_and_readme_are_what_the_records_say():
    command = [sys.executable, "-m", "benchmarks.results_page", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
