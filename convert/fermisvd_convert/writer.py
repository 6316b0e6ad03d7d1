"""The checkpoint writer: the source's files with the compressed groups in place of their weights."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fermisvd.budget import RankedGroup
from fermisvd.errors import reason
from fermisvd.files import ADAPTER_NAME, INDEX_NAME, WEIGHTS_NAME, TensorInfo, is_pickle, read_headers
from fermisvd.format import CheckpointConfig
from fermisvd.groups import LinearGroup
from fermisvd.losses import Pair
from fermisvd.storage import compressed_tensors, config_group
from fermisvd_convert.loading import SourceError
from fermisvd_convert.memory import give_back
from fermisvd_convert.progress import bar
from fermisvd_convert.source import TORCH_TYPES, Source

SHARD_BYTES = 4 * 2**30
SMALL_SHARD = 2**26  # a shard is a decoder block's size, but not less: a shard is held in memory
OWN_FILES = {"README.md", "config.json"}  # written anew
# other forms of the same weights; .bin is also what some tokenizers call their vocabulary
WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".ot", ".npz"}
WEIGHT_NAMES = re.compile(r"openvino.*\.bin|ggml.*\.bin|weight\.bin|.*\.onnx[._]data.*|.*\.index\.json")


def copied_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a dense model's folder, in nested folders too, that its compressed checkpoint has as they are; and
    those that it has not: weights of whatever form, indices of them, an adapter's config. Relative to the folder.

    Hidden files and folders (.git, .cache) are neither.
    """
    copied, left, seen = [], [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if (real := os.path.realpath(parent)) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            relative = path.relative_to(folder)
            if name.startswith(".") or not path.is_file() or str(relative) in OWN_FILES:
                continue
            if not os.access(path, os.R_OK):  # before long work
                raise SourceError(f"{path}: cannot be read (permission denied), and is to be copied to OUT")
            (left if _is_weights(path) else copied).append(relative)
    return copied, left


def _raise(error: OSError) -> None:
    raise SourceError(f"{error.filename}: cannot be read ({reason(error)})")


def _is_weights(path: Path) -> bool:
    named = path.suffix in WEIGHT_SUFFIXES or WEIGHT_NAMES.fullmatch(path.name)
    return bool(named) or path.name == ADAPTER_NAME or is_pickle(path)


def write_checkpoint(
    source: Source,
    folder: Path,
    compressed: Sequence[RankedGroup],
    factors_of: Callable[[LinearGroup], Pair],
    dtype: torch.dtype,
    cast_dense: bool,
    provenance: dict,
    device: str = "cpu",
) -> None:
    """Everything of the checkpoint but the model card, into `folder`, which must be empty.

    compressed: groups that do not stay dense; factors_of: gives A and B of a group at its rank; dtype: of the factors;
    cast_dense: whether the other tensors take it too, or stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in copied_files(source.folder)[0]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / path, folder / path)
    _write_config(source, folder, compressed, dtype, provenance)
    ranked_of = {f"{name}.weight": ranked for ranked in compressed for name in ranked.group.members}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with bar("write", len(source.headers), "tensor") as shown:
            for name in source.headers:
                if name not in ranked_of:
                    tensor = source.tensor(name)
                    yield name, tensor.to(dtype) if cast_dense and tensor.is_floating_point() else tensor
                elif name == f"{(ranked := ranked_of[name]).group.name}.weight":
                    a, b = (factor.to(device) for factor in factors_of(ranked.group))
                    yield from compressed_tensors(ranked, a, b, dtype).items()
                    give_back()
                shown.advance()

    block = weight_bytes(source.headers) // source.blocks()
    _write_shards(folder, tensors(), min(SHARD_BYTES, max(SMALL_SHARD, block)))


def _write_config(
    source: Source, folder: Path, compressed: Sequence[RankedGroup], dtype: torch.dtype, provenance: dict
) -> None:
    """config.json: the source's, and the quantization_config that describes the groups."""
    replaced = {f"{name}.weight" for ranked in compressed for name in ranked.group.members}
    provenance = provenance | {"dense_tensors": [name for name in source.headers if name not in replaced]}
    groups = tuple(config_group(ranked) for ranked in compressed)
    entry = CheckpointConfig(groups=groups, provenance=provenance).model_dump(mode="json", exclude_none=True)
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """One model.safetensors, or numbered shards with an index where it would grow past shard_bytes."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        shards.append(list(pending))
        shard = folder / f"shard-{len(shards)}.safetensors"
        save_file(pending, shard, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; a server is often another user
        shard.chmod(usual_mode())
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
        (folder / "shard-1.safetensors").rename(folder / WEIGHTS_NAME)
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
            file.chmod(usual_mode())


def usual_mode() -> int:
    """Permissions that a new file has by the process' umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def weight_bytes(headers: Mapping[str, TensorInfo]) -> int:
    """Bytes of a model's tensors."""
    return sum(info.bytes for info in headers.values())


def storage_type(dtype: str, source: Source) -> torch.dtype:
    """--dtype as a torch type; auto keeps the source's."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return source.weight_type() if dtype == "auto" else TORCH_TYPES[names[dtype]]
