"""Channels and heads dropped: against the whole model with the same ones set to zero, and counting."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.pruning import linear_parameters
from benchmarks.quality.width_pruning import Importance, importance, prune_width

A_CHANNEL = 4 * 3 * 32  # parameters, of all four blocks
A_KV_HEAD = 4 * (2 * 2 + 2) * 16 * 32  # two query heads' q and o, its own k and v


@torch.no_grad()
def test_importance_is_what_the_output_layers_read(llama, windows):
    """Reference: the inputs, kept and reduced by plain loops."""
    found, read = importance(llama, windows, 4), {}
    for number, block in enumerate(llama.model.layers):
        for name, layer in (("mlp", block.mlp.down_proj), ("heads", block.self_attn.o_proj)):
            layer.register_forward_pre_hook(lambda _, inputs, key=(name, number): read.update({key: inputs[0]}))
    llama(windows)
    for number, channel in ((0, 3), (3, 63)):
        sizes = [sum(abs(token[channel]) for token in window) / 12 for window in read["mlp", number]]
        expected = sum(size**2 for size in sizes) ** 0.5
        torch.testing.assert_close(found.channels[number, channel].float(), expected, rtol=1e-4, atol=1e-6)
    expected = 0.0
    for head in (2, 3):  # of the second kv head
        own = slice(16 * head, 16 * head + 16)
        sizes = [sum(token[own].norm() for token in window) / 12 for window in read["heads", 1]]
        expected += sum(size**2 for size in sizes) ** 0.5
    torch.testing.assert_close(found.heads[1, 1].float(), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_is_dropped_is_as_if_it_gave_zero(llama, windows, tmp_path):
    """Reference: the whole model whose down_proj and o_proj read nothing of the dropped channels and heads."""
    found = Importance(torch.rand(4, 64), torch.rand(4, 2))
    remove = (10 * A_CHANNEL + A_KV_HEAD) / linear_parameters(llama)
    pruned = prune_width(llama, found, remove, kv_heads=1)
    for number, block in enumerate(llama.model.layers):
        block.mlp.down_proj.weight[:, found.channels[number].argsort()[:10]] = 0
        dropped = found.heads[number].argmin().item()
        block.self_attn.o_proj.weight[:, 32 * dropped : 32 * dropped + 32] = 0
    torch.testing.assert_close(pruned(windows).logits, llama(windows).logits, rtol=1e-4, atol=1e-4)
    config = pruned.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (54, 2, 1)
    pruned.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(windows).logits, pruned(windows).logits)


@pytest.mark.parametrize("kv_heads", [0, 1])
@pytest.mark.parametrize("remove", [0.29, 0.4])
def test_the_fraction_is_met_to_a_channel(llama, remove, kv_heads):
    before = linear_parameters(llama)
    assert before == sum(p.numel() for name, p in llama.model.layers.named_parameters() if name.endswith("j.weight"))
    pruned = prune_width(llama, Importance(torch.rand(4, 64), torch.rand(4, 2)), remove, kv_heads)
    assert abs(before - linear_parameters(pruned) - remove * before) <= A_CHANNEL / 2
    assert pruned.config.num_key_value_heads == 2 - kv_heads


@pytest.mark.parametrize(("remove", "kv_heads"), [(0.9, 0), (0.1, 1), (0.5, 2)])
def test_what_cannot_be_is_refused(llama, remove, kv_heads):
    with pytest.raises(ValueError, match="removed cannot be"):
        prune_width(llama, Importance(torch.rand(4, 64), torch.rand(4, 2)), remove, kv_heads)
