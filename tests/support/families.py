"""Tiny random models of the families that are served: every structure that a checkpoint's groups have to fit.

`save(family, folder)` writes one with the demo model's tokenizer. Sizes are small and awkward: grouped-query attention,
heads wider together than the hidden state, widths that no power of two divides.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fermisvd.format import Group, validate_checkpoint
from fermisvd.hf import load_model
from fermisvd.linear import linear_layer
from fermisvd.modules import CompressedLinear
from fermisvd.pivga import PivGa, dense_product
from fermisvd.tensors import module_names
from fermisvd_convert.convert import convert
from tests.support import DEMO_MODEL

COMMON = dict(
    vocab_size=2048,
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    tie_word_embeddings=False,
)
GATED = COMMON | dict(intermediate_size=136, num_key_value_heads=2, head_dim=32)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
LOCAL_MOE = dict(num_local_experts=4, num_experts_per_tok=2)
YARN = dict(  # DeepSeek's own; without it vLLM's rotary op for CPUs is wrong for MLA's strides, dense too
    rope_type="yarn",
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=64,
    mscale=1.0,
    mscale_all_dim=1.0,
)
MLA = COMMON | dict(  # latent k and v; an MLP, then experts and a shared one
    intermediate_size=136,
    kv_lora_rank=512,  # with the rope's 64 the only size that vLLM's MLA has for a CPU
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    v_head_dim=32,
    num_key_value_heads=4,
    rope_parameters=YARN,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)

# family -> (config class, its settings); what is special about each stands beside it
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", GATED),
    "mistral": ("MistralConfig", GATED | dict(num_key_value_heads=1, sliding_window=None)),  # fewer kv heads than ranks
    "qwen2": ("Qwen2Config", {**GATED, "hidden_size": 128, "head_dim": 32}),  # bias on q, k, v
    "qwen3": ("Qwen3Config", GATED),  # norms on q and k
    "gemma2": (
        "Gemma2Config",
        GATED | dict(query_pre_attn_scalar=32, sliding_window=16, tie_word_embeddings=True),
    ),  # norms on both sides
    "gemma3": ("Gemma3TextConfig", GATED | dict(query_pre_attn_scalar=32, sliding_window=16, tie_word_embeddings=True)),
    "phi3": ("Phi3Config", {**GATED, "hidden_size": 128}),  # q/k/v and gate/up fused on disk
    "opt": ("OPTConfig", COMMON | dict(ffn_dim=136, hidden_size=128, word_embed_proj_dim=128)),  # biases, no gate
    "gpt_neox": ("GPTNeoXConfig", COMMON | dict(intermediate_size=136, hidden_size=128)),  # vLLM: transformers backend
    "falcon": (  # q, k, v interleaved by kv head on disk; vLLM sorts them while loading
        "FalconConfig",
        COMMON | dict(hidden_size=128, num_kv_heads=2, new_decoder_architecture=True, bias=False),
    ),
    "gpt2": (  # Conv1D: weights transposed on disk, q/k/v fused there; vLLM transposes what ends in .weight
        "GPT2Config",
        COMMON | dict(hidden_size=128, n_inner=136, tie_word_embeddings=True),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", GATED | MOE),
    "mixtral": ("MixtralConfig", GATED | LOCAL_MOE),
    "gpt_oss": ("GptOssConfig", GATED | LOCAL_MOE | dict(intermediate_size=64)),  # biases, sinks, experts transposed
    "deepseek_v2": (  # q reads what k and v's latent reads, but vLLM does not fuse them
        "DeepseekV2Config",
        MLA | dict(q_lora_rank=None, n_group=1, topk_group=1),
    ),
    "deepseek_v3": (  # a latent q, fused with the other; the last two settings are for vLLM, transformers knows them
        "DeepseekV3Config",
        MLA
        | dict(q_lora_rank=48, n_group=2, topk_group=1, num_mtp_layers=0)
        | dict(scoring_func="sigmoid", topk_method="noaux_tc"),
    ),
    "granitemoehybrid": (  # Granite 4: Mamba 2, then attention; gate and up of the shared MLP are one on disk
        "GraniteMoeHybridConfig",
        COMMON
        | dict(layer_types=["linear_attention", "full_attention"], num_key_value_heads=2, intermediate_size=64)
        | dict(mamba_n_heads=4, mamba_d_head=64, mamba_d_state=16, mamba_n_groups=1, attention_multiplier=0.2)
        | dict(hidden_size=128, shared_intermediate_size=136)
        | LOCAL_MOE,
    ),
    "nemotron_h": (  # a block is Mamba 2, or attention, or an MLP without a gate
        "NemotronHConfig",
        GATED
        | dict(layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"], num_hidden_layers=4)
        | dict(mamba_num_heads=4, mamba_head_dim=48, ssm_state_size=16, n_groups=1, rescale_prenorm_residual=False),
    ),
}

# as above, of models that are tried in transformers alone
GPT = dict(vocab_size=2048, n_embd=128, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
UNSERVED: dict[str, tuple[str, dict]] = {
    "openai_gpt": ("OpenAIGPTConfig", GPT),  # Conv1D; its blocks give lists
    "gpt_bigcode": ("GPTBigCodeConfig", GPT | dict(multi_query=True)),
    "gptj": ("GPTJConfig", GPT | dict(rotary_dim=8, tie_word_embeddings=False)),  # attention and MLP side by side
    "codegen": ("CodeGenConfig", GPT | dict(rotary_dim=8, n_ctx=256, tie_word_embeddings=False)),  # q/k/v fused on disk
    "qwen3_5": (  # gated delta rule, then attention with a gate in q_proj; vLLM for CPUs has the rule in bfloat16 only
        "Qwen3_5TextConfig",
        GATED
        | dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4)
        | dict(linear_key_head_dim=128, linear_value_head_dim=128),
    ),
    "recurrent_gemma": (  # its _init_weights reaches for its children's weights, as GPT-2's
        "RecurrentGemmaConfig",
        GATED | dict(lru_width=96, attention_window_size=64, block_types=("recurrent", "attention")),
    ),
}


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """A random float32 model of the family."""
    class_name, settings = (FAMILIES | UNSERVED)[family]
    torch.manual_seed(seed)
    config: PretrainedConfig = getattr(transformers, class_name)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


def randomise(model: nn.Module) -> None:
    """Large weights and biases that are not zero, so that every mistake shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=2 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
        else:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)


def compress(source: Path, form: str, text: Path, work: Path) -> Path:
    """A checkpoint beside `source` with 30 % removed, float32, odd ranks: pivga joint, or svd separate."""
    out = source.with_name(f"{source.name}-{form}")
    convert(
        str(source),
        out,
        0.3,
        form=form,
        groups="joint" if form == "pivga" else "separate",
        ranks="uniform",
        align=1,
        heal_steps=0,
        dtype="float32",
        calibration=[str(text)],
        samples=16,
        gradient_samples=16,
        sequence_length=64,
        work=work,
    )
    return out


def product_of(group: Group, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """W of a group (members by rows), float64, of a checkpoint's tensors."""
    first = group.name
    if group.form == "svd":
        a = torch.cat([tensors[f"{m}.lowrank_a"] for m in group.members]).double()
        return a @ tensors[f"{first}.lowrank_b"].double()
    names = [first] if group.side == "rows" else group.members
    skeleton = torch.cat([tensors[f"{m}.skeleton"] for m in names])
    assert group.side is not None
    return dense_product(
        PivGa(skeleton, tensors[f"{first}.interpolation"], tensors[f"{first}.permutation"], group.side)
    )


@torch.no_grad()
def dense_twin(source: Path, compressed: Path) -> nn.Module:
    """The reference: the dense source with each compressed weight replaced by the float64 product of its factors.

    Eager attention, the only one of transformers' that caps Gemma 2's logits.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    tensors, config = load_file(compressed / "model.safetensors"), validate_checkpoint(compressed)
    modules = module_names(model, config.group_of())
    for group in config.groups:
        weight = product_of(group, tensors)
        layers = [linear_layer(model, modules[m]) for m in group.members]
        rows = [layer.nf if isinstance(layer, Conv1D) else layer.out_features for layer in layers]
        for layer, part in zip(layers, weight.split(rows), strict=True):
            layer.weight.copy_(part.T if isinstance(layer, Conv1D) else part)
    return model


@torch.no_grad()
def probed_twin(source: Path, compressed: Path) -> nn.Module:
    """The dense source with the weight that each compressed layer stands for, on a grid or not, found by unit vectors.

    For what is put on top of the layers; `dense_twin` is the reference for the layers themselves.
    """
    model = load_model(source)
    for name, layer in load_model(compressed).named_modules():
        if isinstance(layer, CompressedLinear):
            weight = layer(torch.eye(layer.in_features)) - layer(torch.zeros(layer.in_features))
            linear_layer(model, name).weight.copy_(weight.T)
        elif isinstance(layer, nn.Linear):
            linear_layer(model, name).weight.copy_(layer.weight)
    return model
