"""Every place where vLLM's releases differ, or where we rely on a name of vLLM's that no interface promises.

docs/serving.md has the table of releases. What breaks with a new one is mended here.
"""

from collections.abc import Container, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear

from fermisvd.errors import FormatError

# The prefix of all layers of a draft in speculative decoding (v1/spec_decode/draft_model.py); no checkpoint has it.
DRAFT_PREFIX = "draft_model."

# LoRA places its tensors on the device of the first of a few attributes that it finds on the base layer
# (lora/layers/utils.py, `_get_lora_device`). Of these names this one means nothing to dense layers; it is empty.
LORA_DEVICE_NAME = "qweight"

# vLLM's own classes of these (GPT-NeoX until 0.31) reorder the rows of every tensor under a layer of that name while
# loading, be it B, D or the permutation. 0.32 serves GPT-NeoX by its transformers backend, which reorders nothing.
REORDERED_LAYER = "query_key_value"
REORDERING_MODELS = {"bloom": "try --model-impl transformers", "gpt_neox": "serve it with vLLM 0.32 or later"}

# vLLM's own Llama 4 (models/llama4.py, `permute_qk_weight_for_rotary`) keeps the rotary dimensions of a head in halves,
# files have them in pairs: while loading it reorders the rows of q and k, of tensors named `weight` or as a grid's.
ROTARY_IN_HALVES = {"llama4", "llama4_text"}

SHARD_NAMES = {"q": 0, "k": 1, "v": 2}
Span = tuple[int, ...]

# Layers of which a member gives several of vLLM's outputs: of Qwen3.5's gated delta rule in_proj_qkv gives q, k and v,
# in_proj_z the fourth (models/qwen3_5.py, `hf_to_vllm_mapper`).
SPANS: dict[str, tuple[Span, ...]] = {"in_proj_qkvz": ((0, 1, 2), (3,))}

# Models with a MambaMixer2 call it `mamba` in their modules and files, but `mixer` in what they tell it of its name
# (models/granitemoehybrid.py, bamba.py, falcon_h1.py); Nemotron-H calls it `mixer` in both.
MIXER_NAMES = (".mixer.", ".mamba.")


def spans_of(layer: str, members: Sequence[str], outputs: int) -> list[Span]:
    """Which of vLLM's outputs each member of a layer gives: all of them a single one, else one each or as SPANS says.

    Raises FormatError where the checkpoint has several members, but not as many as vLLM.
    """
    if len(members) == 1:
        return [tuple(range(outputs))]
    if len(members) == outputs:
        return [(output,) for output in range(outputs)]
    spans = SPANS.get(layer.rpartition(".")[2], ())
    if len(spans) != len(members) or sum(map(len, spans)) != outputs:
        raise FormatError(
            f"{layer}: vLLM splits it in {outputs}, the checkpoint stores {', '.join(members)}; this layer is not "
            "served yet, convert again without it"
        )
    return list(spans)


def member_of(loaded_weight: torch.Tensor, shard_id: str | int | tuple[int, ...] | None, spans: Sequence[Span]) -> int:
    """Position of the member that a weight belongs to, 0 in a layer of one. spans: of the members (`spans_of`). Raises
    FormatError for outputs that are no member's.

    Models with a loop of their own pass the shard; from 0.27 on AutoWeightsLoader hangs it on the tensor instead.
    """
    shard = getattr(loaded_weight, "shard_id", 0) if shard_id is None else shard_id
    outputs = shard if isinstance(shard, tuple) else (SHARD_NAMES[shard] if isinstance(shard, str) else int(shard),)
    if len(spans) == 1 and outputs == (0,):  # fused on disk: nothing is said of its outputs
        return 0
    if outputs not in spans:
        raise FormatError(f"vLLM loads shards {shard} of a layer as one, which is not served yet")
    return spans.index(outputs)


def name_in_files(name: str, known: Container[str]) -> str:
    """A layer's name as the groups have it, where vLLM calls its mixer otherwise than the files do."""
    other = name.replace(*MIXER_NAMES)
    return other if name not in known and other in known else name


def has_packed_product() -> bool:
    """Whether vLLM's build for a CPU has the kernel of fermisvd_vllm.packed, which writes into what it is given."""
    from vllm import _custom_ops  # noqa: F401  loads them

    if not all(hasattr(torch.ops._C, name) for name in ("convert_weight_packed", "weight_packed_linear")):
        return False
    schema = torch.ops._C.weight_packed_linear.default._schema
    return schema.arguments[0].name == "out" and not schema.returns  # older ones gave a tensor of their own


def int4_options(config: type) -> dict[str, bool]:
    """What 0.26 to 0.31 ask of an int4 kernel's config besides what they all ask."""
    return {"has_g_idx": False} if "has_g_idx" in {field.name for field in fields(config)} else {}


def keep_onednn(kernel, layer: torch.nn.Module) -> None:
    """A CPU's int8 kernel by oneDNN, where that for AMX would be taken, which knows no float32."""
    if hasattr(kernel, "process_weights_for_onednn") and hasattr(kernel, "_apply_weights_onednn"):
        kernel.process_weights_for_onednn(layer)
        kernel.linear_method = kernel._apply_weights_onednn
    else:
        kernel.process_weights_after_loading(layer)


def run_eagerly(kernel) -> None:
    """A CPU's fp8 kernel would have x's rounding compiled for every shape, 11 s the first time."""
    rounding = getattr(kernel, "quant_fp8", None)
    if rounding is not None and hasattr(rounding, "forward_native"):
        rounding._forward_method = rounding.forward_native


def check_loading_order(model_config, layer: str) -> None:
    """Raises FormatError for a layer whose tensors vLLM would reorder while it loads them, shared ones included."""
    if not layer.endswith(REORDERED_LAYER):
        return
    model_type = model_config.hf_config.model_type
    if model_type not in REORDERING_MODELS:
        return
    if model_config.model_impl != "transformers" and find_spec(f"vllm.model_executor.models.{model_type}"):
        raise FormatError(
            f"{layer}: vLLM's own {model_type} reorders the rows of all its tensors, which mixes up shared factors; "
            f"{REORDERING_MODELS[model_type]}"
        )


def heads_in_halves(model_config, layer: str) -> dict[int, int]:
    """Member -> heads, of the members of a layer whose rows are to be reordered as they are loaded: the rotary
    dimensions of each head from pairs to halves."""
    if model_config is None or not layer.endswith("self_attn.qkv_proj"):  # a layer without a model: in tests
        return {}
    if model_config.hf_config.model_type not in ROTARY_IN_HALVES or model_config.model_impl == "transformers":
        return {}
    config = model_config.hf_text_config
    return {SHARD_NAMES["q"]: config.num_attention_heads, SHARD_NAMES["k"]: config.num_key_value_heads}


def check_factors_are_read(layer, name: str) -> None:
    """Raises FormatError for a layer whose `weight` vLLM reads, or loads in an order of its own: `convert` leaves these
    dense (fermisvd.kept_dense), but a checkpoint may have been made otherwise.

    layer: vLLM's. MLA: layers/attention/mla_attention.py; Mamba 2: layers/mamba/mamba_mixer2.py, where the groups of
    the state do not divide by the processes, the one case in which its in_proj is no merged layer.
    """
    last = name.rpartition(".")[2]
    if last == "kv_b_proj":
        raise FormatError(
            f"{name}: compressed, but vLLM's MLA reads its dense weight; convert again, which leaves it dense"
        )
    if last == "in_proj" and type(layer) is ColumnParallelLinear:
        raise FormatError(
            f"{name}: compressed, but vLLM repeats rows of its dense weight where a Mamba 2 has fewer groups than "
            "there are processes; serve with --tensor-parallel-size 1, or convert again, which leaves it dense"
        )


def check_online_quantization(config) -> None:
    """Raises FormatError where vLLM (from 0.32 on) is to quantise linear layers as they load: it would look for the
    `weight` of each. config: our quantization config, on which vLLM hangs the option."""
    online = getattr(config, "online_quantization_config", None)
    for name in ("linear", "targets"):
        if online is not None and getattr(online.args, name):
            raise FormatError(
                f"--quantization-config: {name}: a compressed layer has factors, which vLLM cannot quantise; "
                "serve without that option, or quantise the dense model"
            )


def checkpoint_folder(loader, model_config) -> Path:
    """Where vLLM's default loader has the checkpoint, downloaded if need be: three values until 0.30, then four."""
    return Path(loader._prepare_weights(model_config.model, None, model_config.revision, False, None)[0])
