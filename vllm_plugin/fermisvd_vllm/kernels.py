"""Triton kernels for few tokens: the small product of a PivGa layer, its gather and its addition in one launch.

    columns: t = x[skel] + x[rest] D^T          the second product, t C_skel^T, is a plain GEMM
    rows:    y = P [z ; z D^T]                  the first product, z = x R_skel^T, is a plain GEMM

So a PivGa layer takes two launches, as an svd layer does, and reads fewer bytes. References: `columns_reference` and
`rows_reference`, which are also what runs where the kernels were measured to be slower (fermisvd_vllm.tuning).
"""

import torch
import triton
import triton.language as tl

MOST_TOKENS = 256


@triton.jit
def _columns_kernel(
    x, d, permutation, t, tokens, rank, rest, x_stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """One tile of t (tokens x r). x: (tokens x n), rows x_stride apart; d: (r x (n - r)); permutation: (n,)."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    row_inside, column_inside = rows < tokens, columns < rank
    x_rows = x + rows[:, None].to(tl.int64) * x_stride
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, rest, BK):
        k = start + tl.arange(0, BK)
        inside = k < rest
        index = tl.load(permutation + rank + k, mask=inside, other=0)
        left = tl.load(x_rows + index[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        d_tile = d + columns[None, :].to(tl.int64) * rest + k[:, None]
        right = tl.load(d_tile, mask=column_inside[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    index = tl.load(permutation + columns, mask=column_inside, other=0)
    tile = row_inside[:, None] & column_inside[None, :]
    total += tl.load(x_rows + index[None, :], mask=tile, other=0.0)
    t_tile = t + rows[:, None].to(tl.int64) * rank + columns[None, :]
    tl.store(t_tile, total.to(t.dtype.element_ty), mask=tile)


@triton.jit
def _rows_kernel(
    z, d, permutation, y, tokens, rank, rest, z_stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """One tile of the products, put where they belong in y (tokens x m); tiles beyond them copy z (tokens x r).

    d: ((m - r) x r); permutation: (m,): row i of [I ; D] is row permutation[i] of y.
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_inside = rows < tokens
    z_rows = z + rows[:, None].to(tl.int64) * z_stride
    y_rows = y + rows[:, None].to(tl.int64) * (rank + rest)
    tile, product_tiles = tl.program_id(0), tl.cdiv(rest, BN)
    if tile < product_tiles:
        columns = tile * BN + tl.arange(0, BN)
        column_inside = columns < rest
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, rank, BK):
            k = start + tl.arange(0, BK)
            inside = k < rank
            left = tl.load(z_rows + k[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
            d_tile = d + columns[None, :].to(tl.int64) * rank + k[:, None]
            right = tl.load(d_tile, mask=column_inside[None, :] & inside[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        index = tl.load(permutation + rank + columns, mask=column_inside, other=0)
        inside = row_inside[:, None] & column_inside[None, :]
        tl.store(y_rows + index[None, :], total.to(y.dtype.element_ty), mask=inside)
    else:
        columns = (tile - product_tiles) * BN + tl.arange(0, BN)
        column_inside = columns < rank
        index = tl.load(permutation + columns, mask=column_inside, other=0)
        inside = row_inside[:, None] & column_inside[None, :]
        tl.store(y_rows + index[None, :], tl.load(z_rows + columns[None, :], mask=inside), mask=inside)


def blocks(tokens: int) -> dict[str, int]:
    """Tile sizes and warps: narrow tiles of D, so that a matrix of a few megabytes keeps every multiprocessor busy."""
    if tokens <= 16:
        return {"BM": 16, "BN": 16, "BK": 256, "num_warps": 4, "num_stages": 3}
    if tokens <= 64:
        return {"BM": 64, "BN": 16, "BK": 128, "num_warps": 4, "num_stages": 4}
    return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}


def columns_reference(x: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """t = x[skel] + x[rest] D^T, the addition inside the GEMM. x: (tokens, n); d: (r, n - r); permutation: (n,)."""
    rank = len(d)
    t = x.index_select(-1, permutation[:rank])
    return t.addmm_(x.index_select(-1, permutation[rank:]), d.T) if d.numel() else t


def rows_reference(z: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """y = P [z ; z D^T]. z: (tokens, r); d: (m - r, r); permutation: (m,)."""
    y = z.new_empty(len(z), len(permutation))
    return y.index_copy_(-1, permutation, torch.cat([z, z @ d.T], dim=-1))


def columns_kernel(x: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """`columns_reference` in one launch."""
    (tokens, _), (rank, rest) = x.shape, d.shape
    t, tile = x.new_empty(tokens, rank), blocks(tokens)
    grid = triton.cdiv(rank, tile["BN"]), triton.cdiv(tokens, tile["BM"])
    _columns_kernel[grid](x, d, permutation, t, tokens, rank, rest, x.stride(0), **tile)
    return t


def rows_kernel(z: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """`rows_reference` in one launch."""
    tokens, (rest, rank) = len(z), d.shape
    y, tile = z.new_empty(tokens, rank + rest), blocks(tokens)
    grid = triton.cdiv(rest, tile["BN"]) + triton.cdiv(rank, tile["BN"]), triton.cdiv(tokens, tile["BM"])
    _rows_kernel[grid](z, d, permutation, y, tokens, rank, rest, z.stride(0), **tile)
    return y


@torch.library.custom_op("fermisvd::pivga_columns", mutates_args=())
def pivga_columns(x: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor, most_tokens: int) -> torch.Tensor:
    """By kernel up to `most_tokens`, else by the reference; one opaque op, so that a compiled graph serves both."""
    flat = x.reshape(-1, x.shape[-1])
    t = (columns_kernel if len(flat) <= most_tokens else columns_reference)(flat, d, permutation)
    return t.view(*x.shape[:-1], len(d))


@pivga_columns.register_fake
def _(x, d, permutation, most_tokens):
    return x.new_empty(*x.shape[:-1], len(d))


@torch.library.custom_op("fermisvd::pivga_rows", mutates_args=())
def pivga_rows(z: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor, most_tokens: int) -> torch.Tensor:
    """By kernel up to `most_tokens`, else by the reference; one opaque op, so that a compiled graph serves both."""
    flat = z.reshape(-1, z.shape[-1])
    y = (rows_kernel if len(flat) <= most_tokens else rows_reference)(flat, d, permutation)
    return y.view(*z.shape[:-1], len(permutation))


@pivga_rows.register_fake
def _(z, d, permutation, most_tokens):
    return z.new_empty(*z.shape[:-1], len(permutation))
