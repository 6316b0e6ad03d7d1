"""The dense model that is converted: where it is, what its files hold, how it is loaded."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from fermisvd.errors import FermiSVDError
from fermisvd.format import COPY, TensorInfo, read_headers
from fermisvd.groups import LinearGroup, StructureError, check_unshared
from fermisvd.hf import load_model, parameters_of
from fermisvd.streaming import StreamingError, stream_model

logger = logging.getLogger("fermisvd")

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Never read and never copied on: other forms of the same weights, and pickles.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
SLICE = 2**24  # numbers looked at together


class SourceError(FermiSVDError):
    """The model cannot be read, or is not a dense safetensors model."""


@dataclass(frozen=True)
class Source:
    """A dense model's folder. `name` is what the user called it; `headers` maps tensor names to their files;
    `vocabulary` is how many tokens it can read."""

    name: str
    folder: Path
    revision: str | None
    trust_remote_code: bool
    config: dict
    headers: dict[str, TensorInfo]
    vocabulary: int

    @property
    def key(self) -> str:
        """Hash of config, weights and, where the model brings its own, code: artefacts of another are never used."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        code = sorted(self.folder.glob("*.py")) if self.config.get("auto_map") else []
        for file in [*sorted({info.file for info in self.headers.values()}), *code]:
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
                shape = (group.columns, rows) if group.transposed else (rows, group.columns)
                if info is None or info.shape != shape:
                    raise SourceError(f"{self.folder}: no tensor {member}.weight of shape {shape}")

    def weight_type(self) -> torch.dtype:
        """Type of the largest tensor: that of the linear layers, whatever norms are kept in.

        Raises SourceError if it is no floating-point type of two bytes or more, or a tensor is of an eight-bit one.
        """
        largest = max(self.headers, key=lambda name: self.headers[name].numel)
        for name, info in self.headers.items():
            if info.dtype not in TORCH_TYPES and (name == largest or info.dtype.startswith("F")):
                raise SourceError(
                    f"{info.file}: {name} is of type {info.dtype}; only dense floating-point models are converted"
                )
        return TORCH_TYPES[self.headers[largest].dtype]

    def check_values(self, cast: torch.dtype | None = None) -> None:
        """Reads all weights, one tensor at a time.

        cast: type that they are to be stored in. Raises SourceError naming the tensor that holds NaN, infinity, or a
        value too large for that type.
        """
        for name, info in tqdm(self.headers.items(), desc="check weights", leave=False):
            if info.dtype not in TORCH_TYPES:
                continue
            for part in self.tensor(name).flatten().split(SLICE):
                if not part.isfinite().all():
                    raise SourceError(f"{info.file}: {name}: holds NaN or infinite values; {COPY}")
                if cast is not None and not part.to(cast).isfinite().all():
                    kind = str(cast).removeprefix("torch.")
                    raise SourceError(f"{info.file}: {name}: holds values too large for --dtype {kind}")

    def context_length(self) -> int | None:
        return self.config.get("max_position_embeddings")

    def load(self, device: str) -> nn.Module:
        """The model in float32, ready for forward passes. Raises SourceError if transformers cannot load it."""
        return load_dense_or_compressed(self.folder, device, self.trust_remote_code)

    def stream(self, device: str, bounded: bool = False) -> nn.Module:
        """As `load`, with one decoder block in memory at a time where the files allow. Raises SourceError if they do
        not and the memory is `bounded`."""
        return open_streamed(self.folder, device, self.trust_remote_code, bounded)

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


def open_streamed(folder: Path, device: str, trust_remote_code: bool = False, bounded: bool = False) -> nn.Module:
    """A causal language model in float32 that reads a decoder block's weights when it is called; whole, and said so,
    where transformers changes tensors on loading. Raises SourceError if transformers cannot load it."""
    try:
        return stream_model(folder, device, trust_remote_code)
    except StreamingError as error:
        if bounded:
            raise SourceError(
                f"{error}: transformers makes it of others; not without holding the model whole, which "
                "--max-memory does not allow"
            ) from None
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
        raise SourceError(f"{folder}: no usable tokenizer: {str(error).strip().splitlines()[0]}") from None


def open_source(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """A folder, or a hub id that is downloaded first; its config and its files' headers are checked, no weight is read.

    Raises SourceError or FormatError naming what is wrong with it.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model, revision)
    elif revision is not None:
        raise SourceError(f"--revision {revision}: {model} is a folder, only models on the hub have revisions")
    config = _read_config(folder, trust_remote_code)
    if not list(folder.glob("*.safetensors")):
        raise SourceError(
            f"{folder}: no safetensors file; pickled weights are never loaded, save the model as safetensors first"
        )
    headers = read_headers(folder, allow_pickles=True)
    empty, vocabulary = _empty_model(folder, config, trust_remote_code)
    try:
        check_unshared(empty)
    except StructureError as error:
        raise SourceError(f"{folder}: {error}") from None
    _check_tensors(empty, headers, folder)
    return Source(model, folder, revision, trust_remote_code, config, headers, vocabulary)


def _read_config(folder: Path, trust_remote_code: bool) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder}: no config.json; MODEL is a Hugging Face model folder or a hub id")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path}: not a JSON object")
    if quantization := config.get("quantization_config") or config.get("compression_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise SourceError(f"{path}: the model is already {method or 'quantized'}; convert the dense original")
    if config.get("auto_map") and not trust_remote_code:
        raise SourceError(f"{path}: the model runs code of its own; read it, then pass --trust-remote-code")
    return config


def _empty_model(folder: Path, config: dict, trust_remote_code: bool) -> tuple[nn.Module, int]:
    """The causal language model that config.json describes, without weights, and how many tokens it can read.

    Raises SourceError if it describes none.
    """
    path = folder / "config.json"
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, trust_remote_code=trust_remote_code)
        vocabulary = len(model.get_input_embeddings().weight)
    except Exception as error:  # whatever strange values, or a model's own code, make transformers raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SourceError(f"{path}: transformers makes no causal language model of it: {reason}") from None
    named = config.get("architectures")
    if named and not config.get("auto_map") and type(model).__name__ not in named:
        # transformers would fill the head of such a model with random numbers, or let an encoder see what comes next
        raise SourceError(f"{path}: {named[0]} is no causal language model; {type(model).__name__} would be one")
    return model, vocabulary


def _check_tensors(model: nn.Module, headers: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raises SourceError if a weight of the model is not in the files, or in another shape."""
    loaded = {parameter for parameter, _ in parameters_of(model, headers).values()}
    ties = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    for name, parameter in model.named_parameters():
        copies = {name} | {a for a, b in ties if b == name} | {b for a, b in ties if a == name}
        if not copies & (loaded | headers.keys()):  # transformers would fill it with random numbers
            raise SourceError(f"{folder}: no tensor {name}, which {type(model).__name__} needs; {COPY}")
        if name in headers and headers[name].shape != tuple(parameter.shape):
            raise SourceError(
                f"{headers[name].file}: {name}: shape {headers[name].shape}, config.json says {tuple(parameter.shape)}"
            )


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
