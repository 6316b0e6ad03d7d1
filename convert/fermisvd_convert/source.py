"""The dense model that is converted: where it is, what its files hold, how it is loaded."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn

from fermisvd.errors import FermiSVDError
from fermisvd.format import TensorInfo, read_headers
from fermisvd.groups import LinearGroup
from fermisvd.hf import load_model
from fermisvd.streaming import StreamingError, stream_model

logger = logging.getLogger("fermisvd")

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Never read and never copied on: other forms of the same weights, and pickles.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


class SourceError(FermiSVDError):
    """The model cannot be read, or is not a dense safetensors model."""


@dataclass(frozen=True)
class Source:
    """A dense model's folder. `name` is what the user called it; `headers` maps tensor names to their files."""

    name: str
    folder: Path
    revision: str | None
    trust_remote_code: bool
    config: dict
    headers: dict[str, TensorInfo]

    @property
    def key(self) -> str:
        """Hash of config and weights: artefacts made from other weights are never used."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted({info.file for info in self.headers.values()}):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped. Raises SourceError if no file holds it."""
        if name not in self.headers:
            raise SourceError(f"{self.folder}: no tensor {name}")
        with safe_open(self.headers[name].file, framework="pt") as shard:
            return shard.get_tensor(name)

    def check_linear_layers(self, groups: Sequence[LinearGroup]) -> None:
        """Raises SourceError if a group's weight is not in the files under its module's name and in its shape."""
        for group in groups:
            for member, rows in zip(group.members, group.member_rows, strict=True):
                info = self.headers.get(f"{member}.weight")
                if info is None or info.shape != (rows, group.columns):
                    raise SourceError(f"{self.folder}: no tensor {member}.weight of shape {(rows, group.columns)}")

    def weight_type(self) -> torch.dtype:
        """Type of the largest tensor: that of the linear layers, whatever norms are kept in."""
        largest = max(self.headers.values(), key=lambda info: torch.Size(info.shape).numel())
        if largest.dtype not in TORCH_TYPES:
            raise SourceError(
                f"{largest.file}: weights of type {largest.dtype}; only dense floating-point models are converted"
            )
        return TORCH_TYPES[largest.dtype]

    def context_length(self) -> int | None:
        return self.config.get("max_position_embeddings")

    def vocabulary(self) -> int:
        """Tokens; 0 if the config does not say."""
        return self.config.get("vocab_size") or 0

    def load(self, device: str) -> nn.Module:
        """The model in float32, ready for forward passes. Raises SourceError if transformers cannot load it."""
        return load_dense_or_compressed(self.folder, device, self.trust_remote_code)

    def stream(self, device: str) -> nn.Module:
        """As `load`, with one decoder block in memory at a time where the files allow."""
        return open_streamed(self.folder, device, self.trust_remote_code)

    def tokenizer(self):
        """Raises SourceError if the folder has none."""
        return load_tokenizer(self.folder, self.trust_remote_code)


def load_dense_or_compressed(model: str | Path, device: str, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model in float32. Raises SourceError if transformers cannot load it."""
    try:
        return load_model(model, torch.float32, trust_remote_code=trust_remote_code).to(device)
    except FermiSVDError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{model}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None


def open_streamed(folder: Path, device: str, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model in float32 that reads a decoder block's weights when it is called; whole, and said so,
    where transformers changes tensors on loading. Raises SourceError if transformers cannot load it."""
    try:
        return stream_model(folder, device, trust_remote_code)
    except StreamingError as error:
        logger.warning("%s: transformers makes it of others; the model is held whole", error)
        return load_dense_or_compressed(folder, device, trust_remote_code)
    except FermiSVDError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub id. Raises SourceError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder}: no usable tokenizer ({error})") from None


def open_source(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """A folder, or a hub id that is downloaded first. Raises SourceError naming what is wrong with it."""
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model, revision)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise SourceError(f"{folder}: no config.json; MODEL is a Hugging Face model folder or a hub id")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{config_path}: {error}") from None
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "quantized")
        raise SourceError(f"{config_path}: the model is already {method}; convert the dense original")
    if config.get("auto_map") and not trust_remote_code:
        raise SourceError(f"{config_path}: the model runs code of its own; read it, then pass --trust-remote-code")
    if not list(folder.glob("*.safetensors")):
        raise SourceError(
            f"{folder}: no safetensors file; pickled weights are never loaded, save the model as safetensors first"
        )
    return Source(model, folder, revision, trust_remote_code, config, read_headers(folder, allow_pickles=True))


def _download(model: str, revision: str | None) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(f"{model}: no such folder")
    try:
        return Path(
            snapshot_download(
                model, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.h5", "*.gguf", "*.onnx"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(f"{model}: neither a folder nor a model on the hub ({error.__class__.__name__})") from None


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
        raise SourceError(f"--sequence-length {asked}: must be 2 to {context}, the model's context")
    return asked
