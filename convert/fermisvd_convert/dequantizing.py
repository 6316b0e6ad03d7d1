"""`fermisvd dequantize`: a dense bfloat16 copy of a model in block fp8 or MXFP4, one tensor after the other.

`convert` reads dense models only, and a checkpoint of ours has one quantization_config, its own: fp8 layers or MXFP4
experts beside factors would be read as what they are not. A shard of the copy is held in memory, no more.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fermisvd.errors import OutputError, reason
from fermisvd.files import TensorInfo, read_headers
from fermisvd_convert.checks import check_place
from fermisvd_convert.loading import SourceError
from fermisvd_convert.output import check_free, claimed, complete, move_into_place, unfinished
from fermisvd_convert.places import real_path
from fermisvd_convert.progress import bar
from fermisvd_convert.source import find_folder
from fermisvd_convert.writer import SHARD_BYTES, copied_files, divided, usual_mode, write_index

Headers = Mapping[str, TensorInfo]
Read = Callable[[str], torch.Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # a byte holds two


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the dense copy: its shape, its bytes, and what makes it."""

    shape: tuple[int, ...]
    bytes: int
    make: Callable[[Read], torch.Tensor]


def dequantize_checkpoint(model: str | Path, dense: str | Path) -> dict[str, int]:
    """Write a dense copy of `model`, a folder or hub id, as the new folder `dense`; returns how many tensors were made
    dense, and the bytes of all before and after.

    Raises SourceError for a model that is neither in block fp8 nor in MXFP4, OutputError if `dense` cannot be made.
    """
    dense = real_path(dense)
    check_place(dense, "choose another DENSE")
    check_free(dense, "choose another DENSE")
    source, _ = find_folder(str(model))
    if real_path(source) in dense.parents:
        raise OutputError(f"{dense}: lies inside {model}; choose another DENSE")
    config = read_json(source / "config.json")
    entry = config.pop("quantization_config", None) or {}
    headers = read_headers(source)
    tensors = planned_dense(headers, entry, source / "config.json")
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "bfloat16"
    with claimed(dense) as place:
        check_free(dense, "choose another DENSE")
        with unfinished(place) as partial:
            for path in (*copied_files(source)[0], Path("README.md")):
                if (source / path).is_file():
                    (partial / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / path, partial / path)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_dense(partial, tensors, lambda name: headers[name].read())
            with complete(place):
                move_into_place(place, overwrite=False)
    after = sum(tensor.bytes for tensor in tensors.values())
    made = sum(name not in headers or tensor.bytes != headers[name].bytes for name, tensor in tensors.items())
    return {"made": made, "before": sum(info.bytes for info in headers.values()), "after": after}


def planned_dense(headers: Headers, entry: Mapping[str, Any], where: Path) -> dict[str, DenseTensor]:
    """The dense copy's tensors by name. entry: the quantization_config. Raises SourceError if it is of another kind, or
    a tensor's scales are missing or of another shape."""
    method, block = entry.get("quant_method"), entry.get("weight_block_size")
    if method == "mxfp4":
        found = {name.removesuffix("_blocks"): mxfp4(name, headers) for name in headers if name.endswith("_blocks")}
        parts = {f"{name}{end}" for name in found for end in ("_blocks", "_scales")}
    elif method == "fp8" and block:
        names = [name.removesuffix("_scale_inv") for name in headers if name.endswith("_scale_inv")]
        found = {name: block_fp8(name, headers, tuple(block)) for name in names}
        parts = {f"{name}_scale_inv" for name in names} | set(names)
    else:
        said = f"quant_method {method}" if method else "no quantization_config"
        raise SourceError(f"{where}: {said}; only block fp8 (with weight_block_size) and mxfp4 are made dense here")
    for name, info in headers.items():
        if name not in parts:
            if info.dtype.startswith(("F8", "U8", "I8")):
                raise SourceError(f"{info.file}: {name} is of type {info.dtype}, and there are no scales for it")
            found[name] = DenseTensor(info.shape, info.bytes, lambda read, name=name: read(name))
    return dict(sorted(found.items()))


def block_fp8(name: str, headers: Headers, block: tuple[int, ...]) -> DenseTensor:
    """A matrix, or a stack of them, in fp8 with a scale for each block of it; those at the edges may be smaller."""
    info, scales = headers.get(name), headers[f"{name}_scale_inv"]
    rows, columns = block
    expected = info and (*info.shape[:-2], -(-info.shape[-2] // rows), -(-info.shape[-1] // columns))
    if info is None or scales.shape != expected:
        raise SourceError(f"{scales.file}: {scales.name}: shape {scales.shape}, expected {expected} for {name}")

    def make(read: Read) -> torch.Tensor:
        scale = read(f"{name}_scale_inv").float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        return (read(name).float() * scale[..., : info.shape[-2], : info.shape[-1]]).bfloat16()

    return DenseTensor(info.shape, 2 * info.numel, make)


def mxfp4(blocks: str, headers: Headers) -> DenseTensor:
    """gpt-oss' experts: (experts x outputs x groups x 16) bytes of two numbers each, and an exponent a group, as the
    bfloat16 model has them, (experts x inputs x outputs)."""
    info, name = headers[blocks], blocks.removesuffix("_blocks")
    scales = headers.get(f"{name}_scales")
    if scales is None or len(info.shape) != 4 or scales.shape != info.shape[:3]:
        raise SourceError(f"{info.file}: {blocks}: shape {info.shape}, and no {name}_scales that fit it")
    experts, outputs, groups, width = info.shape

    def make(read: Read) -> torch.Tensor:
        numbers, whole = torch.tensor(E2M1), torch.empty(experts, groups * width * 2, outputs, dtype=torch.bfloat16)
        for expert, (packed, exponents) in enumerate(zip(read(blocks), read(f"{name}_scales"), strict=True)):
            pairs = torch.stack((numbers[(packed & 15).int()], numbers[(packed >> 4).int()]), -1)
            scale = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
            whole[expert] = (pairs.flatten(-2) * scale[..., None]).flatten(-2).T
        return whole

    shape = experts, groups * width * 2, outputs
    return DenseTensor(shape, 4 * info.numel, make)


def write_dense(folder: Path, tensors: Mapping[str, DenseTensor], read: Read) -> None:
    """Shards of these tensors, and their index where there are several."""
    sizes = {name: {name: tensor.bytes} for name, tensor in tensors.items()}
    shards = divided(sizes, SHARD_BYTES)
    with bar("dequantize", len(tensors), "tensor") as shown:
        for file, names in shards.items():
            held = {}
            for name in names:
                held[name] = tensors[name].make(read).contiguous()
                shown.advance()
            save_file(held, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(usual_mode())
    if len(shards) > 1:
        write_index(folder, shards, sum(tensor.bytes for tensor in tensors.values()))


def read_json(path: Path) -> dict[str, Any]:
    """Raises SourceError if the file is not there or no JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SourceError(f"{path}: {reason(error)}") from None
