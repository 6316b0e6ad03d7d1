"""Groups and transformers' forward for the structure of every family."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fermisvd.groups import find_groups, left_dense
from fermisvd.hf import load_model
from fermisvd.kept_dense import ABSORBED, RECURRENT, ROUTER, reasons
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
    "mixtral": ATTENTION,
    "gpt_oss": ATTENTION,
    "openai_gpt": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "gptj": ["q_proj k_proj v_proj", "out_proj", "fc_in", "fc_out"],
    "codegen": ["qkv_proj", "out_proj", "fc_in", "fc_out"],
}


MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
HEADS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
SHARED = [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
DELTA = [f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")]
LATENT = ["self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"]
GRANITE = ["shared_mlp.input_linear", "shared_mlp.output_linear"]
SEPARATE = {  # blocks that are not alike: each one's compressed layers
    "deepseek_v2": [[LATENT[0].replace("q_a", "q"), *LATENT[2:], *mlp] for mlp in (MLP, SHARED)],
    "deepseek_v3": [[*LATENT, *mlp] for mlp in (MLP, SHARED)],
    "qwen3_5": [[*DELTA, *MLP], [*HEADS, *MLP]],
    "granitemoehybrid": [["mamba.out_proj", *GRANITE], [*HEADS, *GRANITE]],
    "nemotron_h": [
        [f"mixer.{name}_proj" for name in names.split()] for names in ("out", "up down", "q k v o", "up down")
    ],
}
REASONS = {
    "deepseek_v2": {"self_attn.kv_b_proj": ABSORBED},
    "deepseek_v3": {"self_attn.kv_b_proj": ABSORBED},
    "qwen3_5": {"linear_attn.in_proj_a": RECURRENT, "linear_attn.in_proj_b": RECURRENT},
    "granitemoehybrid": {"mamba.in_proj": RECURRENT},
    "nemotron_h": {"mixer.in_proj": RECURRENT},
}
EXPERTS = ("mlp.experts.", "block_sparse_moe.experts.", "mlp.gate.weight", ".router.weight", ".conv1d.weight")


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in SEPARATE] + [name for name in UNSERVED if name in KINDS]
)
def test_groups_come_from_the_structure(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.save(family, tmp_path)).eval()
    groups = find_groups(model)
    kinds = [" ".join(name.rpartition(".")[2] for name in group.members) for group in groups]
    expected = KINDS.get(family, ATTENTION + GATED)
    assert kinds == expected * 2
    assert [group.side for group in groups] == ["columns", "rows"] * (len(groups) // 2), "as tensor parallelism splits"
    others = {name.partition(".0.")[2] for name in left_dense(model, groups) if ".0." in name}
    assert all(any(experts in name for experts in EXPERTS) for name in others)
    assert bool(others) == (kinds == ATTENTION * 2), "experts and routers stay dense, where there are any"


@pytest.mark.parametrize("family", SEPARATE)
def test_what_vllm_cannot_load_in_factors_stays_dense(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.save(family, tmp_path)).eval()
    groups = find_groups(model, "separate")
    expected = [{f"model.layers.{i}.{name}" for name in names} for i, names in enumerate(SEPARATE[family])]
    assert {group.name for group in groups} == set().union(*expected)
    ends = ("o_proj", "out_proj", "down_proj", "output_linear")
    assert all((group.side == "rows") == group.name.endswith(ends) for group in groups), "as tensor parallelism splits"
    left = left_dense(model, groups)
    why = {name.split(".", 3)[3].removesuffix(".weight"): why for name, why in reasons(model, left).items()}
    assert {name: reason for name, reason in why.items() if reason != ROUTER} == REASONS[family]
    assert all(any(experts in name for experts in EXPERTS) for name in left if name not in reasons(model, left))


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
