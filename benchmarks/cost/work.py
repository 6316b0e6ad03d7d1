"""How many FLOPs does a conversion take, by kind of piece? A module; decomposition.py here times the kinds.

From the shapes alone. A Work is a list of (kind, size, FLOPs): how fast a kind runs depends on how large its matrices
are. Llama models, separate groups, kfac whitening, pivga form, uniform ranks in place of FermiGrad's: the converter's
defaults else.
"""

from collections.abc import Iterator

from benchmarks.shapes import groups_of
from fermisvd.budget import Budget
from fermisvd.calibration import panel_width
from fermisvd.compress import ASIDE_WINDOWS
from fermisvd.groups import LinearGroup
from fermisvd.joining import coarser_partitions
from fermisvd.running.blocks import segments
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.space import factors_bytes, gram_bytes
from fermisvd_convert.text import HELD_BACK_WINDOWS

Work = list[tuple[str, int, float]]
PRODUCT, NARROW_PRODUCT, GRAM = "product, float64", "product, float32", "Gram sum"
ROOT, EIGH = "Cholesky and solve", "eigh"
PIVOTS, LEAST_SQUARES, FEEDBACK = "pivots", "least squares", "error feedback"
MODEL = "model pass"
EIGH_FLOPS = 9  # of n^3: a convention, what is measured and used is time over n^3
LENGTH = 2048  # tokens a window: the converter's default for a model with such a context


def default(option: str) -> int:
    """The converter's own."""
    return ConvertOptions.options()[option].default


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
    return r * r * q + 4 / 3 * r**3


def attention_flops(shape: dict) -> float:
    """Of a forward pass, for each token: causal, so half of the window is seen on average."""
    return 2 * LENGTH * shape["hidden_size"] * shape["num_hidden_layers"]


def fermigrad_flops(linear: float, opened: float, head: float, attention: float) -> float:
    """A step, for each token: teacher forward, student forward and backward in the activations.

    linear, opened: numbers of A and B of all groups, whole and as far as the gates are open; head: of the output layer.
    """
    return 2 * (linear + head) + attention + 4 * (opened + head) + 3 * attention


def conversion_work(shape: dict, remove: float = 0.2) -> dict[str, Work]:
    """FLOPs of every stage but reading and writing files. FermiGrad computes each block twice forward, and
    calibration most blocks three times (docs/scale.md)."""
    groups, hidden = separate_groups(shape), shape["hidden_size"]
    ranks = Budget.removing(remove, "pivga").uniform_ranks(groups)
    dense = sum(g.dense_parameters for g in groups)
    head, attention = shape["vocab_size"] * hidden, attention_flops(shape)
    forward = 2 * (dense + head) + attention
    tokens = default("samples") * LENGTH
    batch = default("batch_size") * LENGTH

    again = 1 - len(segments(range(shape["num_hidden_layers"]))) / shape["num_hidden_layers"]
    inputs = {g.source: g.columns for g in groups}
    grams = sum(map(gram_flops, inputs.values()))
    for g in groups:
        grams += gram_flops(g.full_rank) + (2 * g.rows * g.columns if g.rows > g.columns else 0)
    whole = sum(g.full_rank * (g.rows + g.columns) for g in groups)
    opened = sum(
        min(g.full_rank, r + 0.08 * g.full_rank) * (g.rows + g.columns) for g, r in zip(groups, ranks, strict=True)
    )
    opened = 0.8 * opened + 0.2 * whole  # the budget falls linearly over the first 40 % of the steps
    step = fermigrad_flops(whole, opened, head, attention) + 2 * opened + attention
    trials = sum(_alternatives(shape)) + 1
    kept = (1 - remove) * dense
    healing = forward + 6 * kept + 4 * head + 3 * attention
    return {
        "calibrate: passes": [(MODEL, hidden, tokens * ((3 + again) * forward + attention - 2 * again * head))],
        "calibrate: Gram matrices": [(GRAM, hidden, tokens * grams)],
        "decompose": [piece for g in groups for piece in decomposition_work(g.rows, g.columns)],
        "FermiGrad": [(MODEL, hidden, default("steps") * batch * step)],
        "groups: auto": [(MODEL, hidden, trials * ASIDE_WINDOWS * LENGTH * 2 * forward)],
        "write: PivGa": [
            piece for g, r in zip(groups, ranks, strict=True) for piece in gauge_work(g.rows, g.columns, r, g.side)
        ],
        "heal": [(MODEL, hidden, default("heal_steps") * batch * healing)],
        "evaluate": [(MODEL, hidden, 2 * HELD_BACK_WINDOWS * LENGTH * forward)],
    }


def _alternatives(shape: dict) -> Iterator[int]:
    """Partitions that --groups auto tries, for every fused layer."""
    for joint in groups_of(shape):
        yield len(list(coarser_partitions(len(joint.members))))


def work_bytes(shape: dict, remove: float = 0.2) -> dict[str, int]:
    """Bytes of the work directory, as the converter counts them: symmetric matrices in float32, one factor of each pair
    for all groups and all that they may be joined to, and healed factors in bfloat16."""
    groups = separate_groups(shape)
    healed = 2 * Budget.removing(remove, "pivga").numbers(groups)
    return gram_bytes(groups, "kfac") | {"factors": factors_bytes(groups, "kfac", joins=True), "healed factors": healed}
