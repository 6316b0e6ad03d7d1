"""--max-memory: what each step of a conversion needs, in bytes, and how much of it may be held at once.

Counted are weights in float32, matrices in float64 and the largest activations; not the program itself, nor what the
allocator keeps. Steps that hold whole models are refused beforehand where they would not fit.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fermisvd.errors import OptionError
from fermisvd.files import TensorInfo
from fermisvd.groups import LinearGroup, block_of, parent_of
from fermisvd.running import distributed
from fermisvd_convert.options import ConvertOptions

HIDDEN_BYTES = 2**26  # hidden states held in memory with --max-memory, or a block's bytes, if they are left
HIDDEN_PART = 0.5  # of the memory that there is, for hidden states without --max-memory
CONTAINER = Path("/sys/fs/cgroup/memory.max")  # cgroup v2's limit, seen from inside
FLOAT = 4


@dataclass(frozen=True)
class Limits:
    """gram_bytes: of the matrices that calibration gathers in one pass; hidden_bytes: of hidden states in the host's
    memory, beyond which they are in files; bounded: whether more than is needed must not be taken, where a model is no
    plain row of blocks; device_hidden_bytes: of hidden states on a GPU, beyond which they are in the host's memory."""

    gram_bytes: int
    hidden_bytes: int
    bounded: bool = False
    device_hidden_bytes: int = 0


@dataclass(frozen=True)
class Sizes:
    """Bytes in float32 of a model's parts and of a batch. gram: the largest Gram matrix, float64; layer: the largest
    group's weight; factors: full-rank A and B of all groups; activations: of one block and a batch."""

    blocks: int
    block: int
    outside: int
    gram: int
    layer: int
    factors: int
    activations: int
    logits: int


def model_sizes(
    headers: dict[str, TensorInfo], groups: list[LinearGroup], vocabulary: int, windows: int, length: int
) -> Sizes:
    """windows: of a batch; length: of a window."""
    blocks, outside = parent_of(block_of(groups[0].name)), 0
    by_block: dict[str, int] = {}
    for name, info in headers.items():
        if parent_of(block := block_of(name)) == blocks:
            by_block[block] = by_block.get(block, 0) + FLOAT * info.numel
        else:
            outside += FLOAT * info.numel
    tokens = windows * length
    return Sizes(
        blocks=sum(by_block.values()),
        block=max(by_block.values()),
        outside=outside,
        gram=max(8 * group.columns**2 for group in groups),
        layer=max(FLOAT * group.dense_parameters for group in groups),
        factors=sum(FLOAT * group.full_rank * (group.rows + group.columns) for group in groups),
        activations=FLOAT * tokens * sum(g.rows + g.columns for g in groups) // len(by_block),
        logits=FLOAT * tokens * vocabulary,
    )


def limits(size: Sizes, max_memory: int | None, device: str = "cpu") -> Limits:
    """By default all of a block's matrices, as far as they are no more than a block and the largest of them; and of
    hidden states half of the host's memory, and half of what calibration leaves of a GPU's."""
    if max_memory is None:
        left = memory_of(device, None) - calibration_bytes(size) if device.startswith("cuda") else 0
        hidden, on_device = (int(HIDDEN_PART * room) for room in (memory_of("cpu", None), max(0, left)))
        return Limits(size.block + size.gram, hidden, device_hidden_bytes=on_device)
    rest = max_memory - size.outside - size.block - 2 * size.activations
    hidden = max(0, min(max(HIDDEN_BYTES, size.block), rest // 4))
    return Limits(max(size.gram, min(size.block + size.gram, rest - hidden)), hidden, bounded=True)


def calibration_bytes(size: Sizes) -> int:
    """What calibration takes besides hidden states."""
    return size.outside + size.block + size.gram + max(2 * size.activations, 3 * size.logits)


def gated_bytes(size: Sizes, parts: int = 1) -> int:
    """What FermiGrad takes on each device. parts: devices that the factors are divided among (FSDP2, which gathers a
    block at a time and the next one)."""
    block = size.factors * size.block // max(size.blocks, 1)
    factors = size.factors if parts == 1 else size.factors // parts + 2 * block
    return factors + size.outside + 3 * size.logits + 2 * size.activations


def needs(size: Sizes, options: ConvertOptions, parts: int = 1) -> dict[str, tuple[int, str]]:
    """Step -> (bytes, what to do without it), of the steps that a conversion takes. parts: as `gated_bytes`."""
    model, gated = size.blocks + size.outside, gated_bytes(size)
    found = {
        "calibration": (calibration_bytes(size), "--batch-size or --sequence-length smaller"),
        "decomposition": (2 * size.gram + 6 * size.layer, "--groups separate, for smaller matrices"),
    }
    if options.ranks == "fermigrad":
        found["FermiGrad"] = (gated_bytes(size, parts), "--ranks uniform or a file of ranks, or more processes")
        if options.form == "svd":
            found["the choice of dense groups"] = (gated, "--ranks uniform or a file of ranks")
    if options.joins:
        found["--groups auto"] = (2 * model + 2 * size.logits, "--groups joint or separate")
    if options.refits:
        found["--refit"] = (2 * model + 2 * size.logits + 4 * size.layer, "--no-refit")
    if options.healing.steps:
        kept = options.budget.kept * size.blocks
        found["healing"] = (int(model + 4 * kept + size.outside + 3 * size.logits), "--heal-steps 0")
    return found


def check_memory(required: dict[str, tuple[int, str]], room: int) -> None:
    """Raises OptionError naming the first step that takes more than `room` bytes."""
    for step, (need, instead) in required.items():
        if need > room:
            raise OptionError(
                f"{step} takes about {need / 2**30:.2f} GiB, there are {room / 2**30:.2f} (--max-memory, or what the "
                f"device has); give more, or: {instead}"
            )


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
