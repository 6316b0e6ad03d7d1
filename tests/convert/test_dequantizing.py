"""`fermisvd dequantize`. References: transformers' own loading of such checkpoints, and loops over blocks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config
from typer.testing import CliRunner

from fermisvd.errors import FermiSVDError
from fermisvd_convert.cli import app
from fermisvd_convert.dequantizing import dequantize_checkpoint
from fermisvd_convert.source import open_source
from tests.support import families

BLOCK = 32


def in_fp8(weight):
    """fp8 numbers and a scale for each block: what is stored."""
    rows, columns = weight.shape
    numbers = torch.zeros_like(weight)
    scales = torch.zeros(-(-rows // BLOCK), -(-columns // BLOCK))
    for i, j in ((i, j) for i in range(len(scales)) for j in range(scales.shape[1])):
        place = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1))
        scales[i, j] = weight[place].abs().max() / 448
        numbers[place] = weight[place] / scales[i, j]
    return numbers.to(torch.float8_e4m3fn), scales


def rewrite(folder, tensors, entry):
    """The model in these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": entry, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def in_block_fp8(tmp_path):
    """DeepSeek's form; its kv_a_proj_with_mqa has rows that the block does not divide, as in DeepSeek-V3."""
    folder = families.save("deepseek_v3", tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = in_fp8(tensors[name])
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    rewrite(folder, tensors, entry)
    return folder


@pytest.fixture
def in_mxfp4(tmp_path):
    """gpt-oss' form."""
    folder = families.save("gpt_oss", tmp_path / "mxfp4")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 128, (experts, outputs, inputs // 32), dtype=torch.uint8)
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return folder


def check_dense_and_convertible(dense, quantised):
    source = open_source(str(dense))
    assert not source.left_out and "quantization_config" not in source.config
    assert (dense / "tokenizer.json").read_bytes() == (quantised / "tokenizer.json").read_bytes()
    source.check_values()


def test_block_fp8_equals_the_blocks_times_their_scales(in_block_fp8, tmp_path):
    stored = load_file(in_block_fp8 / "model.safetensors")
    dense = tmp_path / "dense"
    found = CliRunner().invoke(app, ["dequantize", str(in_block_fp8), str(dense)])
    assert found.exit_code == 0, found.output
    check_dense_and_convertible(dense, in_block_fp8)
    tensors = load_file(dense / "model.safetensors")
    assert tensors.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" not in stored:
            assert torch.equal(tensor, stored[name])
            continue
        for i, row in enumerate(stored[f"{name}_scale_inv"]):
            for j, scale in enumerate(row):
                place = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1))
                assert torch.equal(tensor[place], (stored[name][place].float() * scale).bfloat16())


def test_block_fp8_equals_transformers_where_it_can(in_block_fp8, tmp_path):
    """It wants shapes that the block divides: so with the others put back to bfloat16."""
    stored = load_file(in_block_fp8 / "model.safetensors")
    odd = [n for n, tensor in stored.items() if f"{n}_scale_inv" in stored and any(x % BLOCK for x in tensor.shape)]
    assert odd
    for name in odd:
        stored.pop(f"{name}_scale_inv")
        stored[name] = stored[name].bfloat16()
    rewrite(in_block_fp8, stored, json.loads((in_block_fp8 / "config.json").read_text())["quantization_config"])
    dequantize_checkpoint(in_block_fp8, tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(
        in_block_fp8, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


def test_mxfp4_equals_transformers(in_mxfp4, tmp_path):
    found = dequantize_checkpoint(in_mxfp4, tmp_path / "dense")
    assert found["made"] == 4
    check_dense_and_convertible(tmp_path / "dense", in_mxfp4)
    theirs = AutoModelForCausalLM.from_pretrained(
        in_mxfp4, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


def test_a_large_copy_is_in_shards(in_mxfp4, tmp_path, monkeypatch):
    monkeypatch.setattr("fermisvd_convert.dequantizing.SHARD_BYTES", 500_000)
    dequantize_checkpoint(in_mxfp4, tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    check_dense_and_convertible(tmp_path / "dense", in_mxfp4)


def refused(folder, out):
    with pytest.raises(FermiSVDError) as error:
        dequantize_checkpoint(folder, out)
    assert not out.exists()
    return str(error.value)


def test_what_is_not_made_dense(in_block_fp8, in_mxfp4, tiny_llama, tmp_path):
    out = tmp_path / "dense"
    assert "no quantization_config; only block fp8" in refused(tiny_llama, out)
    shutil.copytree(tiny_llama, tmp_path / "awq")
    rewrite(tmp_path / "awq", load_file(tiny_llama / "model.safetensors"), {"quant_method": "awq"})
    assert "quant_method awq; only block fp8" in refused(tmp_path / "awq", out)
    assert "lies inside" in refused(in_mxfp4, in_mxfp4 / "dense")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").touch()
    with pytest.raises(FermiSVDError, match="exists; choose another DENSE"):
        dequantize_checkpoint(in_mxfp4, tmp_path / "there")
    for folder, end in ((in_block_fp8, "_scale_inv"), (in_mxfp4, "_scales")):
        stored = load_file(folder / "model.safetensors")
        scales = next(name for name in stored if name.endswith(end))
        entry = json.loads((folder / "config.json").read_text())["quantization_config"]
        rewrite(folder, stored | {scales: stored[scales][:-1]}, entry)
        assert scales.removesuffix(end) in refused(folder, out)
        rewrite(folder, {name: tensor for name, tensor in stored.items() if name != scales}, entry)
        assert scales.removesuffix(end) in refused(folder, out)
