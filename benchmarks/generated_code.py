"""The kernels that inductor makes of residual, norm and a PivGa layer: does the permutation get one of its own?

    python benchmarks/generated_code.py            # C++, for this CPU
    python benchmarks/generated_code.py --triton   # for a GPU; generated without one, not compiled

Prints the calls of the compiled graph in order, and writes all of the code to the file named with --out.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config as inductor
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import linear

import fermisvd_vllm.kernels  # noqa: F401  defines the ops
from fermisvd_vllm.linear import loaded, put

WIDTH, RANK, TOKENS = 2048, 1024, 8


def norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's RMSNorm with residual, as its own torch code has it."""
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (total * scale).to(x.dtype) * weight, total.to(x.dtype)


def cases() -> dict[str, Callable]:
    """What is compiled: (x, residual) -> outputs. Before and after stand plain products."""
    order = torch.randperm(WIDTH)
    places = [torch.randperm(WIDTH) for _ in range(2)]
    weight = torch.ones(WIDTH, dtype=torch.bfloat16)
    d = [random(RANK, WIDTH - RANK) for _ in range(2)]
    before, skeleton, second, after = random(WIDTH, WIDTH), random(RANK, WIDTH), random(64, RANK), random(64, WIDTH)

    def columns(groups: int) -> Callable:
        def call(x: torch.Tensor, residual: torch.Tensor) -> tuple:
            x, total = norm(linear(x, before), residual, weight)
            s = [torch.empty_like(x) for _ in range(groups)]
            for own, index in zip(s, places, strict=False):
                put(own, index, x)
            torch.ops.fermisvd.pivga_columns(s, d[:groups], 0)
            return *(linear(own[:, :RANK], second) for own in s), total

        return call

    def rows(stored: bool) -> Callable:
        def call(x: torch.Tensor, residual: torch.Tensor) -> tuple:
            z = linear(x, skeleton)
            p = linear(z, d[0].T)
            if stored:
                y = torch.empty_like(residual)
                put(y, order[:RANK], z)
                put(y, order[RANK:], p)
            else:
                y = loaded(z, p, order)
            x, total = norm(y, residual, weight)
            return linear(x, after), total

        return call

    found = {f"norm, columns of {n} group(s)": columns(n) for n in (1, 2)}
    return found | {"rows, norm, stored in order": rows(True), "rows, norm, loaded in order": rows(False)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


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


def generate(call: Callable, triton: bool) -> str:
    operands = random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    compiled = torch.compile(call, dynamic=True, fullgraph=True)
    if not triton:
        return run_and_get_code(compiled, *operands)[1][0]
    import triton as compiler
    from torch._inductor.exc import InductorError

    if not torch.cuda.is_available():
        compiler.runtime.driver.set_active(NoGpu())  # for good: there is none to go back to
    found, failed, codegen = [], None, GraphLowering.codegen

    def keep(graph: GraphLowering):
        code = codegen(graph)
        found.append(code[0].value)
        return code

    GraphLowering.codegen = keep
    try:
        with inductor.patch(cpu_backend="triton"):
            compiled(*operands)
    except InductorError as error:  # there is no GPU to compile it for
        failed = error
    finally:
        GraphLowering.codegen = codegen
    if not found:
        raise SystemExit(f"no code was generated: {failed}")
    return found[0]


def calls_in(code: str) -> list[str]:
    """Names of what the compiled graph calls, in order."""
    body = code[code.index("def call(") :]
    return re.findall(r"^\s+((?:cpp_fused|triton_|extern_kernels|torch\.ops)[\w.]*)\(", body, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--triton", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    whole = ""
    for name, call in cases().items():
        torch._dynamo.reset()
        code = generate(call, arguments.triton)
        print(f"{name}:", *calls_in(code), sep="\n    ", end="\n\n", flush=True)
        whole += f"# {name}\n{code}\n"
    if arguments.out:
        arguments.out.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
