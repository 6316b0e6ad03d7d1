"""A model in two parts. Reference: the whole model's logits."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from fermisvd import load_model
from fermisvd.running.halves import Split, Whole, few_tokens, halves_of
from tests.support.families import FAMILIES, save


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_body_is_the_model(family, tmp_path):
    """A few tokens at a time, whatever the family does to its logits (Gemma's soft cap) or before its blocks."""
    model = load_model(save(family, tmp_path / "model"))
    halves, ids = halves_of(model), torch.randint(100, (2, 12))
    assert isinstance(halves, Split)
    blocks = list(halves.container.children())
    with torch.no_grad():
        expected, states = model(input_ids=ids, use_cache=False).logits, halves.body(ids)
        assert states.shape[:2] == ids.shape and states.shape[2] < expected.shape[2]
        before = halves.through(ids, range(1))
        torch.testing.assert_close(halves.through(ids, range(1, len(blocks)), before), states, rtol=0, atol=0)
        for wanted, part in zip(few_tokens(expected, 5), few_tokens(states, 5), strict=True):
            torch.testing.assert_close(halves.head(part), wanted)
    assert list(halves.container.children()) == blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_narrow_model_are_not_rounded(tiny_llama, dtype):
    """Reference: products in float64 of the numbers as they are; rounded logits would be off by 2e-3. And what allows
    AMX to multiply is put back."""
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]: the module makes it
    before = settings.fp32_precision, torch.get_float32_matmul_precision()
    model = load_model(tiny_llama, dtype)
    halves, weight = halves_of(model), model.lm_head.weight.double()
    states = halves.body(torch.randint(2048, (2, 9))).detach().requires_grad_()
    logits = halves.head(states)
    normed = model.model.norm(states)
    expected = normed.double() @ weight.T
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    gradient = torch.randn_like(logits)
    (found,) = torch.autograd.grad(logits, states, gradient)
    (wanted,) = torch.autograd.grad(normed, states, (gradient.double() @ weight).to(normed.dtype))
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.dtype == dtype
    assert (settings.fp32_precision, torch.get_float32_matmul_precision()) == before


class Remembering(nn.Module):
    """A model whose head adds what it saw before the blocks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, use_cache=False):
        outputs = self.model(input_ids=input_ids, use_cache=use_cache)
        outputs.logits = outputs.logits + self.model.get_input_embeddings()(input_ids).sum(-1, keepdim=True)
        return outputs


def test_a_head_that_needs_more_is_left_whole(tiny_llama):
    model = Remembering(load_model(tiny_llama))
    halves, ids = halves_of(model), torch.randint(2048, (2, 9))
    assert isinstance(halves, Whole)
    with torch.no_grad():
        torch.testing.assert_close(halves.head(halves.body(ids)), model(ids).logits)


def test_a_model_of_several_states_a_token_is_left_whole():
    """Gemma 3n's: (4, windows, length, width)."""
    config = Gemma3nTextConfig(
        vocab_size=100,
        vocab_size_per_layer_input=100,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 2,
    )
    assert isinstance(halves_of(AutoModelForCausalLM.from_config(config).eval()), Whole)


@pytest.mark.parametrize("tokens, shapes", [(3, [3, 3, 2] * 5), (8, [8] * 5), (20, [16, 16, 8]), (100, [40])])
def test_few_tokens_are_views_that_cover_all(tokens, shapes):
    states = torch.zeros(5, 8, 2)
    parts = list(few_tokens(states, tokens))
    assert [part.shape[:2].numel() for part in parts] == shapes
    for number, part in enumerate(parts):
        part += number + 1
    assert states.all() and states.unique().numel() == len(parts)
