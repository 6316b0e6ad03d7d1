"""What tests, benchmarks and the demo share: models, recipes, broken checkpoints, engines and servers.

The scripts among these modules run from the repository's root: python -m tests.support.demo
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "tests" / "support" / "stdlib-2m"
SHARED = ROOT.parent / "shared" / "data"  # texts and checkpoints of others, which not every machine has
