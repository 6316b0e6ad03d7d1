"""Does the permutation of a PivGa layer get a kernel of its own from inductor, beside residual and norm?

    python -m benchmarks.speed.generated_code          # C++, for this CPU, where a layer is one op
    python -m benchmarks.speed.generated_code --gpu    # Triton, layers as on a GPU; made without one, not compiled

Prints what the compiled graph calls, in order, and writes all of the code to the file named with --out.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code

from benchmarks.shapes import SHAPES, groups_of
from benchmarks.speed.layers import make_layer, one_by_one, one_process
from fermisvd_vllm.kernels import columns, outputs  # noqa: F401  defines the ops
from fermisvd_vllm.tuning import OwnOps

SHAPE = {**SHAPES["wide"], "num_hidden_layers": 1}
RANK, TOKENS = 512, 8


def norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's RMSNorm with residual, as its own torch code has it."""
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (total * scale).to(x.dtype) * weight, total.to(x.dtype)


def cases(own_ops: OwnOps) -> dict[str, Callable]:
    """What is compiled: (x, residual) -> outputs. Real layers of vLLM, a plain product before or after them."""
    qkv, o, *_ = groups_of(SHAPE)
    joint = make_layer(qkv, "pivga", [(qkv, RANK)], SHAPE, own_ops)
    separate = make_layer(qkv, "pivga", [(part, RANK // 2) for part in one_by_one(qkv)], SHAPE, own_ops)
    rows: Any = make_layer(o, "pivga", [(o, RANK)], SHAPE, own_ops)
    weight = torch.ones(SHAPE["hidden_size"], dtype=torch.bfloat16)
    product = nn.Linear(SHAPE["hidden_size"], SHAPE["hidden_size"], bias=False, dtype=torch.bfloat16)

    def before(layer: Any) -> Callable:  # a linear layer of vLLM
        def call(x: torch.Tensor, residual: torch.Tensor) -> tuple:
            x, total = norm(product(x), residual, weight)
            return layer.quant_method.apply(layer, x), total

        return call

    def after(x: torch.Tensor, residual: torch.Tensor) -> tuple:
        x, total = norm(rows.quant_method.apply(rows, x), residual, weight)
        return product(x), total

    return {
        "norm, columns of one group": before(joint),
        "norm, columns of three": before(separate),
        "rows, norm": after,
    }


class NoGpu:
    """Stands for a Triton driver: code is generated for an H100, and compiling it fails afterwards."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu


def generate(call: Callable, gpu: bool) -> str:
    """Code of the compiled graph."""
    operands = [torch.randn(TOKENS, SHAPE["hidden_size"], dtype=torch.bfloat16) for _ in range(2)]
    compiled = torch.compile(call, dynamic=True, fullgraph=True)
    if not gpu:
        return run_and_get_code(compiled, *operands)[1][0]
    import triton
    from torch._inductor.exc import InductorError

    triton.runtime.driver.set_active(NoGpu())  # pyright: ignore[reportArgumentType]: what inductor asks of a driver
    found, failed, codegen = [], None, GraphLowering.codegen

    def keep(graph: GraphLowering):
        code = codegen(graph)
        found.append(code[0].value)
        return code

    GraphLowering.codegen = keep  # pyright: ignore[reportAttributeAccessIssue]: its own, and what it gave is kept
    try:
        with inductor.patch(cpu_backend="triton"):
            compiled(*operands)
    except InductorError as error:  # it cannot be compiled for the GPU that is not there
        failed = error
    finally:
        GraphLowering.codegen = codegen
    if not found:
        raise SystemExit(f"no code was generated: {failed}")
    return found[0]


def calls_in(code: str) -> list[str]:
    """Names of what the compiled graph calls, in order."""
    body = code[code.index("def call(") :]
    return re.findall(r"^\s+(?:\w+ = )?((?:cpp_fused|triton_|extern_kernels|torch\.ops)[\w.]*)\(", body, re.MULTILINE)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("this shows what is generated where there is no GPU; TORCH_LOGS=output_code shows the rest")
    own_ops = OwnOps(frozenset({"cpu"}), lambda *_: None) if arguments.gpu else OwnOps()
    whole = ""
    with one_process():
        for name, call in cases(own_ops).items():
            torch._dynamo.reset()
            code = generate(call, arguments.gpu)
            print(f"{name}:", *calls_in(code), sep="\n    ", end="\n\n", flush=True)
            whole += f"# {name}\n{code}\n"
    if arguments.out:
        arguments.out.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
