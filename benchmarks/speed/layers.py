"""How near does one fused layer come to the floor of bytes and FLOPs: dense, svd and pivga, as vLLM runs them?

    python -m benchmarks.speed.layers --shape llama-3.1-8b --remove 0.2 0.4 0.6          # on a GPU, in CUDA graphs
    python -m benchmarks.speed.layers --shape wide --remove 0.4 --tokens 1 16 64

Layers are compiled, as they are served. Fused ones are measured with one group for all members and, to see its price,
with a group for each of them. Floor: max(bytes / bandwidth, FLOPs / peak) of weights, input and output, with bandwidth
and peak measured here: a large sum, a large product. Forms take turns; medians over rounds.
Results: benchmarks/results/layers-SHAPE-DEVICE.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from benchmarks.records import command_line, new_record, vllm_versions, write_record
from benchmarks.shapes import SHAPES, groups_of, ranks_of
from fermisvd.budget import Form, factor_parameters
from fermisvd.format import CheckpointConfig, Group
from fermisvd.groups import LinearGroup
from fermisvd_vllm.config import FermiSVDConfig
from fermisvd_vllm.tuning import OwnOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
ROUNDS = 7
DUMMY = LoadConfig(load_format="dummy")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def variants(group: LinearGroup, remove: float) -> dict[str, list[tuple[LinearGroup, int]]]:
    """What to measure: name, `form` or `form, separate` -> groups and ranks, uniform and equal for both forms."""
    joint = [(group, *ranks_of([group], remove))]
    found = {"dense": [], "svd": joint, "pivga": joint}
    if len(group.members) > 1:
        own = one_by_one(group)
        separate = list(zip(own, ranks_of(own, remove), strict=True))
        found |= {"svd, separate": separate, "pivga, separate": separate}
    return found


def one_by_one(group: LinearGroup) -> list[LinearGroup]:
    """A group for each member."""
    members = zip(group.members, group.member_rows, strict=True)
    return [replace(group, members=(name,), member_rows=(rows,)) for name, rows in members]


def form_of(name: str) -> Form:
    """Of a variant; a dense one has no parts, so its form is of no matter."""
    return "svd" if name.startswith("svd") else "pivga"


def make_layer(
    group: LinearGroup,
    form: Form,
    parts: list[tuple[LinearGroup, int]],
    shape: dict,
    own_ops: OwnOps | None = None,
) -> nn.Module:
    """vLLM's layer for one group of a decoder block, split in parts, with random weights, ready to multiply."""
    config = None
    parent, last = group.name.rsplit(".", 1)
    kind = next((fused for fused, members in FUSED.items() if last in members), last)
    if parts:
        entries = tuple(
            Group(members=part.members, form=form, side=part.side if form == "pivga" else None, rank=rank)
            for part, rank in parts
        )
        config = FermiSVDConfig(CheckpointConfig(groups=entries).model_dump(mode="json"), own_ops)
        config.packed_modules_mapping = FUSED
    options = {"bias": False, "quant_config": config, "prefix": f"{parent}.{kind}", "disable_tp": True}
    options["params_dtype"] = torch.bfloat16
    head = shape["hidden_size"] // shape["num_attention_heads"]
    if kind == "qkv_proj":
        heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        layer = QKVParallelLinear(group.columns, head, *heads, **options)
    elif kind == "gate_up_proj":
        layer = MergedColumnParallelLinear(group.columns, list(group.member_rows), **options)
    else:
        layer = RowParallelLinear(group.columns, group.rows, **options)
    layer = layer.to(DEVICE)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.02)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@contextmanager
def one_process() -> Iterator[None]:
    """What vLLM wants before it builds a layer: a config and process groups, of one process."""
    with tempfile.NamedTemporaryFile() as store, set_current_vllm_config(VllmConfig(load_config=DUMMY)):
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "nccl" if DEVICE == "cuda" else "gloo")
        initialize_model_parallel()
        yield


def graphed(call: Callable[[], object], times: int = 10) -> Callable[[], float]:
    """Seconds of one call, by replaying a CUDA graph of `times` of them; on a CPU by calling that often."""
    if DEVICE == "cpu":

        def seconds() -> float:
            begin = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - begin) / times

        return seconds
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()

    def seconds() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    return seconds


def interleaved(timers: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each, asked in turn after a warm-up."""
    times = [{name: timer() for name, timer in timers.items()} for _ in range(ROUNDS + 1)][1:]
    return {name: statistics.median(row[name] for row in times) for name in timers}


def machine_floor() -> tuple[float, float]:
    """(bytes/s, FLOP/s): read bandwidth of a large sum, peak of a large bf16 product; best of several."""
    size = 2**30 if DEVICE == "cuda" else 2**27
    big = torch.ones(size // 4, device=DEVICE)
    bandwidth = size / min(graphed(lambda: big.sum(), 3)() for _ in range(5))
    side = 8192 if DEVICE == "cuda" else 1536
    square = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    return bandwidth, 2 * side**3 / min(graphed(lambda: square @ square, 3)() for _ in range(5))


def prices(rows: list[dict]) -> list[dict]:
    """What separate groups cost: their time over that of one group, both by parameter."""
    key = ("removed", "layer", "tokens")
    whole = {(*(row[k] for k in key), row["form"]): row["seconds"] / row["parameters"] for row in rows}
    found = []
    for row in rows:
        form, separate, _ = row["form"].partition(", separate")
        if separate:
            price = row["seconds"] / row["parameters"] / whole[(*(row[k] for k in key), form)]
            found.append({k: row[k] for k in key} | {"form": form, "price": price})
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    arguments = parser.parse_args()
    shape, rows = SHAPES[arguments.shape], []
    bandwidth, peak = machine_floor()
    print(f"{bandwidth / 1e9:.1f} GB/s, {peak / 1e12:.2f} TFLOP/s\n")
    print("| removed | layer | form | rank | tokens | us | of the floor | of dense |\n" + "|---" * 8 + "|")
    groups = groups_of({**shape, "num_hidden_layers": 1})
    with one_process():
        for remove in arguments.remove:
            for group in groups:
                chosen = variants(group, remove)
                layers = {name: make_layer(group, form_of(name), p, shape) for name, p in chosen.items()}
                for tokens in arguments.tokens:
                    torch._dynamo.reset()  # one class, many layers
                    x = torch.randn(tokens, group.columns, device=DEVICE, dtype=torch.bfloat16)
                    seconds = interleaved(
                        {
                            name: graphed(partial(torch.compile(layer, fullgraph=True), x))
                            for name, layer in layers.items()
                        }
                    )
                    for name, parts in chosen.items():
                        form = form_of(name)
                        weights = sum(factor_parameters(r, g.rows, g.columns, form) for g, r in parts)
                        weights = weights or group.dense_parameters
                        traffic = 2 * (weights + tokens * (group.columns + group.rows))
                        floor = max(traffic / bandwidth, 2 * weights * tokens / peak)
                        row = {"removed": remove, "layer": group.name.rsplit(".", 1)[1], "form": name}
                        row |= {"ranks": [rank for _, rank in parts], "parameters": weights, "tokens": tokens}
                        rows.append(row | {"seconds": seconds[name], "floor_seconds": floor})
                        cells = [f"{remove:.0%}", row["layer"], name, "+".join(map(str, row["ranks"])), str(tokens)]
                        cells += [f"{1e6 * seconds[name]:.1f}", f"{seconds[name] / floor:.2f}"]
                        print("| " + " | ".join([*cells, f"{seconds[name] / seconds['dense']:.2f}"]) + " |", flush=True)
    print("\nSeparate groups, time a parameter over that of one group:")
    for row in prices(rows):
        print(f"{row['removed']:.0%} {row['layer']} {row['form']}, {row['tokens']} tokens: {row['price']:.2f}")
    record = new_record(command_line(), vars(arguments))
    record["versions"] |= vllm_versions()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    record["machine"] |= {"device": device, "bandwidth": bandwidth, "peak": peak}
    write_record(f"layers-{arguments.shape}-{DEVICE}", record | {"rows": rows, "prices": prices(rows)})


if __name__ == "__main__":
    main()
