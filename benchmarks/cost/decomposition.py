"""How long do the pieces of a conversion take, by size, and what would Llama-3.1-8B and 70B take by them?

    python -m benchmarks.cost.decomposition --widths 1024 2048 4096           # two cores: 8 minutes
    python -m benchmarks.cost.decomposition --device cuda --sizes 1024 2048 4096 8192 --widths 2048 4096

Law: a piece takes its FLOPs (work.py here) over the rate of its kind, which grows with its size. Two checks: each
piece from its rate at the size before, and whole calls of kfac_svd and fix_gauge, in the shapes of a Llama of so many
hidden channels, from the rates of their pieces. The projection takes rates at their sizes, flat beyond the largest
measured. Without a GPU it is made for this machine and, by ASSUMED rates that nobody measured here, for one H200.
Results: benchmarks/results/decomposition.json.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cost.memory import ResidentPeak
from benchmarks.cost.work import (
    ASSUMED_H200,
    EIGH,
    EIGH_FLOPS,
    FEEDBACK,
    GRAM,
    KEEP,
    LEAST_SQUARES,
    MODEL,
    NARROW_PRODUCT,
    PIVOTS,
    PRODUCT,
    READ,
    ROOT,
    Work,
    conversion_work,
    decomposition_work,
    feedback_flops,
    fermigrad_flops,
    gauge_work,
    gram_flops,
    least_squares_flops,
    time_of,
    work_bytes,
)
from benchmarks.records import command_line, new_record, write_record
from benchmarks.shapes import SHAPES
from fermisvd.budget import Budget
from fermisvd.calibration import add_gram
from fermisvd.decomposition import OutputGram, kfac_svd
from fermisvd.fermigrad import gated_kl
from fermisvd.gates import install_gates
from fermisvd.groups import LinearGroup, Side, find_groups
from fermisvd.pivga import fix_gauge, least_squares, pivoted_cholesky
from fermisvd.rounding import round_with_error_feedback, to_type
from fermisvd.running.halves import halves_of
from fermisvd_convert.ahead import GPU_WORKERS, in_order
from fermisvd_convert.memory import give_back

REMOVE, TOKENS, VOCABULARY = 0.2, 2048, 2048
GROUPS_AHEAD = 8
BUDGET = Budget.removing(REMOVE, "pivga")
Piece = tuple[float, Callable[[], object]]  # FLOPs, and a call that does them

# What passes may run in, and with them Gram sums.
PASSES = {"bfloat16": {}, "float32": {MODEL: 0.7 * 67e12, GRAM: 0.7 * 67e12}}


def seconds(run: Callable[[], object], device: str, repeats: int = 9) -> float:
    """Least of some calls, of one where it takes long: other work on the machine only adds. The first call of a quick
    one, which may load libraries, is left out."""

    def once() -> float:
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    first = once()
    return first if first > 10 else min(once() for _ in range(repeats if first < 1 else 1))


def pieces(size: int, device: str) -> dict[str, Piece]:
    """One of each kind, matrices of about this size."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    half, square = size // 2, normal(size, size)
    positive = square @ square.T / size + torch.eye(size, dtype=torch.float64, device=device)
    tall, right, narrow = normal(2 * size, half), normal(2 * size, half), square.float()
    d, triangle, wide = normal(half, half), torch.linalg.qr(tall, mode="r")[1], normal(half, size)
    inputs, total, singular = torch.randn(TOKENS, size, device=device), torch.zeros_like(square), wide.T @ wide

    def root() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(positive)[0], square, upper=False)

    return {
        PRODUCT: (2 * size**3, lambda: square @ square),
        NARROW_PRODUCT: (2 * size**3, lambda: narrow @ narrow),
        ROOT: (4 / 3 * size**3, root),
        EIGH: (EIGH_FLOPS * size**3, lambda: torch.linalg.eigh(positive)),
        PIVOTS: (2 * size * size * half, lambda: pivoted_cholesky(singular.clone(), half)),  # on the CPU
        LEAST_SQUARES: (least_squares_flops(2 * size, half, half), lambda: least_squares(tall, right)),
        FEEDBACK: (feedback_flops(half, half), lambda: round_with_error_feedback(d, triangle, to_type(torch.bfloat16))),
        GRAM: (TOKENS * gram_flops(size), lambda: add_gram(total, inputs)),
        MODEL: fermigrad_step(size, device),
    }


def fermigrad_step(hidden: int, device: str) -> Piece:
    """Student and gradient in mu, of a one-layer Llama with random factors, float32."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        vocab_size=VOCABULARY,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).requires_grad_(False)
    groups = find_groups(model, "separate")

    def factors_of(group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.randn(group.rows, group.full_rank), torch.randn(group.full_rank, group.columns)
        return a / group.rows**0.5, b / group.full_rank**0.5

    gated = install_gates(model, groups, factors_of)
    ranks = BUDGET.uniform_ranks(groups)
    mus = torch.tensor(ranks, dtype=torch.float64, requires_grad=True)
    batch = torch.randint(VOCABULARY, (8, TOKENS // 8), device=device)
    opened = sum(
        min(g.full_rank, r + 0.08 * g.full_rank) * (g.rows + g.columns) for g, r in zip(groups, ranks, strict=True)
    )
    attention = TOKENS / 8 * 2 * hidden
    flops = TOKENS * fermigrad_flops(opened, VOCABULARY * hidden, attention)
    halves = halves_of(model)
    taught = torch.randn(*batch.shape, hidden, device=device)
    return flops, lambda: gated_kl(halves, gated, batch, taught, mus, 0.01).backward()


def whole_calls(hidden: int, device: str) -> Iterator[tuple[str, Work, Callable[[], object]]]:
    """kfac_svd and fix_gauge in the shapes of a Llama's q, gate and down projections, weights in bfloat16."""
    wide = 7 * hidden // 2

    def positive(n: int) -> torch.Tensor:
        columns = torch.randn(n, 64, dtype=torch.float64, device=device)
        matrix = columns @ columns.T
        matrix.diagonal().add_(torch.logspace(0, -3, n, dtype=torch.float64, device=device))
        return matrix

    shapes: tuple[tuple[str, int, int, Side], ...] = (
        ("q", hidden, hidden, "columns"),
        ("gate", wide, hidden, "columns"),
        ("down", hidden, wide, "rows"),
    )
    for name, m, n, side in shapes:
        weight, gram = torch.randn(m, n, dtype=torch.bfloat16, device=device), positive(n)
        output = OutputGram(positive(min(m, n)), 1.0)
        yield f"kfac_svd {name}", decomposition_work(m, n), lambda w=weight, c=gram, g=output: kfac_svd(w, c, g, 1e-6)
        del weight, gram, output
        rank = int(BUDGET.uniform_rank(LinearGroup(("x",), (m,), n, side, "x")))
        a, b = torch.randn(m, rank, device=device), torch.randn(rank, n, device=device)
        a, b = a * torch.logspace(0, -2, rank, device=device), b
        run = partial(fix_gauge, a, b, side, torch.bfloat16)
        yield f"fix_gauge {name}", gauge_work(m, n, rank, side), run


def check_counts(device: str) -> dict[str, float]:
    """FLOPs of matrix products as torch counts them, over those of benchmarks/cost/work.py."""

    def in_place(_, left, right, *, out_shape=None, **kwargs) -> int:  # torch leaves addmm_ out
        return 2 * left[0] * left[1] * right[1]

    def counted(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            run()
        return counter.get_total_flops()

    flops, step = fermigrad_step(256, device)
    inputs, total = (
        torch.randn(TOKENS, 1024, device=device),
        torch.zeros(1024, 1024, dtype=torch.float64, device=device),
    )
    found = {"FermiGrad step": counted(step) / flops}
    found[GRAM] = counted(lambda: add_gram(total, inputs)) / (TOKENS * gram_flops(1024))
    for name, work, run in whole_calls(256, device):
        if name.startswith("kfac_svd"):
            products = sum(flops for kind, _, flops in work if kind in (PRODUCT, NARROW_PRODUCT))
            found[name] = counted(run) / products
    return found


def measure_pieces(sizes: list[int], device: str) -> dict[str, dict[int, dict[str, float]]]:
    """kind -> size -> seconds, FLOP/s, and the seconds that the rate at the size before would give."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    print("| piece | size | seconds | GFLOP/s | predicted / measured |\n|---|---|---|---|---|")
    for size in sizes:
        for kind, (flops, run) in pieces(size, device).items():
            before, took = found.setdefault(kind, {}), seconds(run, device)
            row = {"seconds": took, "rate": flops / took}
            if before:
                row["predicted"] = flops / before[max(before)]["rate"]
            before[size] = row
            check = f"{row['predicted'] / took:.2f}" if "predicted" in row else ""
            print(f"| {kind} | {size} | {took:.3g} | {row['rate'] / 1e9:.1f} | {check} |", flush=True)
    return found


def peak_growth(run: Callable[[], object], device: str) -> int:
    """Bytes held at most by a call, beyond its arguments: as allocated on a GPU, else of the resident set."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    give_back()  # what was freed before counts for nothing
    resident = ResidentPeak()
    resident.start()
    run()
    resident.stopped.set()
    return resident.growth


def measure_whole(widths: list[int], device: str, rates: dict[str, dict[int, float]]) -> dict[str, dict]:
    """call -> seconds, those that its pieces' rates give, by kind, and bytes held beyond its arguments."""
    found = {}
    print("\n| call | hidden | seconds | predicted / measured | MiB beyond its arguments |\n|---|---|---|---|---|")
    for width in widths:
        for name, work, run in whole_calls(width, device):
            growth, predicted = peak_growth(run, device), time_of(work, rates)
            took = min(seconds(run, device), seconds(run, device))
            found[f"{name} {width}"] = {"seconds": took, "predicted": predicted, "bytes": growth}
            check = sum(predicted.values()) / took
            print(f"| {name} | {width} | {took:.3g} | {check:.2f} | {growth / 2**20:,.0f} |", flush=True)
    return found


def measure_ahead(width: int, device: str) -> dict[str, float]:
    """Seconds a group of fix_gauge, one group after the other and with GPU_WORKERS at once, as the writer does it
    beside a GPU: its results on the CPU, in the shape of a Llama's q projection."""
    rank = int(BUDGET.uniform_rank(LinearGroup(("q",), (width,), width, "columns", "q")))
    a, b = torch.randn(width, rank) * torch.logspace(0, -2, rank), torch.randn(rank, width)

    def made(_: int) -> torch.Tensor:
        return fix_gauge(a.to(device), b.to(device), "columns", torch.bfloat16).interpolation.cpu()

    def all_groups(workers: int) -> None:
        for _ in in_order(made, range(GROUPS_AHEAD), device, workers):
            pass

    found = {}
    for workers in (1, GPU_WORKERS):
        found[str(workers)] = seconds(partial(all_groups, workers), device, 1) / GROUPS_AHEAD
        print(f"fix_gauge q {width}, {workers} at once: {found[str(workers)]:.3g} s a group", flush=True)
    return found


def project(shape: dict, rates: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    """stage -> kind -> seconds."""
    return {stage: time_of(work, rates) for stage, work in conversion_work(shape, REMOVE).items()}


def show_projection(title: str, stages: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n\n| stage | seconds | of which |\n|---|---|---|")
    for stage, kinds in stages.items():
        parts = ", ".join(f"{kind} {value:,.0f}" for kind, value in sorted(kinds.items(), key=lambda kv: -kv[1]))
        print(f"| {stage} | {sum(kinds.values()):,.0f} | {parts} |")
    print(f"| all | {sum(sum(kinds.values()) for kinds in stages.values()):,.0f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record = new_record(command_line(), vars(arguments))
    record["counted_over_assumed_flops"] = check_counts(arguments.device)
    print(f"FLOPs as torch counts them over ours: {record['counted_over_assumed_flops']}\n")
    record["pieces"] = measure_pieces(sorted(arguments.sizes), arguments.device)
    rates = {kind: {size: row["rate"] for size, row in rows.items()} for kind, rows in record["pieces"].items()}
    rates |= {kind: {1: ASSUMED_H200[kind]} for kind in (READ, KEEP)}
    record["calls"] = measure_whole(arguments.widths, arguments.device, rates)
    record["seconds_by_groups_at_once"] = measure_ahead(max(arguments.widths), arguments.device)
    record["projection"], record["work"] = {}, {}
    for name in ("llama-3.1-8b", "llama-3.1-70b"):
        record["work"][name] = {
            "flops": {stage: sum(flops for *_, flops in work) for stage, work in conversion_work(SHAPES[name]).items()},
            "bytes": work_bytes(SHAPES[name]),
        }
        machines = {record["machine"]["processor"]: rates}
        if arguments.device == "cpu":
            assumed = {kind: {4096: value} for kind, value in ASSUMED_H200.items()}
            for precision, changed in PASSES.items():
                faster = {kind: {4096: value} for kind, value in changed.items()}
                machines[f"one H200, assumed rates, passes in {precision}"] = assumed | faster
        for machine, known in machines.items():
            stages = record["projection"].setdefault(name, {})[machine] = project(SHAPES[name], known)
            show_projection(f"{name}, {machine}", stages)
    if arguments.device == "cpu":
        record["assumed_h200"] = {"rates": ASSUMED_H200, "passes": PASSES}
    write_record("decomposition" if arguments.device == "cpu" else "decomposition-gpu", record)


if __name__ == "__main__":
    main()
