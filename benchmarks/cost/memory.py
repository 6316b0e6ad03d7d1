"""How much memory does `fermisvd convert` take at its peak, over the model's own size?

    python -m benchmarks.cost.memory tests/support/stdlib-2m
    python -m benchmarks.cost.memory --random 100    # a random model of 100 M parameters, where weights outweigh

Two peaks: bytes of live tensors, and growth of the resident set over what it is before, imports done. The bound is 3
times the model as loaded (float32 on a CPU) plus the factors of the largest group; what a forward pass of --batch-size
windows needs comes on top, so windows are short here. Healing is left out: it holds teacher, student, gradients and
Adam's moments. The resident set also holds mapped files and heap not given back. Prints; keeps nothing.
"""

import argparse
import json
import platform
import resource
import tempfile
import threading
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from fermisvd import load_model
from fermisvd.groups import find_groups
from fermisvd_convert.convert import convert
from tests.support import DEMO_MODEL


def random_model(folder: Path, millions: int) -> Path:
    """A random bfloat16 Llama of about so many parameters, 8 layers, with the demo's tokenizer."""
    hidden = round((millions * 1e6 / (8 * 11)) ** 0.5 / 64) * 64
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=8,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    return folder


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that torch operations made and that are still alive; `peak` is their maximum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class ResidentPeak(threading.Thread):
    """Samples the resident set every 5 ms; `growth` is the peak over the value at the start, bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = self._read()
        self.stopped = threading.Event()

    @staticmethod
    def _read() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.peak = max(self.peak, self._read())

    @property
    def growth(self) -> int:
        return self.peak - self.start_bytes


def measure(model: Path, scratch: Path) -> dict:
    """Convert at 20 % removed and compare the peaks with the bound."""
    loaded = load_model(model)
    size = sum(p.numel() * 4 for p in loaded.parameters())
    largest = max(4 * g.full_rank * (g.rows + g.columns) for g in find_groups(loaded))
    del loaded
    text = scratch / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    settings = {"samples": 16, "sequence_length": 64, "batch_size": 1, "steps": 4, "heal_steps": 0, "refit": False}
    settings["ask_vllm"] = False
    resident = ResidentPeak()
    resident.start()
    convert(str(model), scratch / "a", 0.2, calibration=[str(text)], work=scratch / "work-a", **settings)
    resident.stopped.set()
    with LiveBytes() as live:
        convert(str(model), scratch / "b", 0.2, calibration=[str(text)], work=scratch / "work-b", **settings)
    bound = 3 * size + largest
    return {
        "model": str(model.name),
        "float32_bytes": size,
        "largest_group_factor_bytes": largest,
        "bound_bytes": bound,
        "peak_live_tensor_bytes": live.peak,
        "live_over_model": round(live.peak / size, 2),
        "resident_growth_bytes": resident.growth,
        "resident_over_model": round(resident.growth / size, 2),
        "settings": settings,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%F"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--random", type=int, metavar="MILLIONS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model(folder / "random", arguments.random) if arguments.random else arguments.model
        print(json.dumps(measure(model, folder), indent=1))
