"""Qwen3.5 in real engines, whose gated delta rule vLLM's CPU kernels have in bfloat16 only.

So it is as near to the dense product in float32 as bfloat16 gets: log-probabilities of the prompts within 0.02 to 0.03
on average, compressed or dense. Rows of q, k, v or z in another's place put them off by 2.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fermisvd.hf import load_model
from tests.support.families import dense_twin
from tests.support.multimodal import MULTIMODAL
from tests.vllm_plugin.test_families import FORMS, PROMPTS

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@torch.no_grad()
def gap(model, results: dict) -> float:
    """Mean distance of the prompts' log-probabilities."""
    assert "error" not in results, results["error"]
    distances = []
    for ids, served in zip(PROMPTS, results["prompt_logprobs"], strict=False):  # an image's may follow
        ours = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0, :-1]
        own = ours[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        distances.append((own - torch.tensor(served)).abs())
    return torch.cat(distances).mean().item()


def task(model: Path, processes: int = 1) -> dict:
    engine = {"model": str(model), "dtype": "bfloat16", "enforce_eager": True, "tensor_parallel_size": processes}
    return {"engine": engine, "prompts": PROMPTS, "max_tokens": 4, "sampling": {"prompt_logprobs": 0}}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_qwen3_5_in_bfloat16(processes, family_checkpoints, run_engines, torchvision):
    folders = [family_checkpoints("qwen3_5", form) for form in FORMS]
    models = folders[0][0], *(out for _, out in folders)
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if processes > 1 else {}
    dense, *compressed = run_engines([task(model, processes) for model in models], **torchvision, **binding)
    source = AutoModelForCausalLM.from_pretrained(folders[0][0], dtype=torch.float32, attn_implementation="eager")
    assert gap(source.eval(), dense) < 0.1
    for pair, results in zip(folders, compressed, strict=True):
        assert gap(dense_twin(*pair), results) < 0.1


def test_the_wrapper_with_text_and_image(multimodal_checkpoints, run_engines, torchvision):
    twin, out = multimodal_checkpoints("qwen3_5_mm", "pivga")
    images = {"images": [{"text": f"def f(x):{MULTIMODAL['qwen3_5_mm'].placeholder} return", "size": [40, 56]}]}
    dense, ours = run_engines([task(folder) | images for folder in (twin, out)], **torchvision)
    model = load_model(twin, attn_implementation="eager")
    gaps = gap(model, dense), gap(model, ours)
    assert max(gaps) < 0.1, gaps
    of_image = [torch.tensor(results["prompt_logprobs"][len(PROMPTS)]) for results in (dense, ours)]
    assert len(of_image[0]) > 5 and (of_image[0] - of_image[1]).abs().mean() < 0.1
