"""Real engines: the same greedy tokens as Hugging Face's forward, and broken checkpoints that do not start."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fermisvd.hf import load_model

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
TOKENS = 24


@pytest.fixture(scope="module")
def prompts(demo_text, demo_model):
    """64 prompts of 4 to 67 tokens of held-back modules."""
    from fermisvd_convert.source import load_tokenizer
    from fermisvd_convert.text import windows_of

    windows = windows_of(load_tokenizer(demo_model), str(demo_text["validation"]), 128, 64)
    return [window[: 4 + i].tolist() for i, window in enumerate(windows)]


@torch.no_grad()
def greedy(model, ids: list[int]) -> tuple[list[int], list[float]]:
    """Greedy continuation by Hugging Face's forward, and how far the best logit is ahead of the next at each step."""
    tokens, margins = list(ids), []
    for _ in range(TOKENS):
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        best = logits.topk(2)
        margins.append((best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
    return tokens[len(ids) :], margins


@pytest.fixture(scope="module")
def expected(compressed, prompts):
    result = {}
    for form, folder in compressed.items():
        model = load_model(folder)
        result[form] = [greedy(model, ids) for ids in prompts]
    return result


def generate(folder, prompts, environment, tmp_path, **engine):
    task = {
        "engine": {"model": str(folder), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 64, **engine},
        "prompts": prompts,
        "max_tokens": TOKENS,
        "out": str(tmp_path / "tokens.json"),
    }
    script = Path(__file__).with_name("generate.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(task),
        text=True,
        capture_output=True,
        env=environment,
        timeout=600,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return json.loads(Path(task["out"]).read_text())


def assert_same_tokens(served, expected):
    """Equal, but where the two best logits lie within float32 rounding of each other, from there on either is right."""
    ties = 0
    for ours, (reference, margins) in zip(served, expected, strict=True):
        if ours != reference:
            split = next(i for i in range(TOKENS) if ours[i] != reference[i])
            assert margins[split] < 1e-4, f"token {split}: {ours} against {reference}, margin {margins[split]}"
            ties += 1
    assert ties <= 1


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_greedy_tokens_equal_hugging_face(compressed, prompts, expected, vllm_environment, tmp_path, form, mode):
    served = generate(compressed[form], prompts, vllm_environment, tmp_path, enforce_eager=mode == "eager")
    assert_same_tokens(served, expected[form])


def test_strict_loader(compressed, prompts, expected, vllm_environment, tmp_path):
    served = generate(
        compressed["pivga"], prompts[:8], vllm_environment, tmp_path, enforce_eager=True, load_format="fermisvd"
    )
    assert_same_tokens(served, expected["pivga"][:8])


def test_dummy_weights_of_a_folder_without_weights(compressed, prompts, vllm_environment, tmp_path):
    folder = tmp_path / "shapes"
    shutil.copytree(compressed["pivga"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    served = generate(folder, prompts[:4], vllm_environment, tmp_path, enforce_eager=True, load_format="dummy")
    assert all(len(tokens) == TOKENS for tokens in served)


def spoil_missing(tensors):
    del tensors["model.layers.1.self_attn.k_proj.skeleton"]


def spoil_dense(tensors):
    del tensors["model.layers.2.input_layernorm.weight"]


def spoil_shape(tensors):
    name = "model.layers.0.mlp.down_proj.skeleton"
    tensors[name] = tensors[name][:-1].contiguous()


def spoil_permutation(tensors):
    permutation = tensors["model.layers.1.mlp.gate_proj.permutation"]
    permutation[0] = permutation[1]


def spoil_value(tensors):
    tensors["model.layers.3.self_attn.o_proj.interpolation"][0, 0] = float("nan")


FAULTS = {
    "missing": (spoil_missing, "model.layers.1.self_attn.k_proj.skeleton"),
    "missing dense": (spoil_dense, "model.layers.2.input_layernorm.weight"),
    "shape": (spoil_shape, "model.layers.0.mlp.down_proj.skeleton"),
    "permutation": (spoil_permutation, "model.layers.1.mlp.gate_proj.permutation"),
    "NaN": (spoil_value, "model.layers.3.self_attn.o_proj.interpolation"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_server_refuses_a_broken_checkpoint(compressed, vllm_environment, tmp_path, fault):
    """`vllm serve` with no flag ends by itself, with an error that names the tensor."""
    spoil, name = FAULTS[fault]
    folder = shutil.copytree(compressed["pivga"], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vllm = Path(sys.executable).with_name("vllm")
    result = subprocess.run(
        [
            str(vllm),
            "serve",
            str(folder),
            "--port",
            "0",
            "--enforce-eager",
            "--dtype",
            "float32",
            "--max-model-len",
            "256",
        ],
        capture_output=True,
        text=True,
        env=vllm_environment,
        timeout=300,
    )
    assert result.returncode != 0
    assert name in result.stdout + result.stderr, (result.stdout + result.stderr)[-4000:]
    assert "startup complete" not in result.stdout + result.stderr
