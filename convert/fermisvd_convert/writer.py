"""The checkpoint writer: the source's files with the compressed groups in place of their weights."""

import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fermisvd.budget import RankedGroup
from fermisvd.decomposition import Decomposition
from fermisvd.errors import FormatError, reason
from fermisvd.files import ADAPTER_NAME, INDEX_NAME, WEIGHTS_NAME, TensorInfo, is_pickle, read_headers
from fermisvd.format import checkpoint_config, read_config
from fermisvd.groups import LinearGroup
from fermisvd.hf import empty_model
from fermisvd.losses import Pair
from fermisvd.running import distributed
from fermisvd.storage import config_group, group_tensors, stored_bytes
from fermisvd.tensors import module_names
from fermisvd_convert.ahead import in_order
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
    decomposition: Decomposition | None,
    dtype: torch.dtype,
    cast_dense: bool,
    device: str = "cpu",
    workers: int = 1,
) -> None:
    """Everything of the checkpoint but config.json and the model card, into `folder`, which must be there and empty:
    each process writes its part of the weights' files, the first also the files that are no weights.

    compressed: groups that are not stored as they were; factors_of: gives A and B of one that does not stay dense, at
    its rank; decomposition: has weights and Gram matrices, which only rounding to a grid asks for; dtype: of the
    factors, or of their scales; cast_dense: whether the other tensors take it too, or stay as they are; workers: groups
    that are worked on at once.
    """
    pieces = planned(source, compressed, dtype, cast_dense)
    block = weight_bytes(source.headers) // source.blocks()
    shards = divided(pieces, min(SHARD_BYTES, max(SMALL_SHARD, block)))
    if distributed.this_process() == 0:
        for path in copied_files(source.folder)[0]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / path, folder / path)
        if len(shards) > 1:
            write_index(folder, shards, sum(sum(sizes.values()) for sizes in pieces.values()))
    ranked_of = {f"{each.group.name}.weight": each for each in compressed}

    def made(piece: str) -> dict[str, torch.Tensor]:
        if piece not in ranked_of:
            tensor = source.tensor(piece)
            cast = cast_dense and tensor.is_floating_point()
            return {source.stored_name(piece): tensor.to(dtype) if cast else tensor}
        ranked = ranked_of[piece]
        tensors = group_tensors(ranked, factors_of, decomposition, dtype, device)
        return {source.stored_name(name): tensor.contiguous().cpu() for name, tensor in tensors.items()}

    own = distributed.own_run(list(shards.items()))
    _write_shards(folder, own, lambda pieces: in_order(made, pieces, device, workers))


def planned(
    source: Source, compressed: Sequence[RankedGroup], dtype: torch.dtype, cast_dense: bool
) -> dict[str, dict[str, int]]:
    """What will be written, in order: a piece for each dense tensor and each group, named by the source's tensor (of a
    group's, its first), with the bytes of each of its tensors by name in the files. All processes plan the same, before
    there are values."""
    ranked_of, found = {f"{name}.weight": each for each in compressed for name in each.group.members}, {}
    for name, info in source.headers.items():
        if name not in ranked_of:
            cast = cast_dense and info.dtype in TORCH_TYPES
            found[name] = {source.stored_name(name): info.numel * dtype.itemsize if cast else info.bytes}
        elif name == f"{ranked_of[name].group.name}.weight":
            sizes = stored_bytes(ranked_of[name], dtype)
            found[name] = {source.stored_name(tensor): size for tensor, size in sizes.items()}
    return found


def divided(pieces: Mapping[str, Mapping[str, int]], shard_bytes: int) -> dict[str, dict[str, str]]:
    """File -> tensor -> the piece that it is of: model.safetensors, or numbered shards where it would grow past
    shard_bytes. A piece is in one file, so that one process makes all of it."""
    shards: list[dict[str, str]] = [{}]
    filled = 0
    for piece, tensors in pieces.items():
        if shards[-1] and filled + sum(tensors.values()) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1] |= dict.fromkeys(tensors, piece)
        filled += sum(tensors.values())
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _write_shards(
    folder: Path,
    shards: Sequence[tuple[str, Mapping[str, str]]],
    made: Callable[[Iterable[str]], Generator[dict[str, torch.Tensor]]],
) -> None:
    """These files, each as soon as its tensors are there. made: gives pieces' tensors, in order."""
    pieces = dict.fromkeys(piece for _, shard in shards for piece in shard.values())
    wanted = {name for _, shard in shards for name in shard}  # of a piece, others may be another process'
    held: dict[str, torch.Tensor] = {}
    with bar("write", len(pieces), "tensor") as shown, closing(made(pieces)) as results:
        for file, shard in shards:
            while not shard.keys() <= held.keys():
                held |= {name: tensor for name, tensor in next(results).items() if name in wanted}
                give_back()
                shown.advance()
            save_file({name: held.pop(name) for name in shard}, folder / file, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read; a server is often another user
            (folder / file).chmod(usual_mode())


def write_index(folder: Path, shards: Mapping[str, Mapping[str, str]], total: int) -> None:
    """total: bytes of all tensors."""
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_config(
    source: Source, folder: Path, compressed: Sequence[RankedGroup], dtype: torch.dtype, provenance: dict
) -> None:
    """config.json: the source's, and the quantization_config that describes the groups, by the names of the files."""
    replaced = {f"{name}.weight" for ranked in compressed for name in ranked.group.members}
    dense = [source.stored_name(name) for name in source.headers if name not in replaced]
    provenance = provenance | {"dense_tensors": dense}
    groups = tuple(config_group(ranked).renamed(source.stored_name) for ranked in compressed)
    entry = checkpoint_config(groups, provenance).model_dump(mode="json", exclude_none=True)
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def replace_factors(folder: Path, factors: Mapping[str, torch.Tensor], trust_remote_code: bool = False) -> None:
    """Rewrite the files of a compressed checkpoint with new values of its factors, named as the model's parameters are.

    Raises FormatError for one that no file has.
    """
    modules = module_names(empty_model(folder, trust_remote_code), read_config(folder).group_of())
    member_of = {module: member for member, module in modules.items()}
    layers = {name: name.rpartition(".") for name in factors}
    values = {f"{member_of[layer]}.{leaf}": factors[name] for name, (layer, _, leaf) in layers.items()}
    headers = read_headers(folder)
    if strangers := sorted(values.keys() - headers.keys()):
        raise FormatError(f"{folder}: no tensor {strangers[0]}, which is to be replaced")
    for file in sorted({headers[name].file for name in values}):
        stored = load_file(file)
        stored |= {name: values[name].contiguous().cpu() for name in stored.keys() & values.keys()}
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
