"""The Triton kernels, under Triton's interpreter where there is no GPU, against products in float64."""

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.9's interpreter multiplies bfloat16's bits as integers
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CASES = [(1, 5, 96), (7, 33, 96), (17, 64, 200), (70, 20, 130), (16, 96, 97), (3, 1, 40)]  # tokens, rank, width


def tensors(tokens, rank, width, dtype, side):
    generator = torch.Generator().manual_seed(tokens * 1000 + rank)
    x = torch.randn(tokens, width if side == "columns" else rank, generator=generator).to(dtype)
    shape = (rank, width - rank) if side == "columns" else (width - rank, rank)
    order = torch.randperm(width, generator=generator)
    permutation = torch.cat([order[:rank].sort().values, order[rank:].sort().values])
    d = torch.randn(*shape, generator=generator).to(dtype)
    return x.to(DEVICE), d.to(DEVICE), permutation.to(DEVICE)


def columns_in_float64(x, d, permutation):
    full = x.new_zeros(len(permutation), len(d), dtype=torch.float64)  # [I | D] P^T, transposed
    full[permutation] = torch.cat([torch.eye(len(d)).to(full), d.double()], dim=1).T
    return x.double() @ full


def rows_in_float64(z, d, permutation):
    full = z.new_zeros(len(permutation), d.shape[1], dtype=torch.float64)  # P [I ; D]
    full[permutation] = torch.cat([torch.eye(d.shape[1]).to(full), d.double()])
    return z.double() @ full.T


def check(found, expected, dtype, inner):
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * inner**0.5 * 4
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rank", "width"), CASES)
@pytest.mark.parametrize("way", ["kernel", "reference"])
def test_columns(kernels, way, tokens, rank, width, dtype):
    arguments = tensors(tokens, rank, width, dtype, "columns")
    found = getattr(kernels, f"columns_{way}")(*arguments)
    check(found, columns_in_float64(*arguments), dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rank", "width"), CASES)
@pytest.mark.parametrize("way", ["kernel", "reference"])
def test_rows(kernels, way, tokens, rank, width, dtype):
    arguments = tensors(tokens, rank, width, dtype, "rows")
    found = getattr(kernels, f"rows_{way}")(*arguments)
    check(found, rows_in_float64(*arguments), dtype, rank)


def test_rows_of_a_wider_tensor(kernels):
    """As a slice of a fused product: rows further apart than they are long."""
    x, d, permutation = tensors(9, 20, 60, torch.float32, "columns")
    wide = x.new_full((9, 100), torch.nan)
    wide[:, :60] = x
    found = kernels.columns_kernel(wide[:, :60], d, permutation)
    check(found, columns_in_float64(x, d, permutation), torch.float32, 60)


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("most_tokens", [0, 8])
def test_op(kernels, side, most_tokens):
    """One op for any number of tokens, which traces without a graph break for all of them."""
    op = getattr(kernels, f"pivga_{side}")
    x, d, permutation = tensors(8, 20, 60, torch.float32, side)
    reference = columns_in_float64 if side == "columns" else rows_in_float64
    torch.library.opcheck(op, (x, d, permutation, most_tokens))
    traced = torch.compile(lambda v: op(v, d, permutation, most_tokens), backend="eager", fullgraph=True, dynamic=True)
    for tokens in (8, 4, 2):
        check(traced(x[:tokens]), reference(x[:tokens], d, permutation), torch.float32, 60)
    stacked = op(x.view(2, 4, -1), d, permutation, most_tokens)
    check(stacked.flatten(0, 1), reference(x, d, permutation), torch.float32, 60)
