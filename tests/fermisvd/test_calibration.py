import pytest
import torch
from transformers import AutoModelForCausalLM

from fermisvd.calibration import CalibrationError, gram_matrices


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_gram_matrix_is_the_sum_over_all_tokens(model):
    """Reference: the inputs themselves, recorded and multiplied in float64."""
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, -2).double()))
    windows = torch.randint(2048, (6, 16))
    with torch.no_grad():
        model(input_ids=windows)
    hook.remove()
    x = torch.cat(inputs)
    assert len(x) == 6 * 16
    gram = gram_matrices(model, [name], windows.split(2))[name]
    torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4)
    assert gram.dtype == torch.float64


def test_batching_does_not_matter(model):
    windows = torch.randint(2048, (6, 16))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    one = gram_matrices(model, names, windows.split(1))
    six = gram_matrices(model, names, windows.split(6))
    for name in names:
        torch.testing.assert_close(one[name], six[name], rtol=1e-4, atol=1e-3)


def test_hooks_are_gone_afterwards(model):
    gram_matrices(model, ["model.layers.0.self_attn.q_proj"], [torch.randint(2048, (1, 8))])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_infinite_activations_name_the_layer(model):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj"):
        gram_matrices(model, ["model.layers.1.self_attn.q_proj"], [torch.randint(2048, (1, 8))])
