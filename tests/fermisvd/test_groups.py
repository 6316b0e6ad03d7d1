import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fermisvd.groups import StructureError, find_groups, left_dense, stacked_weight


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_joint_groups_of_llama(model):
    groups = find_groups(model)
    assert len(groups) == 8
    attention, output, up, down = groups[:4]
    prefix = "model.layers.0."
    assert attention.members == tuple(f"{prefix}self_attn.{x}_proj" for x in "qkv")
    assert attention.member_rows == (96, 32, 32) and attention.columns == 96
    assert output.members == (f"{prefix}self_attn.o_proj",)
    assert up.members == (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
    assert down.members == (f"{prefix}mlp.down_proj",) and down.full_rank == 96
    assert [g.side for g in groups[:4]] == ["columns", "rows", "columns", "rows"]


def test_separate_groups_share_the_gram_matrix(model):
    groups = find_groups(model, "separate")
    assert len(groups) == 14
    assert {g.source for g in groups[:3]} == {"model.layers.0.self_attn.q_proj"}
    assert [g.side for g in groups[:7]] == ["columns"] * 3 + ["rows"] + ["columns"] * 2 + ["rows"]


def test_head_and_embeddings_are_left_alone(model):
    assert not any("lm_head" in m or "embed" in m for g in find_groups(model) for m in g.members)


def test_stacked_weight(model):
    group = find_groups(model)[0]
    attention = model.model.layers[0].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(stacked_weight(model, group), expected)
    assert stacked_weight(model, group).shape == (group.rows, group.columns)


def test_model_without_blocks_is_refused():
    with pytest.raises(StructureError, match="Linear"):
        find_groups(nn.Linear(3, 3))


def test_layer_that_is_never_called_stays_dense(model):
    """As experts do, which see only some tokens: no rank could be judged for all."""
    before = find_groups(model)
    assert left_dense(model, before) == {}
    model.model.layers[0].mlp.extra = nn.Linear(4, 5)
    assert find_groups(model) == before
    assert left_dense(model, before) == {"model.layers.0.mlp.extra.weight": 20}


def test_router_that_is_a_linear_layer_stays_dense(model):
    """As wide as the experts beside it, and called for every token."""
    mlp = model.model.layers[0].mlp
    mlp.experts = nn.Module()
    mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(5, 8, 96))
    mlp.router = nn.Linear(96, 5)
    dense_forward = mlp.forward
    mlp.forward = lambda x: dense_forward(x) + mlp.router(x).sum()
    assert find_groups(model)[2].members == tuple(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up"))


def test_layer_as_wide_as_a_convolution_is_no_router(model):
    """As Qwen3.5's in_proj_qkv beside a convolution of as many channels, whose weight has three dimensions too."""
    attention = model.model.layers[0].self_attn
    attention.conv1d = nn.Conv1d(96, 96, 4, groups=96)
    assert find_groups(model)[0].members == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def test_experts_in_a_list_stay_dense(model):
    """One sees half of the tokens and one, by chance of routing, all of them."""
    mlp = model.model.layers[0].mlp
    before = find_groups(model)
    mlp.experts = nn.ModuleList(nn.Linear(96, 7) for _ in range(2))
    dense_forward = mlp.forward
    mlp.forward = lambda x: dense_forward(x) + mlp.experts[0](x[:, ::2]).sum() + mlp.experts[1](x).sum()
    assert find_groups(model) == before
    assert set(left_dense(model, before)) == {f"model.layers.0.mlp.experts.{i}.weight" for i in range(2)}


def test_model_whose_layers_are_never_called_is_refused(model):
    model.forward = lambda input_ids: None
    with pytest.raises(StructureError, match="called once"):
        find_groups(model)


def test_parallel_block_keeps_attention_and_mlp_apart():
    """In Cohere's block both read one norm's output; vLLM fuses q/k/v and gate/up, never across modules."""
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    groups = find_groups(CohereForCausalLM(config).eval())
    assert [len(g.members) for g in groups] == [3, 1, 2, 1]
    assert [g.side for g in groups] == ["columns", "rows", "columns", "rows"]
