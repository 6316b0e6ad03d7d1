"""Does the memory of a conversion's streamed steps grow with the number of layers?

    python -m benchmarks.cost.depth --layers 4 16 64

Random models of equal decoder blocks. Calibration, decomposition, writing and both evaluations, ranks uniform and no
healing (FermiGrad, --groups auto, refit and healing hold whole models). Each depth in processes of its own: peak of the
anonymous resident set over what it is before, imports and a first conversion done; and bytes of live tensors. The bound
is two blocks' weights in float32 and the largest Gram matrix. Results: benchmarks/results/depth.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cost.memory import LiveBytes
from benchmarks.records import new_record, write_record
from fermisvd_convert.convert import convert
from tests.support import DEMO_MODEL, ROOT

SETTINGS = {"ranks": "uniform", "groups": "joint", "heal_steps": 0, "refit": False}
SETTINGS |= {"samples": 16, "gradient_samples": 16, "sequence_length": 64, "batch_size": 2}
HIDDEN, INTERMEDIATE = 768, 2048


def equal_blocks(folder: Path, layers: int) -> Path:
    """A random bfloat16 Llama whose decoder blocks are all of one size, with the demo's tokenizer."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=3,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="100MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    return folder


class AnonymousPeak(threading.Thread):
    """Samples the anonymous resident set every 5 ms: mapped files can be dropped at any time, they are not counted."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.peak = self.read()
        self.stopped = threading.Event()

    @staticmethod
    def read() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.peak = max(self.peak, self.read())


def peaks(model: Path, small: Path, scratch: Path, kind: str) -> dict:
    """Runs in a process of its own. small: the model of the first conversion."""

    def run(which: Path, name: str) -> None:
        text, work = str(which / "text.txt"), scratch / f"{name}-work"
        convert(str(which), scratch / name, 0.3, work=work, calibration=[text], **SETTINGS)

    if kind == "live":
        with LiveBytes() as live:
            run(model, "live")
        return {"live_tensor_bytes": live.peak}
    run(small, "small")
    anonymous = AnonymousPeak()
    anonymous.start()
    run(model, "resident")
    anonymous.stopped.set()
    seconds = json.loads((scratch / "resident" / "timing.json").read_text())
    return {"resident_growth_bytes": anonymous.peak - anonymous.before, "seconds": seconds}


def in_own_process(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost.depth", "--peaks", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--peaks", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peaks:
        model, small, scratch, kind = arguments.peaks
        print(json.dumps(peaks(Path(model), Path(small), Path(scratch), kind)))
        sys.exit()
    block = 4 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
    bound = 2 * block + 8 * INTERMEDIATE**2
    settings = {**SETTINGS, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    record = new_record(f"python -m benchmarks.cost.depth --layers {' '.join(map(str, arguments.layers))}", settings)
    record |= {"two_blocks_and_largest_gram_bytes": bound, "depths": {}}
    print(f"two blocks and the largest Gram matrix: {bound / 2**20:.0f} MiB")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            model = equal_blocks(Path(scratch) / "model", layers)
            small = equal_blocks(Path(scratch) / "small", 2)
            found = {"float32_bytes": 4 * sum(p.numel() for p in LlamaForCausalLM.from_pretrained(model).parameters())}
            for kind in ("resident", "live"):
                (Path(scratch) / kind).mkdir()
                found |= in_own_process(str(model), str(small), str(Path(scratch) / kind), kind)
        record["depths"][layers] = found
        sizes = {name: f"{value / 2**20:.0f} MiB" for name, value in found.items() if name.endswith("bytes")}
        print(f"{layers} layers:", sizes, found["seconds"], flush=True)
        write_record("depth", record)
