"""Checkpoints of a shape and no weights: config.json and a tokenizer, to be served with --load-format dummy.

Dense, svd and pivga of one shape share their ranks: uniform ones that remove the given fraction in svd form, one group
for each fused layer. So svd is smaller than dense by that fraction, and pivga smaller still. In few bits dense is what
vLLM itself serves: a checkpoint of compressed-tensors on the same grid.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

from transformers import LlamaConfig

from fermisvd.budget import Budget, Form, RankedGroup
from fermisvd.format import checkpoint_config
from fermisvd.groups import LinearGroup, Side
from fermisvd.schemes import Weights, scheme_for
from fermisvd.storage import config_group
from tests.support import DEMO_MODEL

FORMS = ("dense", "svd", "pivga")
SHAPES = {
    # half of Llama-3.2-1B's blocks, its widths: weights dominate on a CPU
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 10240,  # `vllm bench latency` asks with tokens up to 10,000
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def groups_of(shape: dict) -> list[LinearGroup]:
    """The four groups of each decoder block, named as the Llama checkpoint names its layers."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    head = hidden // shape["num_attention_heads"]
    kv = head * shape["num_key_value_heads"]
    groups = []
    for layer in range(shape["num_hidden_layers"]):
        attention, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
        found: list[tuple[list[str], tuple[int, ...], int, Side]] = [
            ([f"{attention}.{n}_proj" for n in "qkv"], (hidden, kv, kv), hidden, "columns"),
            ([f"{attention}.o_proj"], (hidden,), hidden, "rows"),
            ([f"{mlp}.{n}_proj" for n in ("gate", "up")], (wide, wide), hidden, "columns"),
            ([f"{mlp}.down_proj"], (hidden,), wide, "rows"),
        ]
        for members, rows, columns, side in found:
            groups.append(LinearGroup(tuple(members), tuple(rows), columns, side, members[0]))
    return groups


def ranks_of(groups: list[LinearGroup], remove: float, align: int | None = None) -> list[int]:
    """Uniform ranks that remove the fraction in svd form, aligned (None: as the converter does)."""
    budget = Budget.removing(remove, "svd", align)
    return budget.ranks(groups, budget.uniform_ranks(groups))


def write_folder(
    folder: Path, name: str, form: Form | Literal["dense"], remove: float, weights: Weights = "auto"
) -> dict[str, int]:
    """A folder that vLLM takes for the checkpoint of that shape and form. Returns the parameters that every token is
    multiplied by: `layers`, the decoder blocks' linear layers, and `head`."""
    shape, groups = SHAPES[name], groups_of(SHAPES[name])
    folder.mkdir(parents=True)
    sizes: dict[str, Any] = dict(shape)
    config = LlamaConfig(**sizes, max_position_embeddings=8192, dtype="bfloat16", tie_word_embeddings=False).to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    layers = sum(group.dense_parameters for group in groups)
    if form != "dense":
        ranked = [RankedGroup(g, r, form, weights) for g, r in zip(groups, ranks_of(groups, remove), strict=True)]
        checkpoint = checkpoint_config([config_group(each) for each in ranked], {})
        config["quantization_config"] = checkpoint.model_dump(mode="json", exclude_none=True)
        layers = sum(each.parameters for each in ranked)
    elif grid := scheme_for(weights, math.gcd(shape["hidden_size"], shape["intermediate_size"])):
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": grid.format,
            "config_groups": {"group_0": grid.described()},
            "ignore": ["lm_head"],
        }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO_MODEL / file, folder)
    return {"layers": layers, "head": shape["vocab_size"] * shape["hidden_size"]}
