"""A model, its tokenizer and the device it runs on, loaded for measuring; how many tokens it takes."""

import json
import logging
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fermisvd.errors import FermiSVDError, explained
from fermisvd.hf import load_model
from fermisvd.running.streaming import StreamingError, stream_model

logger = logging.getLogger("fermisvd")


class SourceError(FermiSVDError):
    """The model cannot be read, or is not a dense safetensors model."""


def load_dense_or_compressed(
    folder: Path, device: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model, its weights in `dtype`. Raises SourceError if transformers cannot load it, FormatError
    for a folder that is not one model to everybody."""
    with explained(SourceError, f"{folder}: transformers cannot load it"):
        model = load_model(folder, dtype, trust_remote_code=trust_remote_code)
        return model.to(device)  # pyright: ignore[reportArgumentType]: transformers' decorator hides what it takes


def open_streamed(
    folder: Path, device: str, dtype: torch.dtype, trust_remote_code: bool = False, bounded: bool = False
) -> PreTrainedModel:
    """A causal language model in `dtype` that reads a decoder block's weights when it is called; whole, and said so,
    where transformers changes tensors on loading. Raises SourceError if transformers cannot load it."""
    try:
        with explained(SourceError, f"{folder}: transformers cannot load it"):
            return stream_model(folder, device, dtype, trust_remote_code)
    except StreamingError as error:
        if bounded:
            raise SourceError(
                f"{error}: transformers makes it of others; not without holding the model whole, which "
                "--max-memory does not allow"
            ) from None
        logger.warning("%s: transformers makes it of others; the model is held whole", error)
        return load_dense_or_compressed(folder, device, dtype, trust_remote_code)


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub id. Raises SourceError if there is none that gives tokens."""
    from transformers import AutoTokenizer

    remedy = "; copy its files again, or update transformers if they are newer"
    try:
        with explained(SourceError, f"{folder}: no usable tokenizer", remedy):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except SourceError:
        path = Path(folder) / "tokenizer_config.json"
        if not trust_remote_code and _has_code(path):  # transformers may do without, with a class of its own
            raise SourceError(
                f"{path}: the tokenizer runs code of its own; read it, then pass --trust-remote-code"
            ) from None
        raise
    with explained(SourceError, f"{folder}: no usable tokenizer", remedy):
        if not tokenizer("a text of 8 words, one of them 42", add_special_tokens=False)["input_ids"]:
            raise SourceError(
                f"{folder}: no usable tokenizer: it gives no tokens for any text; its vocabulary is empty"
            )
    return tokenizer


def _has_code(path: Path) -> bool:
    """Whether a tokenizer_config.json names code that the model brings."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["auto_map"]["AutoTokenizer"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model was made for, by whatever name its config has for it; None where it has none that can be
    (-1 is for no limit)."""
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 1 else None


def resolve_device(device: str) -> str:
    """--device auto is the GPU if there is one. Raises SourceError for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SourceError("--device cuda: torch sees no CUDA device")
    return device


def window_length(asked: int | None, context: int | None) -> int:
    """Tokens a window: as asked, else the model's context up to 2048. Raises SourceError if the context is shorter."""
    if asked is None:
        return min(2048, context or 2048)
    if asked < 2 or (context is not None and asked > context):
        most = "" if context is None else f" to {context}, the model's context"
        raise SourceError(f"--sequence-length {asked}: must be 2{most or ' or more'}")
    return asked
