"""A baseline of `real`: MLP channels, and whole groups of heads if asked, go by the size of their activations.

As Minitron does (arXiv 2407.14679): what an MLP channel or an attention head gives on calibration text says what it is
worth; sizes are averaged over the tokens of a window and taken together over windows as a root of squares. Every block
loses the same number, each its own least, so that what is left is an ordinary Llama of a smaller config. The width of
the hidden state, which Minitron may prune as well, stays.
"""

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.quality.pruning import linear_parameters, of_smaller_config
from fermisvd.settings import BATCH_SIZE


@dataclass(frozen=True)
class Importance:
    """channels: of each block's MLP channels, (blocks, channels); heads: of its groups of heads that share a key and a
    value, (blocks, kv heads), the sum of their query heads'."""

    channels: torch.Tensor
    heads: torch.Tensor


@torch.no_grad()
def importance(model: LlamaForCausalLM, windows: torch.Tensor, batch_size: int = BATCH_SIZE) -> Importance:
    """Of channels the absolute value that down_proj reads, of heads the norm of what o_proj reads of them. windows:
    token ids (windows, length)."""
    config = model.config
    channels = torch.zeros(config.num_hidden_layers, config.intermediate_size, dtype=torch.float64)
    heads = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64)

    def see_channels(number: int, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        channels[number] += inputs[0].abs().double().mean(1).square().sum(0).cpu()

    def see_heads(number: int, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norms = inputs[0].unflatten(-1, (config.num_attention_heads, -1)).double().norm(dim=-1)
        heads[number] += norms.mean(1).square().sum(0).cpu()

    hooks = []
    for number in range(config.num_hidden_layers):
        for name, see in (("mlp.down_proj", see_channels), ("self_attn.o_proj", see_heads)):
            layer = model.get_submodule(f"model.layers.{number}.{name}")
            hooks.append(layer.register_forward_pre_hook(partial(see, number)))
    for batch in windows.split(batch_size):
        model.model(input_ids=batch.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert config.num_key_value_heads  # LlamaConfig fills it in
    return Importance(channels.sqrt(), heads.sqrt().unflatten(1, (config.num_key_value_heads, -1)).sum(-1))


def prune_width(model: LlamaForCausalLM, found: Importance, remove: float, kv_heads: int = 0) -> LlamaForCausalLM:
    """A Llama without the fraction `remove` of the decoder blocks' linear parameters: so many kv heads of each block
    with their query heads, and as many MLP channels as make up the rest, to the nearest. Raises ValueError where that
    cannot be.
    """
    config, (blocks, channels) = model.config, found.channels.shape
    assert config.num_key_value_heads and config.head_dim  # LlamaConfig fills them in
    kept_heads = config.num_key_value_heads - kv_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    a_channel = blocks * 3 * config.hidden_size
    a_kv_head = blocks * 2 * (queries + 1) * config.head_dim * config.hidden_size
    fewer = round((remove * linear_parameters(model) - kv_heads * a_kv_head) / a_channel)
    if not (0 <= fewer < channels and kept_heads > 0):
        raise ValueError(f"{remove:.0%} removed cannot be {kv_heads} kv heads and {fewer} of {channels} MLP channels")
    mlp, groups = largest(found.channels, channels - fewer), largest(found.heads, kept_heads)
    keys, asked = (of_heads(groups, width) for width in (config.head_dim, queries * config.head_dim))
    rows = {"gate_proj": mlp, "up_proj": mlp, "q_proj": asked, "k_proj": keys, "v_proj": keys}
    columns = {"down_proj": mlp, "o_proj": asked}
    tensors = {}
    for name, tensor in model.state_dict().items():
        inside = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+_proj)\.(weight|bias)", name)
        if inside:
            number, layer, kind = int(inside[1]), inside[2], inside[3]
            if layer in rows:
                tensor = tensor[rows[layer][number].to(tensor.device)]
            elif kind == "weight":
                tensor = tensor[:, columns[layer][number].to(tensor.device)]
        tensors[name] = tensor
    return of_smaller_config(
        model,
        tensors,
        intermediate_size=channels - fewer,
        num_attention_heads=queries * kept_heads,
        num_key_value_heads=kept_heads,
    )


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of each row, ascending, (rows, count)."""
    return values.topk(count).indices.sort().values


def of_heads(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the channels of these heads, each `width` wide: (rows, heads) -> (rows, heads * width)."""
    return (heads[..., None] * width + torch.arange(width)).flatten(1)
