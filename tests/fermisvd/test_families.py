"""Groups and transformers' forward for the structure of every family."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fermisvd.groups import find_groups, left_dense
from fermisvd.hf import load_model
from tests.support import families
from tests.support.families import FAMILIES, UNSERVED, dense_twin

ATTENTION = ["q_proj k_proj v_proj", "o_proj"]
GATED = ["gate_proj up_proj", "down_proj"]
KINDS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "qwen3_moe": ATTENTION,
    "openai_gpt": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gptj": ["q_proj k_proj v_proj", "out_proj", "fc_in", "fc_out"],
    "codegen": ["qkv_proj", "out_proj", "fc_in", "fc_out"],
}


@pytest.mark.parametrize("family", [*FAMILIES, *(family for family in UNSERVED if family in KINDS)])
def test_groups_come_from_the_structure(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.save(family, tmp_path)).eval()
    groups = find_groups(model)
    kinds = [" ".join(name.rpartition(".")[2] for name in group.members) for group in groups]
    expected = KINDS.get(family, ATTENTION + GATED)
    assert kinds == expected * 2
    assert [group.side for group in groups] == ["columns", "rows"] * (len(groups) // 2), "as tensor parallelism splits"
    others = {name.partition(".0.")[2] for name in left_dense(model, groups) if ".0." in name}
    moe = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}
    assert others == (moe if "moe" in family else set())


@pytest.mark.long
@pytest.mark.parametrize("form", ["pivga", "svd"])
@pytest.mark.parametrize("family", [*FAMILIES, *UNSERVED])
def test_reloaded_logits_equal_the_dense_product(family, form, family_checkpoints, tmp_path):
    source, compressed = family_checkpoints(family, form)
    ids = torch.randint(2048, (2, 40))
    model = load_model(compressed, attn_implementation="eager")
    with torch.no_grad():
        ours, reference = model(input_ids=ids).logits, dense_twin(source, compressed)(input_ids=ids).logits
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)

    model.save_pretrained(tmp_path)
    before, after = load_file(compressed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
