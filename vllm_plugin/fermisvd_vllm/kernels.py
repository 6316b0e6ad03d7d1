"""Triton kernels for few tokens, so that a low-rank layer takes two launches however many groups it has.

    columns: t = x[skel] + x[rest] D^T        of all groups of a fused layer, their t side by side
    outputs: y = t A^T                        of all members of a fused layer of several groups, A or C_skel
    rows:    y = P [z ; z D^T]                after the plain product z = x R_skel^T

What a group of one needs besides is a plain GEMM. References: `columns_reference`, `outputs_reference` and
`rows_reference`, which are also what runs where a kernel was measured to be slower (fermisvd_vllm.tuning).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MOST_TOKENS = 256


@triton.jit
def _product(
    x_rows, w, columns, row_inside, column_inside, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """A (BM x BN) tile of x W^T in float32. x_rows: pointers (BM x 1) to rows of x; w: (outputs x inner)."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        inside = k < inner
        left = tl.load(x_rows + k[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        w_tile = w + columns[None, :].to(tl.int64) * inner + k[:, None]
        right = tl.load(w_tile, mask=column_inside[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _columns_kernel(
    x, d, permutation, t, ranks, tokens, width, x_stride, t_stride,
    GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one group's t. x: (tokens x n), rows x_stride apart; ranks: r of each group, a tuple of GROUPS;
    d: their (r x (n - r)), one after the other; permutation: their (n,); t: their (tokens x r), side by side."""
    tile = tl.program_id(0)
    rank, before, d_next, t_next = ranks[0], 0, 0, 0
    d_start, p_start, t_start = d_next, 0, t_next
    for g in tl.static_range(GROUPS - 1):
        before += tl.cdiv(ranks[g], BN)
        d_next += ranks[g] * (width - ranks[g])
        t_next += ranks[g]
        beyond = tl.program_id(0) >= before
        tile = tl.where(beyond, tl.program_id(0) - before, tile)
        rank = tl.where(beyond, ranks[g + 1], rank)
        d_start, t_start = tl.where(beyond, d_next, d_start), tl.where(beyond, t_next, t_start)
        p_start = tl.where(beyond, (g + 1) * width, p_start)
    rest = width - rank
    d, permutation, t = d + d_start, permutation + p_start, t + t_start
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
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
    inside = row_inside[:, None] & column_inside[None, :]
    total += tl.load(x_rows + index[None, :], mask=inside, other=0.0)
    t_tile = t + rows[:, None].to(tl.int64) * t_stride + columns[None, :]
    tl.store(t_tile, total.to(t.dtype.element_ty), mask=inside)


@triton.jit
def _outputs_kernel(
    t, a, y, ranks, starts, sizes, tokens, t_stride, y_stride,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one member's y. t: (tokens x sum of the groups' r); ranks, starts, sizes: of each member its group's
    r, the column of t where that begins, and its rows m; a: the members' (m x r), one after the other."""
    tile = tl.program_id(0)
    rank, start, size, before, a_next, y_next = ranks[0], starts[0], sizes[0], 0, 0, 0
    a_start, y_start = a_next, y_next
    for i in tl.static_range(MEMBERS - 1):
        before += tl.cdiv(sizes[i], BN)
        a_next += sizes[i] * ranks[i]
        y_next += sizes[i]
        beyond = tl.program_id(0) >= before
        tile = tl.where(beyond, tl.program_id(0) - before, tile)
        rank, start = tl.where(beyond, ranks[i + 1], rank), tl.where(beyond, starts[i + 1], start)
        size = tl.where(beyond, sizes[i + 1], size)
        a_start, y_start = tl.where(beyond, a_next, a_start), tl.where(beyond, y_next, y_start)
    a, t, y = a + a_start, t + start, y + y_start
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    row_inside, column_inside = rows < tokens, columns < size
    t_rows = t + rows[:, None].to(tl.int64) * t_stride
    total = _product(t_rows, a, columns, row_inside, column_inside, rank, BM, BN, BK)
    y_tile = y + rows[:, None].to(tl.int64) * y_stride + columns[None, :]
    tl.store(y_tile, total.to(y.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


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
        total = _product(z_rows, d, columns, row_inside, column_inside, rank, BM, BN, BK)
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


def columns_reference(
    x: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor, ranks: Sequence[int]
) -> torch.Tensor:
    """t = x[skel] + x[rest] D^T, the addition inside the GEMM. x: (tokens, n); ranks: r of each group; d: their
    (r, n - r), flat, one after the other; permutation: (groups, n). Returns (tokens, sum of ranks)."""
    width, found = x.shape[-1], []
    for rank, own, order in zip(ranks, d.split([r * (width - r) for r in ranks]), permutation, strict=True):
        t = x.index_select(-1, order[:rank])
        if own.numel():
            t.addmm_(x.index_select(-1, order[rank:]), own.view(rank, -1).T)
        found.append(t)
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def outputs_reference(
    t: torch.Tensor, a: torch.Tensor, ranks: Sequence[int], starts: Sequence[int], sizes: Sequence[int]
) -> torch.Tensor:
    """y = t A^T of each member, side by side. t: (tokens, sum of the groups' ranks); ranks, starts, sizes: of each
    member its group's r, where that begins in t, its rows m; a: the members' (m, r), flat, one after the other."""
    own = a.split([size * rank for size, rank in zip(sizes, ranks, strict=True)])
    pieces = [t[:, s : s + r] @ each.view(-1, r).T for r, s, each in zip(ranks, starts, own, strict=True)]
    return torch.cat(pieces, dim=-1)


def rows_reference(z: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """y = P [z ; z D^T]. z: (tokens, r); d: (m - r, r); permutation: (m,)."""
    y = z.new_empty(len(z), len(permutation))
    return y.index_copy_(-1, permutation, torch.cat([z, z @ d.T], dim=-1))


def columns_kernel(x: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """`columns_reference` in one launch."""
    tokens, width = x.shape
    t, tile = x.new_empty(tokens, sum(ranks)), blocks(tokens)
    grid = sum(triton.cdiv(rank, tile["BN"]) for rank in ranks), triton.cdiv(tokens, tile["BM"])
    strides = x.stride(0), t.stride(0)
    _columns_kernel[grid](x, d, permutation, t, tuple(ranks), tokens, width, *strides, GROUPS=len(ranks), **tile)
    return t


def outputs_kernel(
    t: torch.Tensor, a: torch.Tensor, ranks: Sequence[int], starts: Sequence[int], sizes: Sequence[int]
) -> torch.Tensor:
    """`outputs_reference` in one launch."""
    tokens = len(t)
    y, tile = t.new_empty(tokens, sum(sizes)), blocks(tokens)
    grid = sum(triton.cdiv(size, tile["BN"]) for size in sizes), triton.cdiv(tokens, tile["BM"])
    members, strides = (tuple(ranks), tuple(starts), tuple(sizes)), (t.stride(0), y.stride(0))
    _outputs_kernel[grid](t, a, y, *members, tokens, *strides, MEMBERS=len(sizes), **tile)
    return y


def rows_kernel(z: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """`rows_reference` in one launch."""
    tokens, (rest, rank) = len(z), d.shape
    y, tile = z.new_empty(tokens, rank + rest), blocks(tokens)
    grid = triton.cdiv(rest, tile["BN"]) + triton.cdiv(rank, tile["BN"]), triton.cdiv(tokens, tile["BM"])
    _rows_kernel[grid](z, d, permutation, y, tokens, rank, rest, z.stride(0), **tile)
    return y


# Each op takes its kernel up to `most_tokens` and else its reference; opaque, so that one compiled graph serves both.


@torch.library.custom_op("fermisvd::pivga_columns", mutates_args=())
def pivga_columns(
    x: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor, ranks: Sequence[int], most_tokens: int
) -> torch.Tensor:
    """`columns_reference` of x with any number of leading dimensions."""
    flat = x.reshape(-1, x.shape[-1])
    t = (columns_kernel if len(flat) <= most_tokens else columns_reference)(flat, d, permutation, ranks)
    return t.view(*x.shape[:-1], sum(ranks))


@pivga_columns.register_fake
def _(x, d, permutation, ranks, most_tokens):
    return x.new_empty(*x.shape[:-1], sum(ranks))


@torch.library.custom_op("fermisvd::low_rank_outputs", mutates_args=())
def low_rank_outputs(
    t: torch.Tensor,
    a: torch.Tensor,
    ranks: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    most_tokens: int,
) -> torch.Tensor:
    """`outputs_reference` of t with any number of leading dimensions."""
    flat = t.reshape(-1, t.shape[-1])
    y = (outputs_kernel if len(flat) <= most_tokens else outputs_reference)(flat, a, ranks, starts, sizes)
    return y.view(*t.shape[:-1], sum(sizes))


@low_rank_outputs.register_fake
def _(t, a, ranks, starts, sizes, most_tokens):
    return t.new_empty(*t.shape[:-1], sum(sizes))


@torch.library.custom_op("fermisvd::pivga_rows", mutates_args=())
def pivga_rows(z: torch.Tensor, d: torch.Tensor, permutation: torch.Tensor, most_tokens: int) -> torch.Tensor:
    """`rows_reference` of z with any number of leading dimensions."""
    flat = z.reshape(-1, z.shape[-1])
    y = (rows_kernel if len(flat) <= most_tokens else rows_reference)(flat, d, permutation)
    return y.view(*z.shape[:-1], len(permutation))


@pivga_rows.register_fake
def _(z, d, permutation, most_tokens):
    return z.new_empty(*z.shape[:-1], len(permutation))
