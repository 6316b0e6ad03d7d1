"""How fast are dense, svd and pivga served, each behind its own `vllm serve`, side by side?

    python -m benchmarks.speed.load_test wide --remove 0.4     # a shape of benchmarks/shapes.py, dummy weights
    python -m benchmarks.speed.load_test llama-3.1-8b --concurrent 1 16 64 256 --serve="--gpu-memory-utilization 0.3"
    python -m benchmarks.speed.load_test wide --remove 0.4 --weights int8      # all three in int8
    python -m benchmarks.speed.load_test DENSE SVD PIVGA       # three checkpoints

All three servers are up at once and asked in turn by `vllm bench serve`, case by case and repetition by repetition, so
that a noisy minute hits all of them; figures are medians, ratios are to dense in the same repetition. It is checked
that each server holds just the numbers that its ranks say. All are served in the type that the machine is fast at,
unless --serve gives another --dtype. With --offline, `vllm bench throughput` and `latency` come first, an engine at a
time. With --weights dense is a checkpoint of compressed-tensors; give --serve="--dtype bfloat16" then, which all of
vLLM's kernels for few bits take. Results: benchmarks/results/load-NAME-REMOVE.json, with -WEIGHTS at the end if need
be, from which `make results` writes docs/results.md.
"""

import argparse
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, redirect_stdout, suppress
from math import prod
from pathlib import Path
from typing import get_args

import psutil
import torch
from transformers import AutoConfig

from benchmarks.records import command_line, new_record, vllm_versions, write_record
from benchmarks.shapes import FORMS, SHAPES, write_folder
from fermisvd.files import read_headers
from fermisvd.precision import multiplies_bfloat16
from fermisvd.schemes import Weights
from fermisvd_convert.source import TORCH_TYPES
from tests.support import DEMO_MODEL
from tests.support.server import VLLM, Server, serve

HELD = re.compile(r"FermiSVD: .* holds ([\d,]+) numbers")
WEIGHT_MEMORY = re.compile(r"Model loading took ([\d.]+) GiB")  # said on a GPU
KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
OUTPUTS = 64  # tokens of an answer
RATE = "of dense's saturation"  # ends the names of cases of a request rate
FIGURES = (
    "output_throughput",
    "total_token_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "duration",
)


def cases(concurrent: list[int], prefill: int, each: int, decode_only: bool) -> dict[str, list[str]]:
    """Options of `vllm bench serve` by case. each: requests a client sends one after the other."""

    def options(inputs: int, outputs: int, clients: int, requests: int, *more: str) -> list[str]:
        lengths = ["--random-input-len", str(inputs), "--random-output-len", str(outputs)]
        return [*lengths, "--max-concurrency", str(clients), "--num-prompts", str(requests), *more]

    found = {f"decode, {n} concurrent": options(16, OUTPUTS, n, each * n) for n in concurrent}
    if decode_only:
        return found
    found[f"prefill of {prefill}"] = options(prefill, 1, 4, 4 * each)
    found["mixed, 16 concurrent"] = options(256, OUTPUTS, 16, 16 * each, "--random-range-ratio", "0.5")
    return found


def offline(folder: Path, options: list[str], scratch: Path) -> dict[str, dict[str, float]]:
    """`vllm bench throughput` and `latency` of one model, engines of their own: case -> figures."""
    inputs, outputs, prompts, batch = 64, 64, 64, 16
    common = ["--model", str(folder), "--tokenizer", str(DEMO_MODEL), *options, "--output-json"]
    dataset = ["--dataset-name", "random", "--random-input-len", str(inputs), "--random-output-len", str(outputs)]
    latency = ["--input-len", str(inputs), "--output-len", str(outputs), "--batch-size", str(batch)]
    latency += ["--num-iters-warmup", "2", "--num-iters", "5"]
    found = []
    for name, more in ("throughput", [*dataset, "--num-prompts", str(prompts)]), ("latency", latency):
        result = scratch / f"{name}.json"
        quietly([*VLLM, "bench", name, *common, str(result), *more])
        found.append(json.loads(result.read_text()))
    whole, batched = found
    seconds = batched["percentiles"]["50"]
    return {
        f"offline throughput, {prompts} prompts": {"total_token_throughput": whole["tokens_per_second"]},
        f"offline latency, {batch} at once": {
            "total_token_throughput": batch * (inputs + outputs) / seconds,
            "median_seconds": seconds,
            "p99_seconds": batched["percentiles"]["99"],
        },
    }


def quietly(command: list[str]) -> None:
    """Raises SystemExit with the end of what it printed if it fails."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {run.returncode}:\n{(run.stdout + run.stderr)[-3000:]}")


def ask(server: Server, folder: Path, options: list[str], seed: int, scratch: Path) -> dict[str, float]:
    """One run of `vllm bench serve`, after a warm-up. Raises SystemExit if a request failed.

    It runs in this process: its imports take longer than some of the runs, on the cores that the servers need.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = ["--base-url", server.address, "--model", str(folder), "--dataset-name", "random"]
    given += ["--tokenizer", str(DEMO_MODEL), "--ignore-eos", "--temperature", "0", "--seed", str(seed)]
    given += ["--num-warmups", "2", "--disable-tqdm", "--save-result", "--result-dir", str(scratch)]
    given += ["--result-filename", "result.json", "--percentile-metrics", "ttft,tpot", *options]
    with redirect_stdout(io.StringIO()):
        main(parser.parse_args(given) or argparse.Namespace())
    found = json.loads((scratch / "result.json").read_text())
    if found.get("failed"):
        raise SystemExit(f"{folder.name}: {found['failed']} requests failed")
    return {name: found[name] for name in FIGURES}


def keep_apart(servers: Iterable[Server]) -> bool:
    """Where workers are processes of their own, as on a CPU, the engine core spins while it waits for them, and where
    cores are few it took the turns of server and client for seconds: it comes last from here on, and all but the
    workers keep off the workers' cores. Returns whether there were such workers, and cores beside theirs."""
    if sys.platform != "linux":
        return False
    started = [psutil.Process(server.process.pid) for server in servers]
    processes = [psutil.Process(), *started, *(child for one in started for child in one.children(recursive=True))]
    workers = [process for process in processes if process.name().startswith("VLLM::Worker")]
    allowed = os.sched_getaffinity(0)
    pinned = [os.sched_getaffinity(thread.id) for worker in workers for thread in worker.threads()]
    free = allowed.difference(*(cores for cores in pinned if cores < allowed))
    if not free or free == allowed:
        return False
    others = {
        thread.id: process.name() for process in processes if process not in workers for thread in process.threads()
    }
    for thread, name in others.items():
        with suppress(ProcessLookupError):  # ended meanwhile
            os.sched_setaffinity(thread, free)
            if name.startswith("VLLM::EngineCor"):
                os.setpriority(os.PRIO_PROCESS, thread, 19)
    return True


def number_in(log: Path, pattern: re.Pattern) -> int | None:
    found = pattern.search(log.read_text())
    return int(found[1].replace(",", "")) if found else None


def weight_memory(folder: Path, log: Path, about: dict, item: int, of_layers: float) -> dict[str, int | str]:
    """What vLLM says that the weights take; where it says nothing, as on a CPU, what files or shape make of them.
    item, of_layers: bytes of a number as it is served, and of one of the layers; scales are not counted."""
    if said := WEIGHT_MEMORY.search(log.read_text()):
        return {"weight_bytes": int(float(said[1]) * 2**30), "weights_from": "measured by vLLM"}
    if files := sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        return {"weight_bytes": files, "weights_from": "of the files"}
    size = of_layers * about["layers"] + item * 2 * about["head"]  # embedding and head are of one size
    return {"weight_bytes": int(size), "weights_from": "computed"}


def numbers_of(folder: Path) -> dict[str, int]:
    """What every token is multiplied by in a checkpoint, as `shapes.write_folder` has it: `layers`, all matrices but
    embedding, head and permutations, and `head`. The model has no learned positions."""
    config = AutoConfig.from_pretrained(folder)
    head = config.vocab_size * config.hidden_size
    stored = [info.shape for info in read_headers(folder).values() if info.dtype in TORCH_TYPES]
    matrices = sum(prod(shape) for shape in stored if len(shape) == 2)
    return {"layers": matrices - head * (1 if config.tie_word_embeddings else 2), "head": head}


def check_held(form: str, log: Path, layers: int | None) -> int | None:
    """What the plugin says it holds. Raises SystemExit for a low-rank model served dense, or the other way round."""
    held = number_in(log, HELD)
    if (held is None) != (form == "dense") or (None not in (held, layers) and held != layers):
        raise SystemExit(f"{form}: the server holds {held} low-rank numbers, its ranks say {layers}; see {log}")
    return held


def measure(arguments: argparse.Namespace) -> None:
    """Asks all three servers all cases; the record is written after each repetition."""
    record = new_record(command_line(), vars(arguments))
    record["versions"] |= vllm_versions()
    # its default of 5 s is shorter than the client's: connections were reset while a run was under way
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "600")
    record["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("VLLM_CPU", "VLLM_HTTP"))}
    name, serve_options = arguments.model[0], shlex.split(arguments.serve)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders, about, servers = {}, {}, {}
        for form in FORMS:
            if len(arguments.model) == 3:
                folders[form] = Path(arguments.model[FORMS.index(form)])
                name, about[form] = folders["dense"].name, dict(numbers_of(folders[form]))
            else:
                folders[form] = scratch / form
                about[form] = dict(write_folder(folders[form], name, form, arguments.remove, arguments.weights))
        if len(arguments.model) == 1:
            serve_options = ["--load-format", "dummy", *serve_options]
        if "--dtype" not in arguments.serve:
            serve_options = ["--dtype", fast_type(), *serve_options]
        print("served with", shlex.join(serve_options), flush=True)
        serve_options = ["--no-enable-prefix-caching", *serve_options]  # the same prompts are asked again
        record["serve_options"] = serve_options
        stream_options = ["--stream-interval", str(arguments.stream_interval)]
        runs: dict[str, list[dict]] = {}
        for repeat in range(arguments.offline):
            for form in FORMS:
                for case, figures in offline(folders[form], serve_options, scratch).items():
                    runs.setdefault(case, []).append({"form": form, "repeat": repeat, **figures})
                    print(repeat, case, form, f"{figures['total_token_throughput']:.1f} tokens/s", flush=True)
        for form in FORMS:
            log, begin = scratch / f"{form}.log", time.perf_counter()
            servers[form] = stack.enter_context(serve(folders[form], log, *serve_options, *stream_options, limit=900))
            about[form]["start_seconds"] = round(time.perf_counter() - begin, 1)
            expected = about[form]["layers"] if len(arguments.model) == 1 else None  # of folders some may be dense
            about[form]["low_rank_numbers"] = check_held(form, log, expected)
            about[form]["kv_cache_tokens"] = number_in(log, KV_TOKENS)
            item = 4 if "float32" in serve_options else 2
            of_layers = {"auto": item, "int4": 0.5}.get(arguments.weights, 1)
            about[form] |= weight_memory(folders[form], log, about[form], item, of_layers)
            print(form, about[form], flush=True)
        record["kept_apart"] = keep_apart(servers.values())  # all are up: those started later would inherit the cores
        todo = cases(arguments.concurrent, arguments.prefill, arguments.requests, arguments.decode_only)
        title = f"load-{name}" if len(arguments.model) == 3 else f"load-{name}-{arguments.remove}"
        title += "" if arguments.weights == "auto" else f"-{arguments.weights}"
        record |= {"models": about, "runs": runs}
        latest: dict[tuple[str, str], dict] = {}
        for repeat in range(-1, arguments.repeats):  # the first round warms up: compiles, prepacks, fills caches
            for case, options in todo.items():
                for form in FORMS if repeat % 2 else reversed(FORMS):
                    figures = ask(servers[form], folders[form], options, max(repeat, 0), scratch)
                    if repeat >= 0:
                        runs.setdefault(case, []).append({"form": form, "repeat": repeat, **figures})
                        print(repeat, case, form, f"{figures['output_throughput']:.1f} tokens/s", flush=True)
                    latest[case, form] = figures
            if repeat == -1:  # now it is known what dense can do
                busiest = latest[f"decode, {max(arguments.concurrent)} concurrent", "dense"]
                todo |= rates(arguments, busiest["output_throughput"] / OUTPUTS)
            else:
                write_record(title, record)


def fast_type() -> str:
    """That this machine serves fast: float32 on a CPU without instructions for bfloat16. Those of AVX-512 will do,
    since decoding reads weights more than it multiplies."""
    return "bfloat16" if torch.cuda.is_available() or multiplies_bfloat16() else "float32"


def rates(arguments: argparse.Namespace, saturation: float) -> dict[str, list[str]]:
    """Cases by request rate, in shares of the rate at which dense is saturated."""
    found = {}
    for share in arguments.rates:
        options = ["--random-input-len", "16", "--random-output-len", str(OUTPUTS)]
        options += ["--request-rate", f"{share * saturation:.3f}", "--num-prompts", str(arguments.rate_prompts)]
        found[f"{share:.0%} {RATE}"] = options
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="*", help=f"one of {', '.join(SHAPES)}, or three folders: dense, svd, pivga")
    parser.add_argument("--remove", type=float, default=0.4)
    parser.add_argument("--weights", choices=get_args(Weights), default="auto")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=2, help="requests of each client")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="request rates, in dense's saturations")
    parser.add_argument("--rate-prompts", type=int, default=64)
    parser.add_argument("--decode-only", action="store_true", help="leave prefill and mixed out")
    parser.add_argument("--offline", type=int, default=0, help="rounds of vllm bench throughput and latency")
    # a streamed token costs server and client most of a millisecond: on two cores that is what would be measured
    parser.add_argument("--stream-interval", type=int, default=16, help="tokens of an answer sent at once")
    parser.add_argument("--serve", default="", help="further options of vllm serve")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the servers are stopped, too
    shape = len(arguments.model) == 1 and arguments.model[0] in SHAPES
    if not shape and len(arguments.model) != 3:
        parser.error(f"give one of {', '.join(SHAPES)}, or three folders")
    for folder in () if shape else arguments.model:
        if not Path(folder, "config.json").is_file():
            parser.error(f"{folder}: no config.json there")
    if arguments.weights != "auto" and not shape:
        parser.error("--weights: of a shape; checkpoints have theirs")
    if "tensor-parallel" in arguments.serve:
        parser.error("what a server holds is checked for one rank only: no tensor parallelism here")
    measure(arguments)
