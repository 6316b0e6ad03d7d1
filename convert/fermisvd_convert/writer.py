"""The checkpoint writer: the source's files with the compressed groups in place of their weights."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fermisvd import distributed
from fermisvd.budget import Form
from fermisvd.errors import FermiSVDError
from fermisvd.format import (
    INDEX_NAME,
    INTERPOLATION,
    LOWRANK_A,
    LOWRANK_B,
    PERMUTATION,
    SKELETON,
    FermiSVDConfig,
    Group,
    read_headers,
)
from fermisvd.groups import LinearGroup
from fermisvd.pivga import fix_gauge
from fermisvd_convert.memory import give_back
from fermisvd_convert.source import TORCH_TYPES, WEIGHT_SUFFIXES, Source
from fermisvd_convert.workspace import only_one

SHARD_BYTES = 4 * 2**30
SMALL_SHARD = 2**26  # a shard is a decoder block's size, but not less: a shard is held in memory
OWN_FILES = {"README.md", "config.json", INDEX_NAME}


class OutputError(FermiSVDError):
    """OUT cannot be written there."""


def config_group(group: LinearGroup, rank: int, form: Form) -> Group:
    """The config's entry of a compressed group."""
    return Group(members=group.members, form=form, side=group.side if form == "pivga" else None, rank=rank)


def compressed_tensors(
    group: LinearGroup, a: torch.Tensor, b: torch.Tensor, form: Form, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of one group as stored, by name. a: A (m x r); b: B (r x n)."""
    if form == "svd":
        a, b = balanced(a, b)
        parts = a.to(dtype).split(list(group.member_rows))
        tensors = {f"{name}.{LOWRANK_A}": part for name, part in zip(group.members, parts, strict=True)}
        return tensors | {f"{group.name}.{LOWRANK_B}": b.to(dtype)}
    gauge = fix_gauge(a, b, group.side, dtype)
    tensors = {f"{group.name}.{INTERPOLATION}": gauge.interpolation, f"{group.name}.{PERMUTATION}": gauge.permutation}
    skeletons = [gauge.skeleton] if group.side == "rows" else gauge.skeleton.split(list(group.member_rows))
    return tensors | {f"{name}.{SKELETON}": part for name, part in zip(group.members, skeletons, strict=True)}


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of A and rows of B equally long, so that neither leaves a narrow type's range."""
    a, b = a.double(), b.double()
    scale = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return a * scale, b / scale[:, None]


def copied_files(folder: Path) -> Iterator[Path]:
    """The files of a dense model's folder that its compressed checkpoint has too, as they are."""
    for path in folder.iterdir():
        skipped = path.suffix in WEIGHT_SUFFIXES or path.name in OWN_FILES or path.name.endswith(".index.json")
        if path.is_file() and not skipped and not path.name.startswith("."):
            yield path


def write_checkpoint(
    source: Source,
    folder: Path,
    compressed: Sequence[tuple[LinearGroup, int]],
    form: Form,
    factors_of: Callable[[LinearGroup], tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    cast_dense: bool,
    provenance: dict,
    device: str = "cpu",
) -> None:
    """Everything of the checkpoint but the model card, into `folder`, which must be empty.

    compressed: groups that do not stay dense, with their ranks; factors_of: gives A and B of a group at
    its rank; dtype: of the factors;
    cast_dense: whether the other tensors take it too, or stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in copied_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    groups = tuple(config_group(group, rank, form) for group, rank in compressed)
    replaced = {f"{name}.weight" for group, _ in compressed for name in group.members}
    provenance = provenance | {"dense_tensors": [name for name in source.headers if name not in replaced]}
    entry = FermiSVDConfig(groups=groups, provenance=provenance).model_dump(mode="json", exclude_none=True)
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        by_weight = {f"{name}.weight": group for group, _ in compressed for name in group.members}
        for name in tqdm(source.headers, desc="write", leave=False):
            if name not in by_weight:
                tensor = source.tensor(name)
                yield name, tensor.to(dtype) if cast_dense and tensor.is_floating_point() else tensor
                continue
            group = by_weight[name]
            if name == f"{group.name}.weight":
                a, b = (factor.to(device) for factor in factors_of(group))
                yield from compressed_tensors(group, a, b, form, dtype).items()
                give_back()

    block = weight_bytes(source.folder) // max(1, source.config.get("num_hidden_layers") or 1)
    _write_shards(folder, tensors(), min(SHARD_BYTES, max(SMALL_SHARD, block)))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """One model.safetensors, or numbered shards with an index where it would grow past shard_bytes."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        shards.append(list(pending))
        shard = folder / f"shard-{len(shards)}.safetensors"
        save_file(pending, shard, metadata={"format": "pt"})
        shard.chmod(0o644)  # safetensors makes files that only their owner can read; a server is often another user
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.contiguous().cpu()
        pending_bytes += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Rewrite the files of `folder` that hold tensors of these names, with the new values."""
    for file in sorted({info.file for info in read_headers(folder).values()}):
        stored = load_file(file)
        if new := stored.keys() & tensors.keys():
            stored |= {name: tensors[name].contiguous().cpu() for name in new}
            save_file(stored, file, metadata={"format": "pt"})
            file.chmod(0o644)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """OUT for this conversion alone. What a killed one left beside it is removed, a checkpoint that it had moved away
    put back.

    Raises WorkspaceError if another conversion has claimed OUT, OutputError if there can be no folder.
    """
    if distributed.rank():
        yield
        return
    lock, (partial, old) = out.parent / ".fermisvd" / f"{out.name}.lock", beside(out)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error})") from None
    with only_one(lock, out):
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists():
            shutil.rmtree(old) if out.exists() else old.rename(out)
        yield


def beside(out: Path) -> tuple[Path, Path]:
    """Where OUT is made, and where an earlier one is put while it is replaced."""
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """An empty folder, to be moved to a claimed OUT by `move_into_place`; gone afterwards.

    Raises OutputError if there is no space or no permission.
    """
    partial, _ = beside(out)
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{out}: cannot be written ({error}); it is left as it was, finished stages are kept"
        ) from None


def move_into_place(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename a finished folder to its name, an earlier one of that name out of the way first.

    Raises OutputError if there is one that is not to be overwritten.
    """
    _, old = beside(out)
    if out.exists():
        if not overwrite:
            raise OutputError(f"{out}: was made by another while the conversion ran; choose another OUT")
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def storage_type(dtype: str, source: Source) -> torch.dtype:
    """--dtype as a torch type; auto keeps the source's."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return source.weight_type() if dtype == "auto" else TORCH_TYPES[names[dtype]]
