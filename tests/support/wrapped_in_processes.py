"""One of torchrun's processes: a compressed model wrapped, its logits against the plain model's.

torchrun --nproc-per-node 2 -m tests.support.wrapped_in_processes MODEL RESULT; the first process writes what came out.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from fermisvd.hf import load_model
from fermisvd.modules import CompressedLinear
from fermisvd.running import distributed

FACTORS = ("lowrank_a", "lowrank_b", "skeleton", "interpolation")
IDS = torch.arange(40).view(2, 20)


def by_layer(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, CompressedLinear):
            fully_shard(layer)
            assert all(isinstance(p, DTensor) for p in layer.parameters())
    return model


def by_layer_and_whole(model: nn.Module) -> nn.Module:
    fully_shard(by_layer(model))
    return model


def by_block(model: nn.Module) -> nn.Module:
    for block in model.get_submodule("model.layers").children():
        fully_shard(block)
    fully_shard(model)
    return model


def old_fsdp(model: nn.Module, classes: set, **options) -> nn.Module:
    policy = ModuleWrapPolicy(classes)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def divided(folder: Path, **how) -> nn.Module:
    options = {"dtype": torch.float32, "distributed_config": DistributedConfig(**how)}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def passed(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the factors' gradients by tensor name; of a model whose parameters have those names."""
    factors = {n: p for n, p in model.named_parameters() if n.endswith(FACTORS)}
    for parameter in factors.values():
        parameter.requires_grad_()
    logits = model(input_ids=IDS).logits
    if logits.requires_grad:  # a pipeline's stages do not hand gradients on
        logits.square().mean().backward()
    gradients = {n: p.grad for n, p in factors.items() if p.grad is not None}
    return logits.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def main(folder: Path, result: Path) -> None:
    with distributed.process_group("cpu"):
        plain = load_model(folder)
        block = type(plain.get_submodule("model.layers.0"))
        layers = {type(m) for m in plain.modules() if isinstance(m, CompressedLinear)}
        wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {
            "FSDP2, each layer": by_layer,
            "FSDP2, each layer and the model": by_layer_and_whole,
            "FSDP2, each block": by_block,
            "FSDP1, each block": partial(old_fsdp, classes={block}),
            "FSDP1, each layer": partial(old_fsdp, classes=layers),
            "FSDP1, each layer, original parameters": partial(old_fsdp, classes=layers, use_orig_params=True),
            "transformers, fsdp_size": lambda _: divided(folder, fsdp_size=2),
            "transformers, pp_size": lambda _: divided(folder, pp_size=2),
            "transformers, tp_size": lambda _: divided(folder, tp_size=2),
            "transformers, tp_plan": lambda _: divided(folder, tp_plan="auto"),
        }
        found = {}
        expected, gradients = passed(plain)
        for name, wrap in wrappers.items():
            try:
                logits, other = passed(wrap(load_model(folder)))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                continue
            gaps = [(value - gradients[of]).norm() / gradients[of].norm() for of, value in other.items()]
            found[name] = {
                "logits": (logits - expected).abs().max().item(),
                "gradients": max(gaps).item() if gaps else None,
            }
        if distributed.this_process() == 0:
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
