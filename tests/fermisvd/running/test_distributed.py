import json
import subprocess
import sys
from pathlib import Path

import pytest

from fermisvd.running import distributed
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


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("part", [distributed.own_part, distributed.own_run])
def test_each_item_is_one_process(monkeypatch, processes, part):
    """All items are somebody's; runs are in order, and differ by one in length at most."""
    parts = []
    for number in range(processes):
        monkeypatch.setattr(distributed, "this_process", lambda number=number: number)
        monkeypatch.setattr(distributed, "process_count", lambda: processes)
        parts.append(part(range(7)))
    joined = [item for own in parts for item in own]
    assert sorted(joined) == list(range(7)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part is distributed.own_part or joined == list(range(7))
