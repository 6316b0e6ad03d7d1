"""The dense model that is converted: where it is, what its files hold, how it is loaded."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fermisvd.errors import FormatError, explained, reason
from fermisvd.files import COPY, TensorInfo, check_name, is_lfs_pointer, read_headers
from fermisvd.format import quantization_method
from fermisvd.groups import LinearGroup, StructureError, check_unshared
from fermisvd.hf import empty_model, vocabulary_of
from fermisvd.precision import Compute, compute_type, width_of
from fermisvd.tensors import ModelTensors, model_tensors
from fermisvd_convert.loading import (
    SourceError,
    context_length,
    load_dense_or_compressed,
    load_tokenizer,
    open_streamed,
)
from fermisvd_convert.progress import bar

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of a hub model never downloaded: other forms of the same weights, and pickles. A .bin file may be a vocabulary.
OTHER_WEIGHTS = ["pytorch_model*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx*"]
MADE_DENSE = "convert a dense copy, made by: fermisvd dequantize MODEL DENSE"
DENSE_COPY = {"fp8": MADE_DENSE, "mxfp4": MADE_DENSE}  # methods of which fermisvd_convert.dequantizing makes one
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "wrapped_model.")  # DDP's, torch.compile's, peft's, LEMS'
SLICE = 2**24  # numbers looked at together


@dataclass(frozen=True)
class Source:
    """A dense model's folder.

    name: what the user called it; revision: the commit of a hub model; config: config.json as it stands; parsed: as
    transformers reads it; headers: the model's tensors, by parameter, or by their own names where several are one
    parameter; left_out: tensors of the files that are no parameters of the model; vocabulary: how many tokens it can
    read; stored_names: of parameters that a checkpoint's files call otherwise, how.
    """

    name: str
    folder: Path
    revision: str | None
    trust_remote_code: bool
    config: dict
    parsed: PretrainedConfig
    headers: dict[str, TensorInfo]
    left_out: tuple[str, ...]
    vocabulary: int
    stored_names: Mapping[str, str]

    def stored_name(self, name: str) -> str:
        """What files call a layer or a parameter, or a factor that lies beside a layer's weight."""
        if name in self.stored_names:
            return self.stored_names[name]
        layer, _, leaf = name.rpartition(".")
        for weight, rest in ((f"{name}.weight", ""), (f"{layer}.weight", f".{leaf}")):
            if weight in self.stored_names:
                return self.stored_names[weight].removesuffix(".weight") + rest
        return name

    @property
    def title(self) -> str:
        """A hub model's id, or the last name of a folder: where it lay says nothing elsewhere."""
        return folder_name(self.name) if Path(self.name).is_dir() else self.name

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped. Raises SourceError if no file holds it."""
        if name not in self.headers:
            raise SourceError(f"{self.folder}: no tensor {name}")
        return self.headers[name].read()

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
                raise _not_dense(info)
        return TORCH_TYPES[self.headers[largest].dtype]

    def check_values(self, cast: torch.dtype | None = None) -> str:
        """Reads all weights once, SLICE numbers at a time; returns a hash of config, weights and, where the model
        brings its own, code: artefacts of another are never used.

        cast: type that they are to be stored in. Raises SourceError naming the tensor that holds NaN, infinity, or a
        value too large for that type.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        with bar("check weights", len(self.headers), "tensor") as shown:
            for file in sorted({info.file for info in self.headers.values()}):
                names = {info.name: name for name, info in self.headers.items() if info.file == file}
                digest.update(_check_file(file, names, cast, shown.advance))
        for file in sorted(self.folder.glob("*.py")) if self.config.get("auto_map") else []:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def context_length(self) -> int | None:
        return context_length(self.parsed)

    def blocks(self) -> int:
        """Number of decoder blocks, 1 where the config does not say."""
        return getattr(self.parsed.get_text_config(), "num_hidden_layers", None) or 1

    def load(self, device: str, dtype: torch.dtype) -> PreTrainedModel:
        """The model in `dtype`, ready for forward passes. Raises SourceError if transformers cannot load it."""
        return load_dense_or_compressed(self.folder, device, dtype, self.trust_remote_code)

    def stream(self, device: str, dtype: torch.dtype, bounded: bool = False) -> PreTrainedModel:
        """As `load`, with one decoder block in memory at a time where the files allow. Raises SourceError if they do
        not and the memory is `bounded`."""
        return open_streamed(self.folder, device, dtype, self.trust_remote_code, bounded)

    def tokenizer(self):
        """Raises SourceError if the folder has none."""
        return load_tokenizer(self.folder, self.trust_remote_code)


def _check_file(
    file: Path, names: Mapping[str, str], cast: torch.dtype | None, on_tensor: Callable[[], object]
) -> bytes:
    """SHA-256 of a safetensors file, whose tensors are checked as their bytes go by; see `Source.check_values`.

    names: of the model's tensors by their names in the file; on_tensor: called behind each of these. By its format a
    file is its header and then the tensors, without gaps, which opening it has checked.
    """
    digest, buffer = hashlib.sha256(), bytearray(8 * SLICE)
    with file.open("rb") as stream:
        size = stream.read(8)
        header = stream.read(int.from_bytes(size, "little"))
        digest.update(size + header)
        tensors = [(name, entry) for name, entry in json.loads(header).items() if name != "__metadata__"]
        for stored, entry in sorted(tensors, key=lambda tensor: tensor[1]["data_offsets"]):
            dtype = TORCH_TYPES.get(entry["dtype"]) if stored in names else None
            begin, end = entry["data_offsets"]
            step = SLICE * (dtype.itemsize if dtype else 8)
            for place in range(begin, end, step):
                data = memoryview(buffer)[: min(step, end - place)]
                stream.readinto(data)
                digest.update(data)
                if dtype:
                    _check_numbers(torch.frombuffer(data, dtype=dtype), f"{file}: {stored}", cast)
            if stored in names:
                on_tensor()
    return digest.digest()


def _check_numbers(numbers: torch.Tensor, where: str, cast: torch.dtype | None) -> None:
    if not numbers.isfinite().all():
        raise SourceError(f"{where}: holds NaN or infinite values; {COPY}, or mend the model")
    if cast is not None and not numbers.to(cast).isfinite().all():
        raise SourceError(f"{where}: holds values too large for --dtype {str(cast).removeprefix('torch.')}")


def _not_dense(info: TensorInfo) -> SourceError:
    return SourceError(
        f"{info.file}: {info.name} is of type {info.dtype}; only dense floating-point models are converted"
    )


def folder_name(folder: str | Path) -> str:
    """The last name of a folder, also of `.`, `..` and `/`."""
    name = Path(folder).name
    return name if name not in ("", "..") else Path(folder).resolve().name or "model"


def load_checked(
    model: str, device: str, compute: Compute, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Path]:
    """A model in the type of its passes and its folder, dense or compressed: all of it checked, as a conversion checks
    its model.

    Raises SourceError or FormatError: transformers would fill what is missing with random numbers, and go on.
    """
    folder, _ = find_folder(model)
    if quantization_method(folder) is None:
        source = open_source(model, trust_remote_code=trust_remote_code)
        source.check_values()
        return source.load(device, compute_type(compute, device, width_of(source.parsed))), folder
    with explained(SourceError, f"{folder}: transformers cannot load it"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = compute_type(compute, device, width_of(config))
    return load_dense_or_compressed(folder, device, dtype, trust_remote_code), folder


def find_folder(model: str, revision: str | None = None, pickles: bool = False) -> tuple[Path, str | None]:
    """The folder of a model, downloaded first if `model` is a hub id, and its commit there. pickles: whether those are
    fetched as well.

    Raises SourceError if it is neither.
    """
    folder = Path(model)
    check_name(folder)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"--revision {revision}: {model} is a folder, only models on the hub have revisions")
        return folder, None
    if folder.exists():
        raise SourceError(f"{model}: a file; MODEL is a Hugging Face model folder or a hub id")
    folder = _download(model, revision, [] if pickles else OTHER_WEIGHTS)
    return folder, folder.name  # snapshots/COMMIT


def open_source(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """A folder, or a hub id that is downloaded first; its config and its files' headers are checked, no weight is read
    but those that are tied to others.

    Raises SourceError or FormatError naming what is wrong with it.
    """
    folder, commit = find_folder(model, revision)
    config = _read_config(folder, trust_remote_code)
    if commit is not None and constants.HF_HUB_OFFLINE and not any(folder.glob("*.safetensors")):
        raise SourceError(f"{model}: the cache has no safetensors file of it; {offline(model)}")
    pointers = [path for path in sorted(folder.iterdir()) if is_lfs_pointer(path)]
    if pointers:
        raise SourceError(f"{pointers[0]}: a git-lfs pointer, not the file itself; run git lfs pull in its folder")
    try:
        headers = read_headers(folder)
    except FormatError as error:
        if commit is None or not constants.HF_HUB_OFFLINE:
            raise
        raise SourceError(f"{error}; {offline(model)}") from None
    empty, vocabulary = _empty_model(folder, config, trust_remote_code)
    try:
        check_unshared(empty)
    except StructureError as error:
        raise SourceError(f"{folder}: {error}") from None
    found = model_tensors(empty, headers)
    check_tensors(folder, empty, found)
    return Source(
        model,
        folder,
        commit,
        trust_remote_code,
        config,
        empty.config,
        found.own,
        tuple(found.left_out),
        vocabulary,
        found.stored_names,
    )


def check_tensors(folder: Path, empty: PreTrainedModel, found: ModelTensors) -> None:
    """Raises SourceError unless the files have every parameter of the model, in its shape and a dense type."""
    name = type(empty).__name__
    if found.missing:  # transformers would fill it with random numbers
        wrappers = [w for w in WRAPPERS if any(tensor.startswith(w) for tensor in found.left_out)]
        if wrappers:
            raise SourceError(
                f"{folder}: the names of its tensors begin with {wrappers[0]}, which a wrapper of the model added; "
                "unwrap it before save_pretrained"
            )
        raise SourceError(
            f"{folder}: no tensor {found.missing[0]}, which {name} needs; config.json and weights are not of one "
            f"model, or not whole: {COPY}"
        )
    for parameter, tensor in empty.state_dict(keep_vars=True).items():
        stored = found.whole.get(parameter)
        if stored is None:
            continue
        if stored.shape != tuple(tensor.shape):
            raise SourceError(
                f"{stored.file}: {stored.name}: shape {stored.shape}, config.json says {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and stored.dtype not in TORCH_TYPES:
            raise _not_dense(stored)


def _read_config(folder: Path, trust_remote_code: bool) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder}: no config.json; MODEL is a Hugging Face model folder or a hub id")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({reason(error)})") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path}: not a JSON object")
    if method := quantization_method(folder):
        raise SourceError(
            f"{path}: the model is already {method}; {DENSE_COPY.get(method, 'convert the dense original')}"
        )
    if config.get("auto_map") and not trust_remote_code:
        raise SourceError(f"{path}: the model runs code of its own; read it, then pass --trust-remote-code")
    return config


def _empty_model(folder: Path, config: dict, trust_remote_code: bool) -> tuple[PreTrainedModel, int]:
    """The causal language model that config.json describes, without weights, and how many tokens it can read.

    Raises SourceError if it describes none.
    """
    path = folder / "config.json"
    with explained(SourceError, f"{path}: transformers makes no causal language model of it"):
        model = empty_model(folder, trust_remote_code)
        vocabulary = vocabulary_of(model)
    if model.config.is_encoder_decoder:
        raise SourceError(f"{path}: {type(model).__name__} is an encoder with a decoder, no causal language model")
    named = config.get("architectures")
    if named and not config.get("auto_map") and type(model).__name__ not in named:
        # transformers would fill the head of such a model with random numbers, or let an encoder see what comes next
        raise SourceError(f"{path}: {named[0]} is no causal language model; {type(model).__name__} would be one")
    return model, vocabulary


def _download(model: str, revision: str | None, left: list[str]) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(f"{model}: no such folder")
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=left or None))
    except Exception as error:  # of the hub's client, of what it talks through, of the disk
        remedy = f"; {offline(model)}" if constants.HF_HUB_OFFLINE else ""
        raise SourceError(
            f"{model}: neither a folder nor a model on the hub ({type(error).__name__}: {reason(error)}){remedy}"
        ) from None


def offline(model: str) -> str:
    """What to do where the environment keeps the hub's client from asking it."""
    return f"HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it, or fetch the model first: hf download {model}"
