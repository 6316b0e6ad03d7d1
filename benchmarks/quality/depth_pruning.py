"""A baseline of `real`: whole decoder blocks are dropped, first those that change the hidden state least.

Block influence is ShortGPT's (arXiv 2403.03853): 1 - mean over tokens of the cosine between a block's input and its
output. It is measured once, in the whole model.
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from benchmarks.quality.pruning import of_smaller_config
from fermisvd.running.blocks import hidden_of
from fermisvd.settings import BATCH_SIZE


@torch.no_grad()
def block_influence(model: LlamaForCausalLM, windows: torch.Tensor, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Of each decoder block, (blocks,) in float64. windows: token ids (windows, length)."""
    blocks = model.model.layers
    total = torch.zeros(len(blocks), dtype=torch.float64)

    def see(number: int, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        cosine = functional.cosine_similarity(inputs[0].double(), hidden_of(output).double(), dim=-1)
        total[number] += (1 - cosine).sum().cpu()

    hooks = [block.register_forward_hook(partial(see, number)) for number, block in enumerate(blocks)]
    for batch in windows.split(batch_size):
        model.model(input_ids=batch.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return total / windows.numel()


def least_influential(influence: torch.Tensor, remove: float) -> list[int]:
    """Numbers of the blocks to drop: blocks are alike, so that their linear parameters are the fraction `remove` of all
    to the nearest block."""
    return sorted(influence.argsort()[: round(remove * len(influence))].tolist())


def without_blocks(model: LlamaForCausalLM, dropped: Collection[int]) -> LlamaForCausalLM:
    """A Llama of the other blocks, in their order."""
    kept = [number for number in range(len(model.model.layers)) if number not in dropped]
    tensors = {}
    for name, tensor in model.state_dict().items():
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if inside is None:
            tensors[name] = tensor
        elif (number := int(inside[1])) in kept:
            tensors[f"model.layers.{kept.index(number)}.{inside[2]}"] = tensor
    return of_smaller_config(model, tensors, num_hidden_layers=len(kept))
