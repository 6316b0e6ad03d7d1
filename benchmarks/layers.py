"""One fused layer at a time: dense, svd and pivga as vLLM runs them, against the floor of bytes and of FLOPs.

    python benchmarks/layers.py --shape llama-3.1-8b --remove 0.2 0.4 0.6          # on a GPU, in CUDA graphs
    python benchmarks/layers.py --shape wide --remove 0.4 --tokens 1 16 64

Floor: max(bytes / bandwidth, FLOPs / peak) of weights, input and output, with bandwidth and peak measured here: a large
copy, a large product. Forms take turns; medians over rounds. Results: benchmarks/results/layers-SHAPE-DEVICE.json.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from load_test import vllm_versions
from records import new_record, write_record
from shapes import FORMS, SHAPES, groups_of, ranks_of
from torch import nn
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from fermisvd.budget import factor_parameters
from fermisvd.format import FermiSVDConfig as CheckpointConfig
from fermisvd.format import Group
from fermisvd.groups import LinearGroup
from fermisvd_vllm.config import FermiSVDConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
ROUNDS = 7
DUMMY = LoadConfig(load_format="dummy")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def make_layer(group: LinearGroup, form: str, rank: int, shape: dict) -> nn.Module:
    """vLLM's layer for one group of a decoder block, random weights, ready to multiply."""
    config = None
    parent, last = group.name.rsplit(".", 1)
    kind = next((fused for fused, members in FUSED.items() if last in members), last)
    if form != "dense":
        entry = Group(members=group.members, form=form, side=group.side if form == "pivga" else None, rank=rank)
        config = FermiSVDConfig.from_config(CheckpointConfig(groups=(entry,)).model_dump(mode="json"))
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


def machine_floor() -> tuple[float, float]:
    """(bytes/s, FLOP/s): read bandwidth of a large sum, peak of a large bf16 product; best of several."""
    size = 2**30 if DEVICE == "cuda" else 2**27
    big = torch.ones(size // 4, device=DEVICE)
    bandwidth = size / min(graphed(lambda: big.sum(), 3)() for _ in range(5))
    side = 8192 if DEVICE == "cuda" else 1536
    square = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    return bandwidth, 2 * side**3 / min(graphed(lambda: square @ square, 3)() for _ in range(5))


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
    print(
        "| removed | layer | rank | tokens | "
        + " | ".join(f"{form} us (of floor)" for form in FORMS)
        + " | pivga / svd |"
    )
    print("|---" * (5 + len(FORMS)) + "|")
    groups = groups_of({**shape, "num_hidden_layers": 1})
    with tempfile.NamedTemporaryFile() as store, set_current_vllm_config(VllmConfig(load_config=DUMMY)):
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "nccl" if DEVICE == "cuda" else "gloo")
        initialize_model_parallel()
        for remove in arguments.remove:
            for group, rank in zip(groups, ranks_of(groups, remove), strict=True):
                layers = {form: make_layer(group, form, rank, shape) for form in FORMS}
                for tokens in arguments.tokens:
                    x = torch.randn(tokens, group.columns, device=DEVICE, dtype=torch.bfloat16)
                    timers = {form: graphed(partial(layers[form], x)) for form in FORMS}
                    for timer in timers.values():
                        timer()
                    seconds = {form: [] for form in FORMS}
                    for _ in range(ROUNDS):
                        for form, timer in timers.items():
                            seconds[form].append(timer())
                    row = {"removed": remove, "layer": group.name, "rank": rank, "tokens": tokens}
                    for form in FORMS:
                        weights = group.dense_parameters
                        if form != "dense":
                            weights = factor_parameters(rank, group.rows, group.columns, form)
                        traffic = 2 * (weights + tokens * (group.columns + group.rows))
                        floor = max(traffic / bandwidth, 2 * weights * tokens / peak)
                        row[form] = {"seconds": statistics.median(seconds[form]), "floor": floor}
                    rows.append(row)
                    cells = [
                        f"{1e6 * row[f]['seconds']:.1f} ({row[f]['seconds'] / row[f]['floor']:.2f})" for f in FORMS
                    ]
                    ratio = row["pivga"]["seconds"] / row["svd"]["seconds"]
                    name = group.name.rsplit(".", 1)[1]
                    print(
                        f"| {remove:.0%} | {name} | {rank} | {tokens} | {' | '.join(cells)} | {ratio:.2f} |", flush=True
                    )
    record = new_record(shlex.join(["python", *sys.argv]), vars(arguments))
    record["versions"] |= vllm_versions()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    record["machine"] |= {"device": device, "bandwidth": bandwidth, "peak": peak}
    write_record(f"layers-{arguments.shape}-{DEVICE}", record | {"rows": rows})


if __name__ == "__main__":
    main()
