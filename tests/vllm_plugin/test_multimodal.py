"""Wrappers in real engines, with text and with an image, against the dense product of the factors.

Text: Hugging Face's forward. Image: vLLM itself with the dense product in its layers, since what an image is made into
is its own. vLLM imports torchvision for these models: Makefile, tests/support/for_torchvision.
"""

from functools import cache

import pytest

from fermisvd.hf import load_model
from tests.support.multimodal import MULTIMODAL
from tests.support.reference import assert_agrees, greedy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 30), (1500, 57))]
LENGTH = 10
QUICK = {"gemma3_mm": "pivga", "qwen2_5_vl": "svd", "llama4": "pivga"}  # and all others in `make families`
TEXT_ONLY = {"llama4"}  # vLLM's vision tower dies on a CPU, of the dense model as well
UNTRIED = {"gemma4"}
IN_BFLOAT16 = {"qwen3_5_mm"}  # test_gated_delta.py
TENSOR_PARALLEL = {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def served(multimodal_checkpoints, torchvision, run_engines):
    """(cases, tensor parallel) -> {case: (result of the dense product, of the compressed)}, in one process."""

    @cache
    def run(cases: tuple[tuple[str, str], ...], parallel: bool = False) -> dict:
        tasks = []
        for family, form in cases:
            image = {"text": f"def f(x):{MULTIMODAL[family].placeholder} return", "size": [40, 56]}
            for folder in multimodal_checkpoints(family, form):
                engine = {"model": str(folder), "enforce_eager": True, **(TENSOR_PARALLEL if parallel else {})}
                images = [] if family in TEXT_ONLY else [image]
                tasks.append({"engine": engine, "prompts": PROMPTS, "images": images, "max_tokens": LENGTH})
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if parallel else {}
        results = iter(run_engines(tasks, **torchvision, **binding))
        return {case: (next(results), next(results)) for case in cases}

    return run


def check(family: str, form: str, results: tuple[dict, dict], checkpoints) -> None:
    dense, ours = results
    assert "error" not in dense, dense["error"]
    model = load_model(checkpoints(family, form)[0], attn_implementation="eager")
    assert_agrees(ours, [greedy(model, ids, LENGTH) for ids in PROMPTS])  # which come before the image
    assert len(ours["tokens"]) == len(PROMPTS) + (family not in TEXT_ONLY)
    assert ours["tokens"] == dense["tokens"]
    for own, other in zip(ours["logprobs"], dense["logprobs"], strict=True):
        assert own == pytest.approx(other, abs=2e-3)


@pytest.mark.parametrize(("family", "form"), QUICK.items())
def test_served_with_text_and_image(family, form, served, multimodal_checkpoints):
    check(family, form, served(tuple(QUICK.items()))[family, form], multimodal_checkpoints)


SERVED = [family for family in MULTIMODAL if family not in IN_BFLOAT16 | UNTRIED]
REST = tuple((family, form) for family in SERVED for form in ("pivga", "svd") if QUICK.get(family) != form)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), REST)
def test_all(family, form, served, multimodal_checkpoints):
    check(family, form, served(REST)[family, form], multimodal_checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), QUICK.items())
def test_tensor_parallel_2(family, form, served, multimodal_checkpoints):
    check(family, form, served(tuple(QUICK.items()), parallel=True)[family, form], multimodal_checkpoints)
