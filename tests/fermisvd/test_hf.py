import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fermisvd.errors import FormatError
from fermisvd.format import validate_checkpoint
from fermisvd.hf import load_model
from tests.support.families import dense_twin


@pytest.fixture(scope="module", params=["pivga-joint", "pivga-separate", "svd-joint", "svd-separate"])
def compressed(request, tiny_llama, tmp_path_factory):
    from fermisvd_convert.convert import convert

    form, partition = request.param.split("-")
    folder = tmp_path_factory.mktemp("compressed") / request.param
    text = folder.parent / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 300)
    convert(
        str(tiny_llama),
        folder,
        0.3,
        form=form,
        groups=partition,
        ranks="uniform",
        align=1,
        heal_steps=2,
        calibration=[str(text)],
        samples=8,
        sequence_length=32,
    )
    return folder


def test_logits_equal_the_dense_product(tiny_llama, compressed):
    ids = torch.randint(2048, (3, 20))
    with torch.no_grad():
        ours = load_model(compressed)(input_ids=ids).logits
        reference = dense_twin(tiny_llama, compressed)(input_ids=ids).logits
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def test_saves_again_at_its_small_size(compressed, tmp_path):
    model = load_model(compressed)
    model.save_pretrained(tmp_path)
    before, after = load_file(compressed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert validate_checkpoint(tmp_path).groups == validate_checkpoint(compressed).groups
    ids = torch.randint(2048, (1, 10))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.long
def test_importing_fermisvd_is_enough(compressed):
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(compressed)!r})"
    code = f"import fermisvd, transformers; print({load})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PivGaRowsLinear" in result.stdout or "LowRankLinear" in result.stdout


def test_generates(compressed):
    model: Any = load_model(compressed)  # generate comes from a mixin
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 8)


def test_dtype_casts_factors_and_keeps_the_permutation(compressed):
    model = load_model(compressed, torch.bfloat16)
    types = {t.dtype for t in model.state_dict().values()}
    assert types <= {torch.bfloat16, torch.int32}


FAULTS = {
    "missing": lambda tensors, name: tensors.pop(name),
    "shape": lambda tensors, name: tensors.update({name: tensors[name][1:].contiguous()}),
    "NaN": lambda tensors, name: tensors.update({name: tensors[name] * float("nan")}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_checkpoint_is_refused(compressed, tmp_path, fault):
    for path in compressed.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(compressed / "model.safetensors")
    name = next(n for n in tensors if n.startswith("model.layers.1.self_attn.k_proj.") or ".down_proj.skel" in n)
    FAULTS[fault](tensors, name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError):
        load_model(tmp_path)


def test_missing_dense_tensor_is_refused(compressed, tmp_path):
    config = json.loads((compressed / "config.json").read_text())
    config["quantization_config"]["provenance"] = {}  # even without the list of dense tensors
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(compressed / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.norm\.weight: missing"):
        load_model(tmp_path)


def test_checkpoint_of_another_model_is_refused(compressed, tmp_path):
    """Widths of the model and of the tensors must agree; transformers would resize or fill in silence."""
    config = json.loads((compressed / "config.json").read_text())
    config["intermediate_size"] = 200
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((compressed / "model.safetensors").read_bytes())
    with pytest.raises(FormatError, match="LlamaForCausalLM needs"):
        load_model(tmp_path)
