import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = "tests.support.ranks_of_processes"


def ranks(processes: int, model: Path, result: Path, *options: str) -> dict:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*run, "-m", SCRIPT, model, result, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def of_one(tiny_llama, tmp_path_factory):
    return ranks(1, tiny_llama, tmp_path_factory.mktemp("one") / "ranks.json")


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["data parallel", "sharded and checkpointed"])
def test_two_processes_give_the_ranks_of_one(tiny_llama, tmp_path, of_one, options):
    """Batches of 3 and of 1 window: one process has more than the other, or all. Sums in another order: 1e-4 of k."""
    found = ranks(2, tiny_llama, tmp_path / "ranks.json", *options)
    assert found["processes"] == 2 and of_one["processes"] == 1
    assert found["kl"] == pytest.approx(of_one["kl"], rel=1e-3)
    assert found["mus"] == pytest.approx(of_one["mus"], abs=1e-2)
