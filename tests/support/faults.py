"""Ways in which a checkpoint can be broken. Each takes its folder, breaks it, and is refused with a message that names
the file or tensor and the remedy. `FAULTS`: name -> (function, words that the message must hold).
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = "model.layers.1"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_groups(folder: Path, change: Callable[[list[dict]], object]) -> None:
    edit_config(folder, lambda config: change(config["quantization_config"]["groups"]))


def split_in_two(folder: Path) -> dict[str, str]:
    """One file becomes two shards and an index; returns its weight_map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def truncated_shard(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def missing_shard(folder):
    split_in_two(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_names_another_shard(folder):
    weight_map = split_in_two(folder)
    weight_map["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def missing_factor(folder):
    edit_tensors(folder, lambda t: t.pop(f"{BLOCK}.self_attn.k_proj.skeleton"))


def missing_norm(folder):
    edit_tensors(folder, lambda t: t.pop(f"{BLOCK}.input_layernorm.weight"))


def _replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: change(t[name])}))


def _repeat_first(permutation: torch.Tensor) -> torch.Tensor:
    return torch.cat([permutation[1:2], permutation[1:]])


def _beyond(permutation: torch.Tensor) -> torch.Tensor:
    return torch.cat([permutation[:-1], torch.tensor([1_000_000], dtype=torch.int32)])


def _spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def member_of_no_layer(folder):
    """The group and its tensors agree, but the model has no such layer."""

    def rename(tensors):
        for name in [n for n in tensors if n.startswith(f"{BLOCK}.mlp.down_proj.")]:
            tensors[name.replace("layers.1", "layers.9")] = tensors.pop(name)

    edit_tensors(folder, rename)
    name = f"{BLOCK}.mlp.down_proj"
    edit_groups(
        folder, lambda g: [x.update(members=["model.layers.9.mlp.down_proj"]) for x in g if name in x["members"]]
    )


def another_architecture(folder):
    opt = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 136, "word_embed_proj_dim": 96}
    edit_config(folder, lambda c: c.update(opt))


def another_width(folder):
    edit_config(folder, lambda c: c.update(intermediate_size=144))


CONVERT = "convert again"
COPY = "copy"
K, DOWN, GATE, OUT = (
    f"{BLOCK}.{x}" for x in ("self_attn.k_proj", "mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj")
)
FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated shard": (truncated_shard, (WEIGHTS, "truncated", COPY)),
    "missing shard": (missing_shard, ("model-00002-of-00002.safetensors", "missing shard", COPY)),
    "index disagrees": (index_names_another_shard, (INDEX, "model.norm.weight", COPY)),
    "missing factor": (missing_factor, (f"{K}.skeleton", "missing", CONVERT)),
    "missing dense tensor": (missing_norm, (f"{BLOCK}.input_layernorm.weight", "missing", CONVERT)),
    "factor of another shape": (_replace(f"{DOWN}.skeleton", lambda t: t[:-1]), (WEIGHTS, f"{DOWN}.skeleton", CONVERT)),
    "factor of another type": (
        _replace(f"{DOWN}.skeleton", lambda t: t.to(torch.int8)),
        (f"{DOWN}.skeleton", "I8", CONVERT),
    ),
    "permutation of another type": (
        _replace(f"{GATE}.permutation", lambda t: t.long()),
        (f"{GATE}.permutation", "I64", CONVERT),
    ),
    "index repeated": (_replace(f"{GATE}.permutation", _repeat_first), (f"{GATE}.permutation", "repeated", CONVERT)),
    "index out of range": (_replace(f"{GATE}.permutation", _beyond), (f"{GATE}.permutation", "out of range", CONVERT)),
    "NaN in a factor": (
        _replace(f"{OUT}.interpolation", _spoil(float("nan"))),
        (f"{OUT}.interpolation", "NaN", CONVERT),
    ),
    "infinity in a factor": (_replace(f"{K}.skeleton", _spoil(float("inf"))), (f"{K}.skeleton", "infinite", CONVERT)),
    "NaN in a dense tensor": (
        _replace("model.embed_tokens.weight", _spoil(float("nan"))),
        ("model.embed_tokens.weight", "NaN", COPY),
    ),
    "pickled file": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), ("pytorch_model.bin", "remove")),
    "unknown format version": (
        lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(format_version=3)),
        ("format_version", "3", "install"),
    ),
    "rank above the matrix": (
        lambda folder: edit_groups(folder, lambda g: g[0].update(rank=4096)),
        ("rank 4096", CONVERT),
    ),
    "group of no layer": (member_of_no_layer, ("config.json", "model.layers.9.mlp.down_proj", CONVERT)),
    "overlapping groups": (
        lambda folder: edit_groups(folder, lambda g: g.append(g[1])),
        ("config.json", "o_proj", "two groups", CONVERT),
    ),
    "another architecture": (another_architecture, ("config.json", "OPTForCausalLM", CONVERT)),
    "another width": (another_width, (WEIGHTS, "mlp", "144", CONVERT)),
}

SVD_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing shared factor": (
        lambda folder: edit_tensors(folder, lambda t: t.pop(f"{OUT}.lowrank_b")),
        (f"{OUT}.lowrank_b", "missing", CONVERT),
    ),
    "missing member's factor": (
        lambda folder: edit_tensors(folder, lambda t: t.pop(f"{K}.lowrank_a")),
        (f"{K}.lowrank_a", "missing", CONVERT),
    ),
    "factor transposed": (_replace(f"{DOWN}.lowrank_b", lambda t: t.T), (f"{DOWN}.lowrank_", "shape", CONVERT)),
    "dense weight beside the factors": (
        lambda folder: edit_tensors(folder, lambda t: t.update({f"{K}.weight": torch.zeros(64, 96)})),
        (f"{K}.weight", "replaces it", CONVERT),
    ),
}
