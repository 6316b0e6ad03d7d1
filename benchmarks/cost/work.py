"""What does a conversion take: FLOPs by kind of piece, and by stage seconds on one H200 and bytes at the peak?

    python -m benchmarks.cost.work llama-3.1-8b
    python -m benchmarks.cost.work llama-3.1-8b --json

From the shapes alone, with the converter's own counts of memory and disk: those that it refuses by. Llama models,
separate groups, kfac whitening, uniform ranks in place of FermiGrad's: the converter's defaults else. A Work is a list
of (kind, size, FLOPs): how fast a kind runs depends on how large its matrices are; decomposition.py here times kinds.
Seconds are by ASSUMED rates, which nobody measured here.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.shapes import SHAPES, groups_of
from fermisvd.batches import step_windows
from fermisvd.budget import Budget
from fermisvd.calibration import panel_width
from fermisvd.compress import ASIDE_WINDOWS
from fermisvd.fermigrad import STEP_TOKENS
from fermisvd.files import TensorInfo
from fermisvd.gates import WIDTH
from fermisvd.groups import LinearGroup
from fermisvd.healing import HealingSettings
from fermisvd.joining import TRIALS
from fermisvd.running.blocks import KEPT_ACTIVATIONS, places_back, segments
from fermisvd_convert.memory import KEPT_AHEAD, Limits, Passes, Sizes, model_sizes, needs
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.space import factors_bytes, gram_bytes
from fermisvd_convert.text import HELD_BACK_WINDOWS

Work = list[tuple[str, int, float]]
PRODUCT, NARROW_PRODUCT, GRAM = "product, float64", "product, float32", "Gram sum"
ROOT, EIGH = "Cholesky and solve", "eigh"
PIVOTS, LEAST_SQUARES, FEEDBACK = "pivots", "least squares", "error feedback"
MODEL = "model pass"
READ, KEEP = "bytes read from memory's copy of a file", "bytes hashed, or written"
EIGH_FLOPS = 9  # of n^3: a convention, what is measured and used is time over n^3
LENGTH = 2048  # tokens a window: the converter's default for a model with such a context
WHOLE_LOSSES = 4  # of the joined groups, on all windows

# FLOP/s of one H200 at sizes like these, none of it measured by us. Peaks from NVIDIA's data sheet: 67e12 for FP64 on
# tensor cores and for FP32, 989e12 for BF16; the shares of them are guesses. EIGH, over its 9 n^3: cuSOLVER's syevd is
# bound by memory and launches (Wang et al., "Extracting the Potential of Emerging Hardware Accelerators for Symmetric
# Eigenvalue Decomposition": below 3 % of an H100's peak). PIVOTS: eight cores at what one does here, beside the GPU.
# FEEDBACK: three launches of 7 microseconds a row. READ, KEEP: bytes a second; one core's sha256 is such a one.
ASSUMED_H200 = {
    PRODUCT: 0.7 * 67e12,
    NARROW_PRODUCT: 0.7 * 67e12,
    GRAM: 0.5 * 989e12,
    ROOT: 0.15 * 67e12,
    LEAST_SQUARES: 0.08 * 67e12,
    EIGH: 1e12,
    PIVOTS: 6e11,
    FEEDBACK: 1.6e11,
    MODEL: 0.5 * 989e12,
    READ: 1e10,
    KEEP: 2e9,
}


def default(option: str) -> int:
    """The converter's own."""
    return ConvertOptions.options()[option].default


@dataclass(frozen=True)
class Run:
    """What a conversion is given: windows that it calibrates on and their tokens, windows of a batch, steps, processes
    that share the work."""

    samples: int = default("samples")
    length: int = LENGTH
    batch_size: int = default("batch_size")
    steps: int = default("steps")
    heal_steps: int = default("heal_steps")
    processes: int = 1

    @property
    def heal_windows(self) -> int:
        """Of a step of healing."""
        return HealingSettings().step_windows(self.batch_size, self.length, self.processes)

    @property
    def asked(self) -> int:
        """Windows that the teacher is asked about."""
        options = ConvertOptions.named(
            remove=0.5, samples=self.samples, batch_size=self.batch_size, heal_steps=self.heal_steps
        )
        return max(self.samples, options.windows_to_heal_on(self.length))

    @property
    def aside(self) -> int:
        """Windows that joining and healing compare on."""
        return min(ASIDE_WINDOWS, -(-self.samples // 8))


DEFAULT = Run()


def rate(rates: dict[int, float], size: int) -> float:
    """At this size: between measured sizes on a straight line of logarithms, flat beyond them."""
    sizes = sorted(rates)
    if size <= sizes[0] or len(sizes) == 1:
        return rates[sizes[0]]
    for low, high in pairwise(sizes):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return rates[low] * (rates[high] / rates[low]) ** share
    return rates[sizes[-1]]


def time_of(work: Work, rates: dict[str, dict[int, float]]) -> dict[str, float]:
    """Seconds by kind."""
    found = dict.fromkeys((kind for kind, _, _ in work), 0.0)
    for kind, size, flops in work:
        found[kind] += flops / rate(rates[kind], size)
    return found


def separate_groups(shape: dict) -> list[LinearGroup]:
    """One group a linear layer."""
    return [
        LinearGroup((name,), (rows,), joint.columns, joint.side, joint.source)
        for joint in groups_of(shape)
        for name, rows in zip(joint.members, joint.member_rows, strict=True)
    ]


def decomposition_work(m: int, n: int) -> Work:
    """fermisvd.decomposition.kfac_svd of W (m x n)."""
    k = min(m, n)
    formed = 2 * m * n * n + 2 * m * m * n if m <= n else 2 * m * n * n  # W C W^T, or W^T W
    return [
        (PRODUCT, k, formed + 6 * k**3),  # between the roots; root times vectors
        (ROOT, k, 4 / 3 * k**3),
        (EIGH, k, EIGH_FLOPS * k**3),
        (NARROW_PRODUCT, k, 2 * m * n * k),
    ]


def gram_flops(n: int) -> int:
    """fermisvd.calibration.add_gram of one token: panels of the lower triangle."""
    width = panel_width(n)
    return sum(2 * (n - first) * min(width, n - first) for first in range(0, n, width))


def gauge_work(m: int, n: int, r: float, side: str) -> Work:
    """fermisvd.pivga.fix_gauge of A (m x r) B (r x n), but for exchanges, which depend on the numbers."""
    if side == "rows":
        m, n = n, m
    q = n - r
    return [
        (PRODUCT, round(r), 2 * r * r * n + 2 * r * n * n + 2 * m * r * n),
        (ROOT, round(r), r * r * q),
        (PIVOTS, n, 2 * n * n * r),
        (LEAST_SQUARES, round(2 * r), least_squares_flops(m, r, q) + 2 * m * r * r),
        (FEEDBACK, round(2 * r), feedback_flops(r, q)),
    ]


def least_squares_flops(m: float, r: float, q: float) -> float:
    """Householder QR of (m x r), applied to q columns, and a triangular solve."""
    return 2 * r * r * (m - r / 3) + 4 * m * r * q - 2 * r * r * q + r * r * q


def feedback_flops(r: float, q: float) -> float:
    return r * r * q


def attention_flops(shape: dict, length: int = LENGTH) -> float:
    """Of a forward pass, for each token: causal, so half of the window is seen on average."""
    return 2 * length * shape["hidden_size"] * shape["num_hidden_layers"]


def fermigrad_flops(opened: float, head: float, attention: float) -> float:
    """A step, for each token: student forward and backward in the activations, the head also for the teacher.

    opened: numbers of A and B of all groups, as far as the gates are open; head: of the output layer.
    """
    return 4 * opened + 6 * head + 3 * attention


def opened_numbers(groups: list[LinearGroup], mus: Sequence[float]) -> int:
    """Numbers of A and B that a FermiGrad step multiplies by, as far as its gates are open at these real ranks."""
    widths = [WIDTH * math.ceil((mu + 0.08 * g.full_rank) / WIDTH) for g, mu in zip(groups, mus, strict=True)]
    return sum(min(g.full_rank, width) * (g.rows + g.columns) for g, width in zip(groups, widths, strict=True))


def conversion_work(
    shape: dict, remove: float = 0.2, run: Run = DEFAULT, opened: float | None = None
) -> dict[str, Work]:
    """FLOPs of every stage, and the bytes of model and work directory that it reads, hashes or writes. FermiGrad and
    healing compute each block twice forward where its activations are large, and calibration most blocks three times
    (docs/scale.md). opened: mean of `opened_numbers` over FermiGrad's steps, by default that of uniform ranks."""
    groups, hidden = separate_groups(shape), shape["hidden_size"]
    ranks = Budget.removing(remove, "pivga").uniform_ranks(groups)
    dense = sum(g.dense_parameters for g in groups)
    head, attention = shape["vocab_size"] * hidden, attention_flops(shape, run.length)
    forward = 2 * (dense + head) + attention
    tokens, more = run.samples * run.length, (run.asked - run.samples) * run.length
    step_tokens = step_windows(STEP_TOKENS, run.length, run.batch_size) * run.length
    row = 2 * sum(g.rows + g.columns for g in groups)  # bytes that a token's activations take

    again = 1 - len(segments(range(shape["num_hidden_layers"]))) / shape["num_hidden_layers"]
    inputs = {g.source: g.columns for g in groups}
    grams = sum(map(gram_flops, inputs.values()))
    for g in groups:
        grams += gram_flops(g.full_rank) + (2 * g.rows * g.columns if g.rows > g.columns else 0)
    if opened is None:  # the budget falls linearly over the first 40 % of the steps
        whole = sum(g.full_rank * (g.rows + g.columns) for g in groups)
        opened = 0.8 * opened_numbers(groups, ranks) + 0.2 * whole
    twice = step_tokens * row > KEPT_ACTIVATIONS
    step = fermigrad_flops(opened, head, attention) + twice * (2 * opened + attention)
    batch = run.heal_windows * run.length
    kept, twice = (1 - remove) * dense, batch * row > KEPT_ACTIVATIONS
    healing = (6 + 2 * twice) * kept + 6 * head + (3 + twice) * attention
    compared = 2 * kept + 4 * head + attention  # before and after, on windows kept aside
    trial = (forward - 2 * head) / 2 + 4 * head  # half of the blocks lie before the one that is tried
    model, disk = 2 * (dense + 2 * head), work_bytes(shape, remove, run)
    states = disk["the teacher's states"]
    pivga = [piece for g, r in zip(groups, ranks, strict=True) for piece in gauge_work(g.rows, g.columns, r, g.side)]
    # the CPU finds pivots of the next groups while the GPU has its own work: the longer of the two
    beside = [piece for piece in pivga if piece[0] == PIVOTS]
    gpu = [piece for piece in pivga if piece[0] != PIVOTS]
    known = {kind: {hidden: value} for kind, value in ASSUMED_H200.items()}
    longer = max((beside, gpu), key=lambda work: sum(time_of(work, known).values()))
    return {
        "check": [(KEEP, 1, model)],
        "calibration": [
            (MODEL, hidden, tokens * ((3 + again) * forward + attention - 2 * again * head)),
            (MODEL, hidden, more * (forward - 2 * head)),  # the teacher's states alone
            (GRAM, hidden, tokens * grams),
            (READ, 1, 3 * model),
            (KEEP, 1, 2 * states),  # Gram matrices are kept beside the GPU's work
        ],
        "decomposition": [piece for g in groups for piece in decomposition_work(g.rows, g.columns)],
        "FermiGrad": [
            (MODEL, hidden, run.steps * step_tokens * step),
            (NARROW_PRODUCT, hidden, sum(2 * g.rows * g.columns * g.full_rank for g in groups)),
            (READ, 1, 2 * model + disk["factors"]),
            (KEEP, 1, states),
        ],
        "--groups auto": [
            (EIGH, hidden, sum(EIGH_FLOPS / 3 * g.full_rank**3 for g in groups_of(shape))),
            (MODEL, hidden, run.aside * run.length * (WHOLE_LOSSES * (forward + 2 * head) + TRIALS * trial)),
            (READ, 1, 2 * model + 2 * disk["factors"]),
        ],
        "writing": [*longer, (KEEP, 1, model)],
        "healing": [
            (MODEL, hidden, run.heal_steps * batch * healing + 2 * run.aside * run.length * compared),
            (KEEP, 1, 2 * model),
        ],
        "evaluation": [(MODEL, hidden, 2 * HELD_BACK_WINDOWS * run.length * forward), (READ, 1, 2 * model)],
    }


def work_bytes(shape: dict, remove: float = 0.2, run: Run = DEFAULT) -> dict[str, int]:
    """Bytes of the work directory, as the converter counts them: symmetric matrices in float32, one factor of each pair
    for all groups and all that they may be joined to, states and healed factors in bfloat16."""
    groups = separate_groups(shape)
    return {
        "Gram matrices": sum(gram_bytes(groups, "kfac").values()),
        "the teacher's states": 2 * run.asked * run.length * shape["hidden_size"],
        "factors": factors_bytes(groups, "kfac", joins=True),
        "healed factors": 2 * Budget.removing(remove, "pivga").numbers(groups),
    }


def sizes_of(shape: dict, item: int = 2, device: str = "cuda") -> Sizes:
    """The converter's view of a model of this shape with the default windows. item: bytes of the passes' type."""
    groups, vocabulary, hidden = separate_groups(shape), shape["vocab_size"], shape["hidden_size"]
    shapes = {f"{group.name}.weight": (group.rows, group.columns) for group in groups}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    headers = {name: TensorInfo(Path("model.safetensors"), "", "BF16", numbers) for name, numbers in shapes.items()}
    return model_sizes(headers, groups, vocabulary, DEFAULT.samples * LENGTH, item, device)


def stages(shape: dict, remove: float = 0.2, processes: int = 1) -> dict[str, dict[str, float]]:
    """stage -> seconds_h200 of all processes sharing the work, and the bytes that it holds at most in one process: on
    the device, beside it on the host, and in the work directory when it is done."""
    size, options = sizes_of(shape), ConvertOptions.named(remove=remove)
    windows = default("batch_size")
    passes = Passes(windows if processes == 1 else 1, LENGTH, processes, windows)
    places = 1 + places_back(size.depth)
    limit = Limits(8 * size.grams, places * size.text * size.item * size.width, copies=KEPT_AHEAD + 2)
    required = needs(size, options, passes, limit, processes)
    rates = {kind: {shape["hidden_size"]: value} for kind, value in ASSUMED_H200.items()}
    run = Run(processes=processes)
    disk, held, found = work_bytes(shape, remove, run), 0, {}
    made = {
        "calibration": ("Gram matrices", "the teacher's states"),
        "decomposition": ("factors",),
        "healing": ("healed factors",),
    }
    for stage, work in conversion_work(shape, remove, run).items():
        held += sum(disk[name] for name in made.get(stage, ()))
        need = required.get(stage)
        found[stage] = {
            "seconds_h200": round(sum(time_of(work, rates).values()) / processes, 1),
            "device_bytes": need.device if need else 0,
            "host_bytes": need.host if need else 0,
            "disk_bytes": held,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = stages(SHAPES[arguments.shape], arguments.remove, arguments.processes)
    if arguments.json:
        print(json.dumps({"stages": found}, indent=1))
        return
    print("| stage | seconds, H200 (assumed) | device GB | host GB | work directory GB |\n|---|---|---|---|---|")
    for stage, row in found.items():
        seconds, *sizes = row.values()
        print(f"| {stage} | {seconds:,.0f} | " + " | ".join(f"{value / 1e9:.1f}" for value in sizes) + " |")
    print(f"| all | {sum(row['seconds_h200'] for row in found.values()):,.0f} | | | |")


if __name__ == "__main__":
    main()
