"""A pickle's tensors as safetensors, in a process of its own; no code that the pickle names is run.

    python -m fermisvd_convert.pickles MODEL.pt OUT.safetensors

torch's loader of nothing but tensors reads it. Every other class or function that it names, a whole model's among them,
is replaced by one that only keeps what it is given; what looks like a module there gives its parameters and buffers.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fermisvd.errors import FormatError

NESTED = ("model", "state_dict", "model_state_dict", "module")  # under which a model or a state dict may lie


def to_safetensors(file: Path, out: Path) -> None:
    """Raises FormatError for a file without tensors by name."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "fermisvd_convert.pickles", str(file.resolve()), str(out.resolve())],
        capture_output=True,
        text=True,
    )  # -P: nothing is imported from the working directory, which may be the checkpoint's
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"the process ended with {run.returncode}"])[-1]
        raise FormatError(
            f"{file}: no model that torch's loader of tensors can read ({last[:300]}); with the code that wrote it, "
            "save model.state_dict() as safetensors"
        )


class Kept:
    """In the place of what a pickle names: takes whatever it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any):
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update(state)


def named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module that was kept, or of a mapping of tensors, by their names."""
    if isinstance(value, Kept):
        own = vars(value)
        unsaved = own.get("_non_persistent_buffers_set") or ()
        for name, tensor in ((own.get("_parameters") or {}) | (own.get("_buffers") or {})).items():
            if isinstance(tensor, torch.Tensor) and name not in unsaved:
                yield prefix + name, tensor
        for name, module in (own.get("_modules") or {}).items():
            yield from named_tensors(module, f"{prefix}{name}.")
    elif isinstance(value, Mapping):
        for name, tensor in value.items():
            if isinstance(tensor, torch.Tensor):
                yield f"{prefix}{name}", tensor


def main(file: str, out: str) -> None:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    stand_ins: list[Any] = [(type("Kept", (Kept,), {}), name) for name in unknown]
    torch.serialization.add_safe_globals(stand_ins)
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping | Kept):
            found = found[name]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors(found):
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than what is stored of it")
        # clones: a pickle may hold one tensor under two names, a safetensors file may not
        tensors[name] = tensor.detach().contiguous().clone()
    if not tensors:
        raise ValueError("no tensors by name in it")
    save_file(tensors, out)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
