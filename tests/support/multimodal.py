"""Tiny random models that are wrappers of a language model: images go through a tower of their own.

`python -m tests.support.multimodal FAMILY FOLDER` writes one with a tokenizer and, with torchvision, a processor. File
names are those of published models, which for most families are not the names of transformers' modules.
"""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.import_utils import is_torchvision_available

from fermisvd.files import WEIGHTS_NAME
from fermisvd.format import read_config
from tests.support import DEMO_MODEL
from tests.support.families import product_of, randomise

TEXT = dict(
    vocab_size=2080,  # the demo model's tokens, and those for images
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=136,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
TOWER = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2)
QWEN_TOWER = dict(depth=2, hidden_size=64, intermediate_size=80, num_heads=2)
FIRST = 2048  # id of the first token for images
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_IDS = dict(
    image_token_id=FIRST, video_token_id=FIRST + 1, vision_start_token_id=FIRST + 2, vision_end_token_id=FIRST + 3
)


@dataclass(frozen=True)
class Wrapper:
    """model, config: class names in transformers; settings: the config's; tokens: for images, from id FIRST on; named:
    of these, as the tokenizer's attributes; processor: made of a tokenizer; placeholder: of an image in a prompt;
    renamed: beginnings of names as transformers saves them, and as published models have them."""

    model: str
    config: str
    settings: dict[str, Any]
    tokens: tuple[str, ...]
    processor: Callable[[Any], Any]
    placeholder: str
    named: tuple[str, ...] = ()
    renamed: tuple[str, str] = ("", "")


def _gemma3(tokenizer):
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32}, do_pan_and_scan=False)
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _qwen(images: str, processor: str, video: str, **settings):
    def make(tokenizer):
        sizes = {"shortest_edge": settings["min"], "longest_edge": settings["max"]}
        both = dict(size=sizes, patch_size=settings["patch"], temporal_patch_size=2, merge_size=2)
        own = getattr(transformers, images)(**both), getattr(transformers, video)(**both)
        return getattr(transformers, processor)(own[0], tokenizer, own[1])

    return make


def _pixtral(tokenizer):
    images = transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return transformers.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)


def _llama4(tokenizer):
    images = transformers.Llama4ImageProcessor(size={"height": 32, "width": 32}, max_patches=1)
    return transformers.Llama4Processor(images, tokenizer, patch_size=8, pixel_shuffle_ratio=0.5)


MULTIMODAL: dict[str, Wrapper] = {
    "gemma3_mm": Wrapper(  # its layers are language_model.model.layers in files
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        dict(
            text_config=TEXT | dict(query_pre_attn_scalar=32, sliding_window=16),
            vision_config=TOWER | dict(image_size=32, patch_size=8),
            mm_tokens_per_image=4,
            image_token_index=FIRST,
            boi_token_index=FIRST + 1,
            eoi_token_index=FIRST + 2,
        ),
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>", *("\n" * count for count in range(1, 5))),
        _gemma3,
        "<start_of_image>",
        ("image_token", "boi_token", "eoi_token"),
        ("vision_tower.", "vision_tower.vision_model."),
    ),
    "qwen2_5_vl": Wrapper(  # model.layers, as of a model without a tower; biases on q, k, v
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        dict(
            text_config=TEXT | dict(hidden_size=128, rope_parameters=ROTARY | {"mrope_section": [4, 6, 6]}),
            vision_config=QWEN_TOWER
            | dict(out_hidden_size=128, patch_size=14, fullatt_block_indexes=[1], window_size=56),
            **QWEN_IDS,
        ),
        QWEN_TOKENS,
        _qwen("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", patch=14, min=784, max=3136),
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen3_vl": Wrapper(  # model.language_model.layers, as its modules
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        dict(
            text_config=TEXT | dict(rope_parameters=ROTARY | {"mrope_section": [6, 5, 5]}),
            vision_config=QWEN_TOWER
            | dict(out_hidden_size=96, patch_size=16, deepstack_visual_indexes=[0], num_position_embeddings=16),
            **QWEN_IDS,
        ),
        QWEN_TOKENS,
        _qwen("Qwen2VLImageProcessor", "Qwen3VLProcessor", "Qwen3VLVideoProcessor", patch=16, min=1024, max=4096),
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen3_5_mm": Wrapper(  # a gated delta rule, then attention
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        dict(
            text_config=TEXT
            | dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2)
            | dict(linear_num_value_heads=4, linear_key_head_dim=128, linear_value_head_dim=128),
            vision_config=QWEN_TOWER | dict(out_hidden_size=96, patch_size=16, num_position_embeddings=16),
            **QWEN_IDS,
        ),
        QWEN_TOKENS,
        _qwen("Qwen2VLImageProcessor", "Qwen3VLProcessor", "Qwen3VLVideoProcessor", patch=16, min=1024, max=4096),
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "gemma4": Wrapper(  # a table of each token's own inputs for every block; the last two blocks have no k and v
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        dict(
            text_config=TEXT
            | dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16)
            | dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=2080, num_kv_shared_layers=2)
            | dict(global_head_dim=32),
            vision_config=TOWER | dict(head_dim=32, patch_size=4, position_embedding_size=64, default_output_length=4),
            audio_config=None,
            image_token_id=FIRST,
            boi_token_id=FIRST + 1,
            eoi_token_id=FIRST + 2,
        ),
        ("<|image|>", "<|boi|>", "<|eoi|>"),
        lambda tokenizer: tokenizer,  # not tried with images
        "<|image|>",
    ),
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        dict(
            text_config=TEXT | dict(model_type="mistral", sliding_window=None),
            vision_config=TOWER | dict(model_type="pixtral", head_dim=32, image_size=56, patch_size=14),
            image_token_index=FIRST,
            spatial_merge_size=2,
        ),
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        _pixtral,
        "[IMG]",
    ),
    "llama4": Wrapper(  # every second block has experts
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        dict(
            text_config=TEXT
            | dict(
                intermediate_size_mlp=136, num_local_experts=2, interleave_moe_layer_step=2, attention_chunk_size=128
            ),
            vision_config={**TOWER, "intermediate_size": 256}
            | dict(image_size=32, patch_size=8, vision_output_dim=64, projector_input_dim=64, projector_output_dim=64),
            image_token_index=FIRST,
            boi_token_index=FIRST + 1,
            eoi_token_index=FIRST + 2,
        ),
        ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        _llama4,
        "<|image|>",
    ),
}


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """A random float32 model of the family, with weights as tests.support.families makes them; its processor where
    torchvision is installed, which some ask for."""
    wrapper = MULTIMODAL[family]
    torch.manual_seed(seed)
    config = getattr(transformers, wrapper.config)(**wrapper.settings)
    model: PreTrainedModel = getattr(transformers, wrapper.model)(config).float()
    randomise(model)
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept:  # Gemma 4's scalars of its blocks
            buffer.mul_(0.7)
    if config.tie_word_embeddings:  # else the next token is certain
        nn.init.normal_(cast(nn.Embedding, model.get_input_embeddings()).weight, std=0.1)
    model.save_pretrained(folder)
    saved, published = wrapper.renamed
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors = {re.sub(f"^{saved}", published, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    tokenizer = tokenizer_of(wrapper)
    (wrapper.processor(tokenizer) if is_torchvision_available() else tokenizer).save_pretrained(folder)
    return folder


def tokenizer_of(wrapper: Wrapper):
    """The demo model's, with the tokens for images."""
    named = dict(zip(wrapper.named, wrapper.tokens, strict=False))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, extra_special_tokens=named)
    tokenizer.add_tokens(list(wrapper.tokens), special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(list(wrapper.tokens)) == list(range(FIRST, FIRST + len(wrapper.tokens)))
    return tokenizer


def dense_twin(source: Path, compressed: Path, twin: Path) -> Path:
    """A copy of the dense folder, each compressed weight replaced by the product of its factors."""
    shutil.copytree(source, twin)
    tensors, factors = load_file(source / WEIGHTS_NAME), load_file(compressed / WEIGHTS_NAME)
    for group in read_config(compressed).groups:
        weights = product_of(group, factors).split([len(tensors[f"{member}.weight"]) for member in group.members])
        replaced = zip(group.members, weights, strict=True)
        tensors |= {f"{member}.weight": weight.float().contiguous() for member, weight in replaced}
    save_file(tensors, twin / WEIGHTS_NAME, metadata={"format": "pt"})
    return twin


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
