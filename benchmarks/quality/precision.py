"""Which steps of a decomposition bear float32, all others being in float64?

    python -m benchmarks.quality.precision

Steps: `accumulation`, x^T x of a batch in float32, summed in float64; `root`, the square root of G or C; `forming`, the
matrix whose eigenbasis is sought; `eigh`; `products`, the factors. Gram matrices of real models, whose inputs are
float32 themselves, and made ones with the spread of a large language model's activations. For every group (kfac
whitening, the converter's damping) and r = k/4, k/2, 3k/4 the loss tr(G E C E^T), E = W - A B, in float64:
`excess` is what it exceeds that of float64 factors by, as a share of it; the largest over groups and ranks is kept, and
`inf` where a step fails. `spread` is the largest over the smallest diagonal entry of C. `damping` is what float64
factors lose by being made with C's damping, as a share of the least possible loss without it.
Results: benchmarks/results/precision.json.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.quality.table import models
from benchmarks.records import new_record, write_record
from fermisvd import load_model
from fermisvd.calibration import calibration_grams
from fermisvd.decomposition import DAMPING, OUTPUT_DAMPING, input_ridge
from fermisvd.groups import find_groups
from fermisvd.linear import linear_layer
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

STEPS = ("accumulation", "root", "forming", "eigh", "products")
COLUMNS = (*STEPS, "damping")
WINDOWS, BATCH = 64, 8
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # W, C, C summed in float32, G


def factors(weight: torch.Tensor, gram: torch.Tensor, g: torch.Tensor, narrow: str) -> tuple[torch.Tensor, ...] | None:
    """A (m x k) and B (k x n) as in fermisvd.decomposition.kfac_svd, with the step `narrow` in float32; None where a
    matrix could not be factorised. gram, g: damped, (n x n) and (m x m)."""

    def step(name: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.float() if name == narrow else t.double() for t in tensors]

    smaller_left = len(weight) <= len(gram)
    (root_of,) = step("root", g if smaller_left else gram)
    root, failed = torch.linalg.cholesky_ex(root_of)
    if failed:
        return None
    w, c, g, s = step("forming", weight, gram, g, root)
    if smaller_left:
        (formed,) = step("eigh", s.T @ (w @ c @ w.T) @ s)
    else:
        (formed,) = step("eigh", s.T @ (w.T @ g @ w) @ s)
    vectors = torch.linalg.eigh(formed)[1].flip(1)
    w, s, v = step("products", weight, root, vectors)
    if smaller_left:
        return torch.linalg.solve_triangular(s.T, v, upper=True), (s @ v).T @ w
    return w @ (s @ v), torch.linalg.solve_triangular(s.T, v, upper=True).T


def loss(weight: torch.Tensor, gram: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    error = weight - a.double() @ b.double()
    return ((g @ error) * (error @ gram)).sum().item()


def damped(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype)


def excess(problem: Problem) -> dict[str, float]:
    """Largest relative excess over the ranks, by step."""
    weight, summed, summed_narrow, g = problem
    gram, g = damped(summed, input_ridge(summed, DAMPING)), damped(g, OUTPUT_DAMPING * g.diagonal().mean().item())
    ranks = [max(1, min(weight.shape) * quarter // 4) for quarter in (1, 2, 3)]

    def losses(found: tuple[torch.Tensor, ...] | None) -> list[float]:
        if found is None:
            return [float("inf")] * len(ranks)
        return [loss(weight, gram, g, found[0][:, :r], found[1][:r]) for r in ranks]

    exact = factors(weight, gram, g, "none")
    assert exact is not None
    best, worst = losses(exact), {}
    for name in STEPS:
        used = damped(summed_narrow, input_ridge(summed_narrow, DAMPING)) if name == "accumulation" else gram
        found = losses(factors(weight, used, g, name))
        worst[name] = max(now / then - 1 for now, then in zip(found, best, strict=True))
    values, vectors = torch.linalg.eigh(summed)
    whitened = torch.linalg.cholesky(g).T @ weight @ (vectors * values.clamp(min=0).sqrt())
    squares = torch.linalg.svdvals(whitened).square()
    undamped = [loss(weight, summed, g, exact[0][:, :r], exact[1][:r]) / squares[r:].sum().item() - 1 for r in ranks]
    return worst | {"damping": max(undamped)}


def summed_products(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum x^T x, products in float64 and in float32. x: inputs (tokens x n), float32."""
    parts = x.split(2048)
    zero = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    return sum((p.double().T @ p.double() for p in parts), zero), sum(((p.T @ p).double() for p in parts), zero)


def keep_input(kept: list[torch.Tensor], _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    kept.append(inputs[0].flatten(0, -2))


def real_problems(path: Path, windows: torch.Tensor) -> Iterator[Problem]:
    """The separate groups of a model."""
    model = load_model(path).requires_grad_(False)
    groups = find_groups(model, "separate")
    inputs: dict[str, list[torch.Tensor]] = {group.source: [] for group in groups}
    hooks = [
        linear_layer(model, name).register_forward_pre_hook(partial(keep_input, kept)) for name, kept in inputs.items()
    ]
    for batch in windows.split(BATCH):
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    grams = {name: summed_products(torch.cat(kept)) for name, kept in inputs.items()}
    outputs = calibration_grams(model, [], [group.name for group in groups], windows.split(BATCH))[1]
    for group in groups:
        weight, output = linear_layer(model, group.name).weight.double(), outputs[group.name]
        if group.rows <= group.columns:
            yield weight, *grams[group.source], output.matrix
        else:  # W^T G W alone is kept: a G (m x m) with that, its pseudo-inverse carried back
            inverse = torch.linalg.pinv(weight)
            yield weight, *grams[group.source], inverse.T @ output.matrix @ inverse


def made_problems(width: int, size: float) -> Iterator[Problem]:
    """Square, wide and tall W (Gaussian). Inputs: variances over four decades, mixed; in one of 256 tokens two channels
    are `size` times the root mean square of the others. Gradients: variances over three decades, mixed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for m, n in ((width, width), (width // 2, width), (width, width // 2)):
        mixing = torch.linalg.qr(normal(n, n))[0] * torch.logspace(0, -2, n, dtype=torch.float64)
        x = normal(32 * n, n) @ mixing.T
        x[::256, [1, n // 2]] = size * x.square().mean().sqrt() * (1 + 0.1 * normal(len(x[::256]), 2))
        gradients = normal(4 * m, m) * torch.logspace(0, -1.5, m, dtype=torch.float64)
        gradients = gradients @ torch.linalg.qr(normal(m, m))[0]
        yield normal(m, n), *summed_products(x.float()), gradients.T @ gradients


def measure(problems: Iterator[Problem]) -> dict[str, float]:
    worst: dict[str, float] = {name: 0.0 for name in COLUMNS}  # noqa: C420  its type
    spread = 0.0
    for problem in problems:
        diagonal = problem[1].diagonal()
        spread = max(spread, (diagonal.max() / diagonal.min()).item())
        worst = {name: max(worst[name], value) for name, value in excess(problem).items()}
    return worst | {"spread": spread}


def main() -> None:
    protocol = {"windows": WINDOWS, "batch": BATCH, "damping": DAMPING, "output_damping": OUTPUT_DAMPING}
    record = new_record("python -m benchmarks.quality.precision", protocol) | {"excess": {}}
    print("| | spread | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * (len(COLUMNS) + 1) + "|")

    def show(name: str, found: dict[str, float]) -> None:
        record["excess"][name] = found
        cells = " | ".join(f"{found[column]:.1e}" for column in COLUMNS)
        print(f"| {name} | {found['spread']:.0e} | {cells} |", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models(Path(scratch)).items():
            tokenizer = load_tokenizer(model["path"])
            texts = [
                windows_of(tokenizer, str(text), 256, WINDOWS // len(model["calibration"]), bos=False)
                for text in model["calibration"]
            ]
            show(name, measure(real_problems(model["path"], torch.cat(texts))))
    for size in (1.0, 1e2, 1e3, 1e4, 3e5):
        show(f"made, 512 wide, massive channels {size:.0e}", measure(made_problems(512, size)))
    write_record("precision", record)


if __name__ == "__main__":
    main()
