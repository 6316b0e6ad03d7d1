import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fermisvd.running import distributed
from tests.support import ROOT
from tests.support.families import compress, save


def launched(processes: int, program: str, *arguments: str | Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run += ["-m", f"tests.support.{program}", *map(str, arguments)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def ranks(processes: int, model: Path, result: Path, *options: str) -> dict:
    launched(processes, "ranks_of_processes", model, result, *options)
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


@pytest.mark.long
@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_two_processes_heal_as_one(tmp_path, demo_text, form):
    """Batches of 5 windows, two at once, so that one process has more passes than windows; whole students, and one that
    is divided and whose blocks are computed again. Reference: one process."""
    dense, found, records = save("phi3", tmp_path / "phi3"), {}, {}
    checkpoint = compress(dense, form, demo_text["calibration"], tmp_path / "work")
    for name, processes, options in (("one", 1, ()), ("two", 2, ()), ("divided", 2, ("--shard",))):
        result = tmp_path / f"{name}.safetensors"
        launched(processes, "healed_in_processes", dense, checkpoint, result, *options)
        found[name] = load_file(result)
        with safe_open(result, framework="pt") as file:
            records[name] = json.loads(file.metadata()["record"])
    start = load_file(checkpoint / "model.safetensors")
    assert records["one"]["kl_after"] < records["one"]["kl_before"]
    for name in ("two", "divided"):
        assert records[name]["processes"] == 2
        for key in ("kl_before", "kl_after"):
            assert records[name][key] == pytest.approx(records["one"][key], rel=1e-3)
        for factor, expected in found["one"].items():
            moved = (expected - start[factor].float()).norm()
            assert (found[name][factor] - expected).norm() < 0.05 * moved, factor


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_passes_of_a_batch_are_as_many_in_every_process(monkeypatch, processes, at_once):
    passes = []
    for number in range(processes):
        monkeypatch.setattr(distributed, "this_process", lambda number=number: number)
        monkeypatch.setattr(distributed, "process_count", lambda: processes)
        passes.append(distributed.own_passes(torch.tensor([4, 9, 2, 7, 5]), at_once))
    assert len(set(map(len, passes))) == 1
    counted = [(number, weight) for own in passes for part, weight in own for number in part.tolist() if weight]
    assert sorted(number for number, _ in counted) == [2, 4, 5, 7, 9]
    assert sum(weight for own in passes for _, weight in own) == pytest.approx(1)
    assert all(0 < len(part) <= at_once for own in passes for part, _ in own)


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
