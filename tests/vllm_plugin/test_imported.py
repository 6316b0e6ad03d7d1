"""A checkpoint in SVD-LLM's layout, imported and served in both forms. Reference: the dense model whose weights are the
factors' products, by Hugging Face."""

import pytest
import torch

from fermisvd_convert.importing import import_checkpoint
from tests.convert.test_importing import factorised, svd_llm, write  # noqa: F401  a fixture
from tests.support.reference import assert_agrees, greedy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 30), (700, 3), (1500, 57))]
LENGTH = 10


def test_served(tiny_llama, factorised, tmp_path, run_engines):  # noqa: F811
    from transformers import AutoModelForCausalLM

    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised))
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, (a, b) in factorised[0].items():
        dense.get_submodule(name).weight.data = (a.double() @ b.double()).float()
    expected, tasks = [greedy(dense, ids, LENGTH) for ids in PROMPTS], []
    for form in ("svd", "pivga"):
        import_checkpoint(source, tmp_path / form, form=form)
        engine = {"model": str(tmp_path / form), "enforce_eager": True, "max_model_len": 128}
        tasks.append({"engine": engine, "prompts": PROMPTS, "max_tokens": LENGTH})
    for served in run_engines(tasks):
        assert_agrees(served, expected)
