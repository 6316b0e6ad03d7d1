"""LoRA trained by peft on a compressed model, served by vLLM beside it: Hugging Face's answers with that adapter."""

from pydoc_data.topics import topics

import pytest
import torch

from fermisvd.hf import load_model
from fermisvd_convert.loading import load_tokenizer
from tests.support.reference import assert_agrees, greedy

pytest.importorskip("vllm")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.vllm
FORMS = ["pivga", "svd"]
LENGTH = 10


@pytest.fixture(scope="module")
def windows(demo_model) -> torch.Tensor:
    """(360, 64) of the help on Python in English, which the demo model never read, in random order."""
    ids = load_tokenizer(demo_model)("\n\n".join(topics.values()), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:360]]


@torch.no_grad()
def loss_of(model, windows: torch.Tensor) -> float:
    return model.eval()(input_ids=windows, labels=windows).loss.item()


@pytest.fixture(scope="module")
def trained(compressed, windows, tmp_path_factory):
    """form -> an adapter that 20 steps gave the demo model with 30 % removed, and the loss before and after on windows
    that were not trained on."""
    found = {}
    for form in FORMS:
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(load_model(compressed[form]), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        before = loss_of(model, windows[320:])
        for batch in windows[:320].split(16):
            model.train()(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path_factory.mktemp("peft") / form
        model.save_pretrained(folder)
        found[form] = folder, before, loss_of(model, windows[320:])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_loss_falls(trained, form):
    _, before, after = trained[form]
    assert after < 0.95 * before


def test_served_as_hugging_face_answers(trained, compressed, windows, run_engines):
    """pivga as `vllm serve` has it, compiled; svd eager."""
    prompts = [window[: 8 + 11 * i].tolist() for i, window in enumerate(windows[320:324])]
    tasks, expected = [], []
    for form in FORMS:
        folder = trained[form][0]
        engine = {"model": str(compressed[form]), "enable_lora": True, "enforce_eager": form == "svd"}
        tasks.append({"engine": engine, "lora": str(folder), "prompts": prompts, "max_tokens": LENGTH})
        model = peft.PeftModel.from_pretrained(load_model(compressed[form]), folder).eval()
        expected.append([greedy(model, ids, LENGTH) for ids in prompts])
        with model.disable_adapter():
            assert [greedy(model, ids, LENGTH)["tokens"] for ids in prompts] != [e["tokens"] for e in expected[-1]]
    for served, reference in zip(run_engines(tasks), expected, strict=True):
        assert_agrees(served, reference)
