"""What vLLM does with any model, done with a compressed one: LoRA on top, weights reloaded, dtypes, load formats."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fermisvd.hf import load_model
from tests.support.families import dense_twin
from tests.support.reference import assert_agrees, greedy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 30), (700, 3), (1500, 57))]
LENGTH = 10
FORMS = ["pivga", "svd"]


def save_adapter(model, folder, rank=4, alpha: float = 8):
    """A random LoRA adapter in PEFT's files on all linear layers; merges it into `model`."""
    torch.manual_seed(1)
    tensors, kinds = {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in name:
            a, b = torch.randn(rank, layer.in_features) / 4, torch.randn(layer.out_features, rank) / 4
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            layer.weight.data += alpha / rank * b @ a
            kinds.add(name.rpartition(".")[2])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(kinds)}))
    return folder


def other_weights(folder, out):
    """The checkpoint again with other factors and permutations."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".permutation"):
            tensors[name] = tensor.flip(0).contiguous()
        elif not name.endswith(".weight"):
            tensors[name] = tensor + 0.05 * torch.randn_like(tensor)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def cases(family_checkpoints, run_engines, tmp_path_factory):
    """(what, form) -> (served, expected), all engines in one process."""
    folder = tmp_path_factory.mktemp("modes")
    tasks, expected = {}, {}
    for form in FORMS:
        source, compressed = family_checkpoints("llama", form)
        task = {"prompts": PROMPTS, "max_tokens": LENGTH}
        engine = {"model": str(compressed), "enforce_eager": True}

        model = dense_twin(source, compressed)
        expected["plain", form] = [greedy(model, ids, LENGTH) for ids in PROMPTS]
        adapter = save_adapter(model, folder / f"lora-{form}")
        expected["lora", form] = [greedy(model, ids, LENGTH) for ids in PROMPTS]
        tasks["lora", form] = task | {
            "engine": engine | {"enable_lora": True, "max_lora_rank": 8},
            "lora": str(adapter),
        }
        other = other_weights(compressed, folder / f"other-{form}")
        model = dense_twin(source, other)
        expected["reload", form] = [greedy(model, ids, LENGTH) for ids in PROMPTS]
        tasks["reload", form] = task | {"engine": engine, "reload": str(other)}
        if form == "pivga":
            tasks["reload compiled", form] = task | {"engine": {"model": str(compressed)}, "reload": str(other)}

        source, compressed = family_checkpoints("phi3", form)
        model = dense_twin(source, compressed)
        adapter = save_adapter(model, folder / f"lora-phi3-{form}")
        expected["lora fused on disk", form] = [greedy(model, ids, LENGTH) for ids in PROMPTS]
        engine = {"model": str(compressed), "enforce_eager": True, "enable_lora": True, "max_lora_rank": 8}
        tasks["lora fused on disk", form] = task | {"engine": engine, "lora": str(adapter)}
    return dict(zip(tasks, run_engines(list(tasks.values())), strict=True)), expected


def test_draft_of_its_own_parent(demo_model, compressed, run_engines):
    """Speculative decoding, parent dense and draft compressed: the parent's own greedy tokens, some of them drafted."""
    engine = {
        "model": str(demo_model),
        "enforce_eager": True,
        "disable_log_stats": False,
        "speculative_config": {"method": "draft_model", "model": str(compressed["pivga"]), "num_speculative_tokens": 3},
    }
    [served] = run_engines([{"engine": engine, "prompts": PROMPTS, "max_tokens": 24, "metrics": True}])
    parent = load_model(demo_model)
    assert_agrees(served, [greedy(parent, ids, 24) for ids in PROMPTS])
    drafts, accepted = (served["metrics"][f"vllm:spec_decode_num_{x}"] for x in ("drafts", "accepted_tokens"))
    assert accepted > drafts, "a draft at 30 % removed is right more often than once in three tokens"


@pytest.mark.parametrize("form", FORMS)
def test_lora_equals_merged_weights(form, cases):
    served, expected = cases
    assert_agrees(served["lora", form], expected["lora", form])


@pytest.mark.parametrize("form", FORMS)
def test_lora_on_layers_fused_on_disk(form, cases):
    served, expected = cases
    assert_agrees(served["lora fused on disk", form], expected["lora fused on disk", form])


def test_reloaded_weights_serve_compiled(cases):
    served, expected = cases
    assert_agrees(served["reload compiled", "pivga"], expected["plain", "pivga"])
    assert_agrees(served["reload compiled", "pivga"]["reloaded"], expected["reload", "pivga"])


@pytest.mark.parametrize("form", FORMS)
def test_reloaded_weights_serve(form, cases):
    served, expected = cases
    assert_agrees(served["reload", form], expected["plain", form])
    assert_agrees(served["reload", form]["reloaded"], expected["reload", form])
