"""Which files of a folder are the model, and what their headers say of the tensors in them.

transformers and vLLM choose by rules of their own. `model_files` is the one place that chooses here: what both would
read, and a folder from which they would read different weights is refused, naming both.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fermisvd.errors import FormatError, reason

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
ADAPTER_NAME = "adapter_config.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
PICKLE_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
LFS_START = b"version https://git-lfs"

COPY = "download or copy it again"  # remedies, said in every message
MEND = "convert again or copy the file again"
SAVE = "save the model again, by save_pretrained"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, its name there, and what the file's header says of it; dtype in safetensors' words (F32,
    BF16, I32, ...)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor itself, memory-mapped, in its own type."""
        with safe_open(self.file, framework="pt") as shard:
            return shard.get_tensor(self.name)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # BOOL has none
        return self.numel * (int(bits[0]) if bits else 8) // 8


def model_files(folder: Path) -> list[Path]:
    """The safetensors files that are the model, by name: model.safetensors, or the shards that an index names.

    Raises FormatError naming both where transformers and vLLM would read different weights: an index beside another
    model.safetensors, an adapter's config, a config.json that names other weights; and where there are no weights.
    """
    folder = Path(folder)
    check_name(folder)
    single, index = folder / WEIGHTS_NAME, read_index(folder)
    if (folder / ADAPTER_NAME).is_file():
        raise FormatError(
            f"{folder}: holds {ADAPTER_NAME}, of which from_pretrained makes the adapter's base model instead, where "
            "peft is installed; merge the adapter into its base, save that, and remove the adapter's files"
        )
    elsewhere = _named_weights(folder)
    if elsewhere is not None and elsewhere not in (WEIGHTS_NAME, INDEX_NAME):
        raise FormatError(
            f"{folder / 'config.json'}: transformers_weights names {elsewhere}, which transformers reads and vLLM does "
            f"not; {SAVE}"
        )
    if index:
        named = sorted({folder / name for name in index.values()})
        if single.is_file() and named != [single]:
            raise FormatError(
                f"{folder}: {WEIGHTS_NAME} and {INDEX_NAME} are two sets of weights, transformers reads the one, vLLM "
                "the other; move away the one that is not the model"
            )
        return named
    if single.is_file():
        return [single]
    if single.is_symlink():
        raise FormatError(f"{single}: a link to {single.readlink()}, which is not there; {COPY}")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise FormatError(
            f"{folder}: neither {WEIGHTS_NAME} nor {INDEX_NAME}, only {', '.join(others)}; if the index is missing, "
            f"{COPY}, else {SAVE}"
        )
    if any(is_pickle(path) for path in folder.iterdir()):
        raise FormatError(
            f"{folder}: no safetensors file; pickled weights are never loaded, save the model as safetensors first"
        )
    raise FormatError(f"{folder}: no {WEIGHTS_NAME} and no {INDEX_NAME}; {COPY}")


def _named_weights(folder: Path) -> str | None:
    """The weights file that config.json names itself, which transformers obeys; None if none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("transformers_weights")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # for who reads the config to complain of


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of all tensors in the files that are the model, without reading the data.

    Raises FormatError for a missing or truncated shard, an index that puts a tensor where it is not, and a tensor
    stored twice. A tensor in a shard that the index does not list is there all the same: transformers and vLLM load
    shards whole.
    """
    folder = Path(folder)
    headers: dict[str, TensorInfo] = {}
    for file in model_files(folder):
        if not file.is_file():
            raise FormatError(f"{file}: missing shard, named by {INDEX_NAME}; {COPY}")
        for info in tensors_of(file):
            if info.name in headers:
                raise FormatError(f"{file}: tensor {info.name} is also in {headers[info.name].file.name}; {SAVE}")
            headers[info.name] = info
    for name, file_name in read_index(folder).items():
        if name not in headers or headers[name].file.name != file_name:
            raise FormatError(f"{folder / INDEX_NAME}: says {name} is in {file_name}, which does not hold it; {COPY}")
    return headers


def tensors_of(file: Path) -> Iterator[TensorInfo]:
    """Of one file. Raises FormatError if it is unreadable."""
    try:
        if is_lfs_pointer(file):
            raise FormatError(f"{file}: a git-lfs pointer, not the file itself; run git lfs pull in its folder")
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (a safe_open object does not iterate)
                part = shard.get_slice(name)
                yield TensorInfo(file, name, part.get_dtype(), tuple(part.get_shape()))
    except SafetensorError as error:
        raise FormatError(f"{file}: unreadable or truncated shard ({reason(error)}); {COPY}") from None
    except OSError as error:
        raise FormatError(f"{file}: cannot be read ({reason(error)})") from None


def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file of an index; empty where there is none. Raises FormatError for one that cannot be read."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        if not isinstance(index["metadata"], dict):  # transformers reads it
            raise ValueError("metadata is no object")
        if not weight_map:
            raise ValueError("weight_map is empty")
        if not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            raise ValueError("weight_map names a file outside the folder")
        return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: unreadable index ({reason(error)}); {COPY}") from None


def check_alone(folder: Path, files: Sequence[Path]) -> None:
    """Raises FormatError for weights beside those of a checkpoint that is served: pickles, which are never loaded, and
    further safetensors files, which vLLM would load too, or instead."""
    pickles = sorted(path.name for path in folder.iterdir() if is_pickle(path))
    if pickles:
        raise FormatError(f"{folder}: pickled files are never loaded, remove {', '.join(pickles)}")
    strangers = sorted({path.name for path in folder.glob("*.safetensors")} - {file.name for file in files})
    if strangers:
        raise FormatError(
            f"{folder}: {', '.join(strangers)} beside {files[0].name}: vLLM would load both; remove what is not the "
            "checkpoint's"
        )


def holds_weights(folder: Path) -> bool:
    """Whether there are weights of any kind in a folder, be they the model's or not."""
    return any(path.suffix == ".safetensors" or is_pickle(path) for path in folder.iterdir())


def is_pickle(path: Path) -> bool:
    """Whether a file is pickled: by its name, and a .bin file also by its first bytes: some tokenizers' vocabularies
    are called so."""
    if path.suffix not in PICKLE_SUFFIXES or not path.is_file():
        return False
    if path.suffix != ".bin" or path.name.startswith("pytorch_model"):
        return True
    with path.open("rb") as stream:
        return stream.read(4).startswith(PICKLE_STARTS)


def is_lfs_pointer(path: Path) -> bool:
    """Whether git-lfs' note of a file stands in its place. Raises OSError if it cannot be read."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(LFS_START)) == LFS_START


def check_name(path: Path) -> None:
    """Raises FormatError for a path that is not UTF-8: safetensors and JSON cannot name it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        raise FormatError(f"{shown}: the name is not UTF-8; rename it") from None
