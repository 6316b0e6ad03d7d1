"""Whole blocks dropped: against a forward pass by hand, and transformers' own hidden states."""

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from benchmarks.quality.depth_pruning import block_influence, least_influential, without_blocks
from benchmarks.quality.pruning import linear_parameters


@torch.no_grad()
def test_influence_is_that_of_the_hidden_states_that_transformers_gives(llama, windows):
    states = []
    for block in llama.model.layers:
        block.register_forward_hook(lambda _, inputs, output: states.append((inputs[0], output)))
    llama(windows)
    expected = [1 - cosine_similarity(before, after, dim=-1).mean().item() for before, after in states]
    torch.testing.assert_close(
        block_influence(llama, windows, 4), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


def test_least_influential_to_the_nearest_block():
    influence = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.4])
    assert [least_influential(influence, remove) for remove in (0.05, 0.2, 0.5, 0.55)] == [[], [1], [1, 3], [1, 2, 3]]


@torch.no_grad()
def test_a_dropped_block_is_skipped(llama, windows, tmp_path):
    """Reference: the blocks of the whole model called one after the other; it is loaded again as any Llama."""
    pruned = without_blocks(llama, [0, 2])
    x, positions = llama.model.embed_tokens(windows), torch.arange(windows.shape[1])[None]
    mask = torch.full((windows.shape[1],) * 2, float("-inf")).triu(1)[None, None].expand(len(windows), 1, -1, -1)
    angles = llama.model.rotary_emb(x, positions)
    for number in (1, 3):
        x = llama.model.layers[number](x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    expected = llama.lm_head(llama.model.norm(x))
    torch.testing.assert_close(pruned(windows).logits, expected, rtol=1e-4, atol=1e-4)
    assert linear_parameters(pruned) == linear_parameters(llama) // 2
    pruned.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(windows).logits, pruned(windows).logits)
    for tensor in pruned.state_dict().values():
        tensor.zero_()
    assert all(tensor.any() for tensor in llama.state_dict().values())  # nothing is shared
