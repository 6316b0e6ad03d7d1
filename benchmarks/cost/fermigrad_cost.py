"""What does a step of FermiGrad cost, over a forward and backward pass of the dense model on the same batch?

    python -m benchmarks.cost.fermigrad_cost tests/support/stdlib-2m models/kinds-11m

The dense pass trains all weights (next-token loss); the FermiGrad step is teacher, student and gradient in mu, with the
gates where uniform ranks at --remove would be. Interleaved, warmed up, median of --repeats.
Results: benchmarks/results/fermigrad-cost.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.records import new_record, write_record
from fermisvd import load_model
from fermisvd.budget import Budget
from fermisvd.decomposition import data_aware_svd
from fermisvd.fermigrad import gated_kl
from fermisvd.gates import install_gates
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.running.halves import halves_of
from fermisvd.teacher import teach


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(path: Path, remove: float, batch_size: int, length: int, repeats: int) -> dict:
    dense, student = load_model(path).requires_grad_(True), load_model(path)
    groups = find_groups(student, "separate")
    factors = {g.name: data_aware_svd(stacked_weight(student, g), torch.eye(g.columns)) for g in groups}
    gated = install_gates(student, groups, lambda g: factors[g.name].truncated(g.full_rank))
    student.requires_grad_(False)
    ranks = Budget.removing(remove, "pivga").uniform_ranks(groups)
    mus = torch.tensor(ranks, dtype=torch.float64, requires_grad=True)
    batch, halves = torch.randint(dense.config.vocab_size, (batch_size, length)), halves_of(student)
    states = teach(dense, batch, batch_size).batch(range(batch_size), batch.device)[1]

    def dense_pass() -> None:
        dense.zero_grad()
        dense(input_ids=batch, labels=batch, use_cache=False).loss.backward()

    def step() -> None:
        mus.grad = None
        gated_kl(halves, gated, batch, states, mus, 0.01).backward()

    dense_pass()
    step()
    pairs = [(seconds(dense_pass), seconds(step)) for _ in range(repeats)]
    dense_seconds, step_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    held = sum(t.numel() for g in factors.values() for t in (g.a, g.b)) / sum(g.dense_parameters for g in groups)
    return {
        "dense_forward_backward_seconds": dense_seconds,
        "fermigrad_step_seconds": step_seconds,
        "ratio": statistics.median(step / dense for dense, step in pairs),
        "factors_over_dense_parameters": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--remove", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = vars(parser.parse_args())
    rows = {}
    for path in arguments.pop("models"):
        rows[path.name] = measure(path, **arguments)
        print(path.name, {key: round(value, 3) for key, value in rows[path.name].items()}, flush=True)
    write_record("fermigrad-cost", new_record("python -m benchmarks.cost.fermigrad_cost", arguments) | {"rows": rows})


if __name__ == "__main__":
    main()
