"""What each step of a conversion needs in memory, counted beforehand, and how much of it may be held at once.

Counted are weights, states and activations in the type of the passes, matrices in float64; not the program itself, nor
what an allocator keeps. Steps that would not fit are given smaller passes, or are divided among the processes; where
nothing fits they are refused.
"""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fermisvd.batches import step_windows
from fermisvd.compress import ASIDE_WINDOWS
from fermisvd.errors import OptionError
from fermisvd.fermigrad import STEP_TOKENS
from fermisvd.files import TensorInfo
from fermisvd.groups import LinearGroup, block_of, parent_of
from fermisvd.refit import TRIAL_WINDOWS
from fermisvd.running import distributed
from fermisvd.running.blocks import KEPT_ACTIVATIONS, places_back
from fermisvd.running.halves import HEAD_TOKENS, compared_tokens
from fermisvd.schemes import WeightsRule
from fermisvd_convert.options import ConvertOptions

HIDDEN_BYTES = 2**26  # hidden states held in memory with --max-memory, or a block's bytes, if they are left
HIDDEN_PART = 0.5  # of the memory that there is, for hidden states without --max-memory
CONTAINER = Path("/sys/fs/cgroup/memory.max")  # cgroup v2's limit, seen from inside
FLOAT, DOUBLE = 4, 8
KEPT_AHEAD = 2  # parts of matrices that are being kept while the GPU has the next
# its activations, that a pass there and back takes, which trains no weights or does; on a CPU as its resident set was
# measured, with holes that the C library keeps (docs/results.md, memory counted and measured)
GATED_TIMES, TRAINED_TIMES = {"cuda": 2.0, "cpu": 1.75}, {"cuda": 2.0, "cpu": 3.1}
THROUGH_GRID = 3  # float32 numbers that a pass keeps of each number that it rounds: reckoned, not measured
GRAMS_TO_ROUND = 5  # Gram matrices in float64 while a group is rounded: in order, damped, its root (reckoned)
GAUGE_BYTES = 28  # that PivGa takes for each number of W: 24 measured (docs/results.md), and the factors


@dataclass(frozen=True)
class Limits:
    """gram_bytes: of the matrices that calibration gathers in one pass; copies: how many such sets there are at once,
    one gathered and, beside a GPU, others being kept; hidden_bytes: of hidden states in the host's
    memory, beyond which they are in files; bounded: whether more than is needed must not be taken, where a model is no
    plain row of blocks; device_hidden_bytes: of hidden states on a GPU, beyond which they are in the host's memory."""

    gram_bytes: int
    hidden_bytes: int
    bounded: bool = False
    device_hidden_bytes: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Sizes:
    """Numbers that a model and its text hold.

    item: bytes of each in the passes' type; depth: decoder blocks; blocks, block, outside: weights of all of them, of
    the largest, and outside of them; dense: of all groups' W; layer: of the largest group's W; gram: of the largest
    Gram matrix; grams: of all of a block; factors: full-rank A and B of all groups; width: a token's state; row: what
    a block's linear layers read and give for a token; vocabulary: a token's logits; text: the tokens that are
    calibrated on; compared: tokens whose logits are compared together; exact: the head's weights, where the device
    needs them once more in float32, else 0; gated, trained: how many times its activations a pass takes that trains
    no weights, and one that does.
    """

    item: int
    depth: int
    blocks: int
    block: int
    outside: int
    dense: int
    layer: int
    gram: int
    grams: int
    factors: int
    width: int
    row: int
    vocabulary: int
    text: int
    compared: int
    exact: int
    gated: float
    trained: float


UNKNOWN = Sizes(*[0] * 18)


@dataclass(frozen=True)
class Need:
    """Bytes that a step holds at its peak, on the device and beside it in the host's memory, which are one where the
    device is the CPU; instead: what to do where there are not so many."""

    device: int
    host: int
    instead: str


@dataclass(frozen=True)
class Passes:
    """How the steps run. windows: of a pass that trains or compares; length: tokens of a window; parts: processes that
    models that are trained or joined are divided among (FSDP2, which gathers a block at a time and the next one);
    calibrated: windows of a pass of calibration, the teacher and evaluations, which do not depend on what follows, so
    that these are found again."""

    windows: int
    length: int
    parts: int = 1
    calibrated: int = 1

    @property
    def tokens(self) -> int:
        return self.windows * self.length


def model_sizes(
    headers: dict[str, TensorInfo], groups: list[LinearGroup], vocabulary: int, text: int, item: int, device: str
) -> Sizes:
    """headers: the model's tensors; device: of its passes; the others as in Sizes."""
    blocks, outside = parent_of(block_of(groups[0].name)), 0
    by_block: dict[str, int] = {}
    for name, info in headers.items():
        if parent_of(block := block_of(name)) == blocks:
            by_block[block] = by_block.get(block, 0) + info.numel
        else:
            outside += info.numel
    kind = "cuda" if device.startswith("cuda") else "cpu"
    depth, inputs = len(by_block), {group.source: group.columns for group in groups}
    squares = sum(n**2 for n in inputs.values())
    squares += sum(min(rows, group.columns) ** 2 for group in groups for rows in group.member_rows)
    return Sizes(
        item=item,
        depth=depth,
        blocks=sum(by_block.values()),
        block=max(by_block.values()),
        outside=outside,
        dense=sum(group.dense_parameters for group in groups),
        layer=max(group.dense_parameters for group in groups),
        gram=max(group.columns**2 for group in groups),
        grams=squares // depth,
        factors=sum(group.full_rank * (group.rows + group.columns) for group in groups),
        width=groups[0].columns,
        row=sum(group.rows + group.columns for group in groups) // depth,
        vocabulary=vocabulary,
        text=text,
        compared=compared_tokens(device),
        exact=vocabulary * groups[0].columns if item < FLOAT and kind == "cpu" else 0,
        gated=GATED_TIMES[kind],
        trained=TRAINED_TIMES[kind],
    )


def limits(size: Sizes, tokens: int, max_memory: int | None, device: str = "cpu") -> Limits:
    """By default all of a block's matrices, since a block is run again for those that are left out, and where memory
    asks for it no more than a block and the largest of them; of hidden states half of the host's memory, or what
    calibration leaves of it, and half of what it leaves of a GPU's. tokens: of a pass of calibration."""
    every, usual = DOUBLE * size.grams, FLOAT * size.block + DOUBLE * size.gram
    if max_memory is None:
        on_gpu, host, room = device.startswith("cuda"), memory_of("cpu", None), memory_of(device, None)
        ahead = KEPT_AHEAD + 2 if on_gpu else 1
        taken, grams, copies = 0, 0, 0
        for grams, copies in ((every, ahead), (every, 1), (min(usual, every), 1)):
            taken = calibration_bytes(size, tokens, grams * copies)
            if taken <= room:
                break
        on_device = max(0, room - taken) if on_gpu else 0
        left = host if on_gpu else max(0, host - taken)
        hidden = min(int(HIDDEN_PART * host), left)
        return Limits(grams, hidden, device_hidden_bytes=int(HIDDEN_PART * on_device), copies=copies)
    rest = max_memory - calibration_bytes(size, tokens, 0)
    hidden = max(0, min(max(HIDDEN_BYTES, FLOAT * size.block), rest // 4))
    return Limits(max(DOUBLE * size.gram, min(every, rest - hidden)), hidden, bounded=True)


def streamed_bytes(size: Sizes) -> int:
    """A model of which one block is in memory."""
    return size.item * (size.outside + size.block)


def head_bytes(size: Sizes, tokens: int) -> int:
    """Two models' heads compared for a few tokens: four times their logits in float32, and the gradient in the passes'
    type; and the head's own float32."""
    return min(size.compared, tokens) * size.vocabulary * (size.item + 4 * FLOAT) + FLOAT * size.exact


def drawn_bytes(size: Sizes, tokens: int) -> int:
    """Calibration's draw from the head: logits, and three times their float32."""
    return min(HEAD_TOKENS, tokens) * size.vocabulary * (size.item + 3 * FLOAT)


def activation_bytes(size: Sizes, tokens: int) -> int:
    """One block's, there and back."""
    return 2 * size.item * tokens * size.row


def calibration_bytes(size: Sizes, tokens: int, gram_bytes: int) -> int:
    """What calibration takes besides hidden states."""
    return streamed_bytes(size) + gram_bytes + max(activation_bytes(size, tokens), drawn_bytes(size, tokens))


def decomposition_bytes(size: Sizes) -> int:
    """Of one group."""
    return 2 * DOUBLE * size.gram + 6 * FLOAT * size.layer


def writing_bytes(size: Sizes, weights: WeightsRule = "auto") -> int:
    """Of one group's PivGa form, and of its rounding to a grid."""
    return GAUGE_BYTES * size.layer + (0 if weights == "auto" else GRAMS_TO_ROUND * DOUBLE * size.gram)


def training_bytes(size: Sizes, tokens: int, times: float) -> int:
    """Activations of a pass there and back through all blocks, so many times, which compute them again beyond
    KEPT_ACTIVATIONS; and the head."""
    kept = size.item * tokens * size.row * size.depth
    if kept <= KEPT_ACTIVATIONS:
        return int(times * kept) + head_bytes(size, tokens)
    states = size.item * tokens * size.width * size.depth
    return states + activation_bytes(size, tokens) + head_bytes(size, tokens)


def divided(size: Sizes, passes: Passes, total: int, weights: int) -> int:
    """Bytes on each device of what all blocks hold together; of their weights, those of two blocks are gathered."""
    return total if passes.parts == 1 else total // passes.parts + 2 * weights // size.depth


def gated_bytes(size: Sizes, passes: Passes, step_tokens: int = STEP_TOKENS) -> int:
    """What FermiGrad holds on each device, or a rescaling."""
    gated = size.item * (size.factors + size.blocks - size.dense)
    tokens = step_windows(step_tokens, passes.length, passes.windows) * passes.length
    return divided(size, passes, gated, gated) + size.item * size.outside + training_bytes(size, tokens, size.gated)


def healing_bytes(size: Sizes, passes: Passes, kept: float, share: int, on_grid: bool = False) -> int:
    """On each device. kept: fraction of the dense parameters; share: windows of a step that a process takes. Of each
    factor: the copy that the passes use, its value in float32, two moments in the type of the copy, and a gradient
    where it waits for further passes. On a grid: value and moments in float32, and what a pass makes of the value."""
    factors, rest = int(kept * size.dense), size.item * (size.blocks - size.dense)
    weights = size.item * factors + rest
    waiting = size.item if passes.windows < share else 0
    beside = factors * (2 * size.item + (FLOAT if size.item < FLOAT else 0) + waiting)
    if on_grid:
        beside = factors * (3 * FLOAT + THROUGH_GRID * FLOAT + waiting * FLOAT // size.item)
    tokens = min(passes.windows, share) * passes.length
    held = divided(size, passes, weights + beside, weights) + size.item * size.outside
    return held + training_bytes(size, tokens, size.trained)


def needs(size: Sizes, options: ConvertOptions, passes: Passes, limit: Limits, processes: int = 1) -> dict[str, Need]:
    """Of the steps that a conversion takes, by name."""
    whole, smaller = size.item * (size.blocks + size.outside), "--sequence-length smaller"
    state, calibrated = size.item * size.width, passes.calibrated * passes.length
    forward = activation_bytes(size, passes.tokens) // 2 + head_bytes(size, passes.tokens)
    aside = ASIDE_WINDOWS * passes.length * state  # before the block that is tried
    places = 1 + (places_back(size.depth) if options.whitening == "kfac" else 0)
    on_device = min(limit.device_hidden_bytes, places * size.text * state)
    hidden = min(limit.hidden_bytes, places * size.text * state - on_device)
    calibration = calibration_bytes(size, calibrated, limit.gram_bytes * limit.copies) + on_device
    found = {
        "calibration": Need(calibration, hidden, smaller),
        "decomposition": Need(decomposition_bytes(size), 0, "--groups separate, for smaller matrices"),
    }
    if options.ranks == "fermigrad":
        instead = "--ranks uniform or a file of ranks, or more processes"
        found["FermiGrad"] = Need(gated_bytes(size, passes, options.fermigrad.step_tokens), 0, instead)
        if options.form == "svd":
            blocks = size.item * (size.factors + size.blocks - size.dense)
            taken = divided(size, passes, blocks, blocks) + size.item * size.outside + forward
            found["the choice of dense groups"] = Need(taken, 0, instead)
    if options.joins:
        blocks = size.item * size.blocks
        taken = divided(size, passes, blocks, blocks) + size.item * size.outside
        instead = "--groups joint or separate, or more processes"
        taken += max(forward, decomposition_bytes(size)) + aside
        found["--groups auto"] = Need(taken, 0, instead)
    if options.refits:
        grams = decomposition_bytes(size) + 4 * DOUBLE * size.gram
        kept = options.budget.kept_parameters
        refitted = 2 * FLOAT * int(kept * size.dense)  # r (m + n) is at most twice what pivga counts
        tried = TRIAL_WINDOWS * passes.length * state
        taken = whole + size.item * size.block + 2 * size.text * state + max(forward, grams) + tried + refitted
        found["--refit"] = Need(taken, 0, "--no-refit")
    if options.rescales:
        found["--rescale"] = Need(gated_bytes(size, passes), 0, "--no-rescale")
    found["writing"] = Need(writing_bytes(size, options.weights), size.item * size.block, "--form svd")
    if options.healing.steps:
        kept = options.budget.kept_parameters
        start = int(size.item * kept * size.dense)
        windows = options.healing.step_windows(options.batch_size, passes.length, processes)
        trained = healing_bytes(size, passes, kept, -(-windows // processes), options.weights != "auto")
        found["healing"] = Need(trained, start, "--heal-steps 0, or more processes")
    return found


def fewer(batch_size: int) -> Iterator[int]:
    """Windows of a pass to try: all of a batch, half of them, ..., one."""
    while batch_size:
        yield batch_size
        batch_size //= 2


def missing(
    required: dict[str, Need], room: int, host_room: int | None, bound: str = "--max-memory, or what the machine has"
) -> str:
    """What is said of the first step that takes more than `room` bytes, or in the host's memory beside a GPU more than
    `host_room`; nothing where all fit. host_room: None where the device is the CPU; bound: what decides these."""
    for step, need in required.items():
        taken = need.device + (need.host if host_room is None else 0)
        for place, bytes_needed, there in (("", taken, room), (" of the host's memory", need.host, host_room)):
            if there is not None and bytes_needed > there:
                return (
                    f"{step} takes about {bytes_needed / 2**30:.2f} GiB{place}, there are {there / 2**30:.2f} "
                    f"({bound}); give more, or: {need.instead}"
                )
    return ""


def passes_that_fit(
    size: Sizes, options: ConvertOptions, length: int, device: str, processes: int
) -> tuple[Passes, Limits]:
    """With which no step takes more than there is, and the limits: as many windows of a batch in a pass as fit, each
    process with a model of its own or, where that does not fit, all with a part of one. Raises OptionError naming the
    first step that takes more with one window."""
    on_gpu, room = device.startswith("cuda"), memory_of(device, options.max_memory)
    host_room, lacking = memory_of("cpu", None) if on_gpu else None, ""
    for calibrated in fewer(options.batch_size):
        limit = limits(size, calibrated * length, options.max_memory, device)
        passes = Passes(1, length, 1, calibrated)
        first = {name: need for name, need in needs(size, options, passes, limit).items() if name == "calibration"}
        if not (lacking := missing(first, room, host_room)):
            break
    for parts in () if lacking else dict.fromkeys((1, processes)):
        for windows in fewer(options.batch_size):
            passes = Passes(windows, length, parts, calibrated)
            if not (lacking := missing(needs(size, options, passes, limit, processes), room, host_room)):
                return passes, limit
    raise OptionError(lacking)


def memory_of(device: str, max_memory: int | None) -> int:
    """Bytes that a model on the device may take."""
    if max_memory is not None:
        return max_memory
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CONTAINER.is_file() and (limit := CONTAINER.read_text().strip()).isdecimal():
        memory = min(memory, int(limit))
    return memory // distributed.launched("LOCAL_WORLD_SIZE")  # processes of this machine


def give_back() -> None:
    """Freed memory back to the system, where the C library would keep it: between pieces of work, so that it does not
    pile up with their number."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
