"""Wrappers that treat leaf modules apart: each must give the plain model's logits, or refuse."""

import copy
import json
import subprocess
import sys
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fermisvd.hf import load_model
from fermisvd.modules import CompressedLinear
from fermisvd_convert.convert import convert
from tests.support import ROOT

IDS = torch.arange(40).view(2, 20)
OUTSIDE = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
PARTS = ["input_layernorm", "post_attention_layernorm", "mlp"]
HEADS = [f"self_attn.{x}_proj" for x in "qkvo"]


@pytest.fixture(scope="module", params=["pivga", "svd"])
def compressed(request, tiny_llama, tmp_path_factory, demo_text):
    folder = tmp_path_factory.mktemp("wrapped") / request.param
    convert(
        str(tiny_llama),
        folder,
        0.3,
        form=request.param,
        groups="joint",
        ranks="uniform",
        heal_steps=0,
        refit=False,
        calibration=[str(demo_text["calibration"])],
        samples=8,
        sequence_length=32,
    )
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def placed(**places: str) -> dict[str, str]:
    """A device_map; `rest`: of whatever has no place of its own."""
    names = OUTSIDE + [f"model.layers.{i}.{part}" for i in range(2) for part in PARTS + HEADS]
    return {n: next((to for part, to in places.items() if part in n), places["rest"]) for n in names}


DEVICE_MAPS = {
    "all on cpu": placed(rest="cpu"),
    "blocks on disk": placed(layers="disk", rest="cpu"),
    "first members on disk": placed(q_proj="disk", rest="cpu"),
    "further members on disk": placed(k_proj="disk", v_proj="disk", rest="cpu"),
    "attention on disk": placed(self_attn="disk", rest="cpu"),
}


@pytest.mark.parametrize("where", DEVICE_MAPS)
def test_device_map(where, compressed, tmp_path):
    options = {"device_map": DEVICE_MAPS[where], "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32, **options).eval()
    offloaded = {n for n, m in model.named_modules() if any(p.is_meta for p in m.parameters(recurse=False))}
    assert any(isinstance(model.get_submodule(n), CompressedLinear) for n in offloaded) == (where != "all on cpu")
    torch.testing.assert_close(logits(model), logits(load_model(compressed)))


def test_cpu_offload(compressed):
    model = accelerate.cpu_offload(load_model(compressed), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(logits(model), logits(load_model(compressed)))


def test_copies(compressed, tmp_path):
    model = load_model(compressed)
    expected = logits(model)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(logits(copied), expected)
    copied.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(load_model(tmp_path)), expected)


def test_offloaded_model_is_saved(compressed, tmp_path):
    options = {"device_map": DEVICE_MAPS["blocks on disk"], "offload_folder": tmp_path / "off"}
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32, **options)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(tmp_path / "saved")), logits(load_model(compressed)))


def test_compiled(compressed):
    model = load_model(compressed)
    expected = logits(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


def test_functional_call(compressed):
    model = load_model(compressed)
    expected, state = logits(model), dict(model.named_parameters()) | dict(model.named_buffers())
    empty: Any = copy.deepcopy(model)
    empty = empty.to("meta")
    with torch.no_grad():
        found = torch.func.functional_call(empty, state, kwargs={"input_ids": IDS}).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.long
def test_divided_among_processes(compressed, tmp_path):
    result = tmp_path / "result.json"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run, "-m", "tests.support.wrapped_in_processes", compressed, result]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    trained = ["FSDP2, each layer", "FSDP2, each layer and the model", "FSDP2, each block", "transformers, fsdp_size"]
    for name in (*trained, "FSDP1, each block", "transformers, pp_size"):
        assert not isinstance(found[name], str) and found[name]["logits"] < 1e-5, (name, found[name])
    for name in trained:
        assert found[name]["gradients"] < 1e-5, (name, found[name])
    for name in ("transformers, tp_size", "transformers, tp_plan"):
        assert "OptionError: tp_plan, tp_size: transformers' tensor parallelism" in found[name]
    for name in ("FSDP1, each layer", "FSDP1, each layer, original parameters"):  # no hooks: it takes the layer's place
        assert found[name].startswith("RuntimeError"), (name, found[name])
