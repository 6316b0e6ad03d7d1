"""Qwen3.5 in real engines, whose gated delta rule vLLM's CPU kernels have in bfloat16 only.

So it is as near to the dense product in float32 as bfloat16 gets: log-probabilities of the prompts within 0.02 to 0.03
on average, compressed or dense. Rows of q, k, v or z in another's place put them off by 2.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.families import dense_twin
from tests.vllm_plugin.test_families import FORMS, PROMPTS

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@torch.no_grad()
def gap(model, results: dict) -> float:
    """Mean distance of the prompts' log-probabilities."""
    assert "error" not in results, results["error"]
    distances = []
    for ids, served in zip(PROMPTS, results["prompt_logprobs"], strict=True):
        ours = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0, :-1]
        own = ours[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        distances.append((own - torch.tensor(served)).abs())
    return torch.cat(distances).mean().item()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_qwen3_5_in_bfloat16(processes, family_checkpoints, run_engines, torchvision):
    folders = [family_checkpoints("qwen3_5", form) for form in FORMS]
    engine = {"dtype": "bfloat16", "enforce_eager": True, "tensor_parallel_size": processes}
    tasks = [
        {
            "engine": engine | {"model": str(model)},
            "prompts": PROMPTS,
            "max_tokens": 4,
            "sampling": {"prompt_logprobs": 0},
        }
        for model in (folders[0][0], *(out for _, out in folders))
    ]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if processes > 1 else {}
    dense, *compressed = run_engines(tasks, **torchvision, **binding)
    source = AutoModelForCausalLM.from_pretrained(folders[0][0], dtype=torch.float32, attn_implementation="eager")
    assert gap(source.eval(), dense) < 0.1
    for pair, results in zip(folders, compressed, strict=True):
        assert gap(dense_twin(*pair), results) < 0.1
