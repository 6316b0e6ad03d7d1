"""What does the default command take for a model of a shape with random weights: seconds, and peaks by stage?

    python -m benchmarks.cost.shaped llama-3.1-8b                     # on a GPU
    python -m benchmarks.cost.shaped llama-3.1-8b --blocks 8          # a quarter of its depth
    python -m benchmarks.cost.shaped small --samples 32 --sequence-length 256 --blocks 4

Peaks are counted ones (fermisvd_convert.memory.needs) and measured ones: on a GPU what torch has allocated, beside it
and on a CPU the growth of the anonymous resident set, after a first conversion of a few small blocks. The text is
Python's standard library, by the demo's tokenizer. Results: benchmarks/results/shaped-SHAPE-BLOCKS-DEVICE.json.
"""

import argparse
import gc
import json
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.records import command_line, new_record, write_record
from benchmarks.shapes import SHAPES
from benchmarks.watching import watch_stages
from fermisvd_convert import convert as program
from fermisvd_convert import preflight
from fermisvd_convert.memory import Need, give_back, needs
from tests.support import DEMO_MODEL

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
FIRST = SMALL | {"num_hidden_layers": 2}


def random_model(folder: Path, shape: dict[str, Any], device: str) -> int:
    """A random bfloat16 Llama with the demo's tokenizer, made on the device; returns its parameters."""
    config = LlamaConfig(**shape, dtype="bfloat16", max_position_embeddings=8192, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="2GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


def write_text(path: Path) -> None:
    """The modules of Python's standard library, joined."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    path.write_text("\n".join(each.read_text(encoding="utf-8", errors="replace") for each in modules), encoding="utf-8")


def first_conversion(folder: Path, text: str, device: str) -> None:
    """So that what libraries keep from their first use on is there before it is measured what a model takes."""
    random_model(folder / "model", FIRST, device)
    few = {"samples": 16, "gradient_samples": 16, "sequence_length": 64, "steps": 2, "heal_steps": 2}
    program.convert(str(folder / "model"), folder / "out", 0.2, calibration=[text], bos=False, **few)
    gc.collect()
    give_back()


def counted(found: dict[str, Need]) -> Callable:
    """What was counted beforehand is put into `found`."""

    def passes_that_fit(size: Any, options: Any, *rest: Any) -> Any:
        passes, limit = fitting(size, options, *rest)
        found.update(needs(size, options, passes, limit))
        print("passes:", passes, flush=True)
        return passes, limit

    return passes_that_fit


fitting = preflight.passes_that_fit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=["small", *SHAPES])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help="further options of convert, as JSON")
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {"small": SMALL, **SHAPES}[arguments.shape]
    shape = shape | {"num_hidden_layers": arguments.blocks or shape["num_hidden_layers"]}
    required: dict[str, Need] = {}
    options = dict(arguments.options)
    if arguments.samples:
        options |= {"samples": arguments.samples, "gradient_samples": arguments.samples}
    if arguments.sequence_length:
        options["sequence_length"] = arguments.sequence_length
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        write_text(folder / "text.txt")
        text = str(folder / "text.txt")
        first_conversion(folder / "first", text, device)
        begin = time.perf_counter()
        parameters = random_model(folder / "model", shape, device)
        if device == "cuda":
            torch.cuda.empty_cache()
        print(f"{parameters:,} parameters made in {time.perf_counter() - begin:.0f} s", flush=True)
        preflight.passes_that_fit = counted(required)
        measured, begin = watch_stages(), time.perf_counter()
        options |= {"calibration": [text], "bos": False, "work": folder / "work"}
        record = program.convert(str(folder / "model"), folder / "out", arguments.remove, **options)
        whole = time.perf_counter() - begin
        work = sum(path.stat().st_size for path in (folder / "work").rglob("*") if path.is_file())
    print("| stage | seconds | device: counted GB | measured | host: counted GB | measured |")
    print("|---|---|---|---|---|---|")
    for name, row in measured.items():
        need = required.get(name, Need(0, 0, ""))
        host = need.host if device == "cuda" else need.host + need.device  # one memory
        cells = [need.device, row.get("device_bytes", 0), host, row["resident_growth_bytes"]]
        print(f"| {name} | {row['seconds']:.1f} | " + " | ".join(f"{value / 1e9:.2f}" for value in cells) + " |")
        row |= {"counted_device_bytes": need.device, "counted_host_bytes": need.host}
    print(f"all: {whole:.0f} s, work directory {work / 1e9:.1f} GB, {record.seconds}")
    results = new_record(command_line(), {"shape": shape, "remove": arguments.remove})
    results |= {"parameters": parameters, "stages": measured, "seconds": whole, "work_directory_bytes": work}
    write_record(f"shaped-{arguments.shape}-{shape['num_hidden_layers']}-{device}", results)


if __name__ == "__main__":
    main()
