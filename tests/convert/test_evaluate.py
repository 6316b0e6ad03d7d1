import math
import shutil

import pytest
import torch
from torch.nn import functional

from fermisvd.errors import FermiSVDError, NumericalError
from fermisvd.hf import load_model
from fermisvd.running.blocks import HiddenStates
from fermisvd.running.streaming import stream_model
from fermisvd.teacher import teach
from fermisvd_convert.evaluate import evaluate, evaluate_by_blocks, evaluate_files
from fermisvd_convert.loading import SourceError
from tests.support.faults import edit_config, edit_tensors
from tests.support.folders import TWO_MODELS


def test_perplexity_is_the_mean_over_predicted_tokens(tiny_llama):
    """Reference: one window at a time, cross entropy of the shifted logits in float64."""
    model = load_model(tiny_llama)
    windows = torch.randint(2048, (5, 24))
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0].double()
            losses.append(functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
    result = evaluate(model, windows, batch_size=2)
    assert result.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
    assert result.tokens == 5 * 23
    assert result.kl is None and result.top1_agreement is None


def test_comparison_with_itself_and_with_a_perturbed_reference(tiny_llama):
    model, other = load_model(tiny_llama), load_model(tiny_llama)
    windows = torch.randint(2048, (5, 24))
    same = evaluate(model, windows, teach(model, windows, 2))
    assert same.kl == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
        p, q = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (other, model))
    result = evaluate(model, windows, teach(other, windows, 2), batch_size=2)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


@pytest.mark.parametrize("room", [0, 2**30])
def test_block_by_block_is_the_same(tiny_llama, tmp_path, room):
    windows = torch.randint(2048, (5, 24))
    expected = evaluate(load_model(tiny_llama), windows, batch_size=2)
    found = evaluate_by_blocks(stream_model(tiny_llama, "cpu"), windows, HiddenStates(tmp_path, room), batch_size=2)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6) and found.tokens == expected.tokens


def test_perplexity_beyond_all_numbers_is_infinite(tiny_llama):
    """Logits a million times as large: hundreds of thousands of nats a token, where math.exp ends at 709."""
    model = load_model(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    result = evaluate(model, torch.randint(2048, (2, 24)))
    assert result.perplexity == math.inf and result.tokens == 46


def test_missing_model_is_named():
    with pytest.raises(SourceError, match=r"\./nowhere"):
        evaluate_files("./nowhere", text="text", device="cpu")


BROKEN = {
    "a tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), r"no tensor model\.norm"),
    "more layers than stored": (lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=3)), "no tensor model"),
    "a classifier": (
        lambda f: edit_config(f, lambda c: c.update(architectures=["LlamaForSequenceClassification"])),
        "no causal language model",
    ),
    "NaN in a weight": (
        lambda f: edit_tensors(f, lambda t: t["model.norm.weight"].fill_(math.nan)),
        "holds NaN or infinite values",
    ),
    "two sets of weights": (TWO_MODELS["one file and shards of others"][0], "two sets of weights"),
}


@pytest.mark.parametrize("role", ["model", "reference"])
@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_conversion_refuses_is_not_evaluated(smallest_llama, tmp_path, kind, role):
    """transformers fills what is missing with random numbers, and a perplexity comes out."""
    spoil, message = BROKEN[kind]
    broken = shutil.copytree(smallest_llama, tmp_path / "model")
    spoil(broken)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 100)
    model, reference = (broken, None) if role == "model" else (smallest_llama, str(broken))
    with pytest.raises(FermiSVDError, match=message):
        evaluate_files(str(model), text=str(text), reference=reference, sequence_length=32, windows=4, device="cpu")


def test_logits_that_are_no_numbers_are_no_perplexity(tiny_llama):
    model = load_model(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="logits hold NaN"):
        evaluate(model, torch.randint(2048, (2, 24)))


@torch.no_grad()
def test_a_config_that_asks_for_tuples_is_evaluated_all_the_same(smallest_llama, tmp_path):
    folder = shutil.copytree(smallest_llama, tmp_path / "model")
    windows = torch.randint(2048, (2, 24))
    expected = evaluate(load_model(folder), windows).perplexity
    edit_config(folder, lambda config: config.update(return_dict=False))
    assert evaluate(load_model(folder), windows).perplexity == expected
    assert evaluate(stream_model(folder, "cpu"), windows).perplexity == pytest.approx(expected)
