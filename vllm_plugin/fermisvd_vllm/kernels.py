"""Triton kernels for few tokens, so that a low-rank layer takes two launches however many groups it has.

    columns: t = s_skel + s_rest D^T      of all groups of a fused layer, in place; s = [x[skel] | x[rest]] of each
    outputs: y = t A^T                    of all members of a fused layer of several groups; A or C_skel

s is no work of these kernels: the norm before the layer stores its output in that order when it is compiled. Nor is
the order of a rows layer's outputs: the norm after it loads them in it. What else a layer needs is plain GEMMs.
`columns` and `outputs` take the kernel up to as many tokens as it was measured to win at (fermisvd_vllm.tuning), else
plain products: `columns_reference`, `outputs_reference`. They are opaque, so one compiled graph serves both, whatever
was measured where it was compiled.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fermisvd_vllm.tuning import Op


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


@triton.jit(do_not_specialize=["tokens"])
def _columns_kernel(
    s, d, ranks, strides, tokens, width, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """One tile of one group's t, in the place of s_skel. Tuples of GROUPS: s, each (tokens x n), rows a stride apart;
    d, each (r x (n - r)); ranks, each r."""
    first = 0
    for g in tl.static_range(GROUPS):  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]: Triton's own
        tile, rank = tl.program_id(0) - first, ranks[g]
        first += tl.cdiv(rank, BN)
        if (tile >= 0) & (tl.program_id(0) < first):
            rows = tl.program_id(1) * BM + tl.arange(0, BM)
            columns = tile * BN + tl.arange(0, BN)
            row_inside, column_inside = rows < tokens, columns < rank
            s_rows = s[g] + rows[:, None].to(tl.int64) * strides[g]
            total = _product(s_rows + rank, d[g], columns, row_inside, column_inside, width - rank, BM, BN, BK)
            inside = row_inside[:, None] & column_inside[None, :]
            total += tl.load(s_rows + columns[None, :], mask=inside, other=0.0)
            tl.store(s_rows + columns[None, :], total.to(s[g].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _outputs_kernel(
    t, a, y, ranks, sizes, strides, tokens, y_stride,
    MEMBERS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one member's y, all of which lie side by side. Tuples of MEMBERS: t, each (tokens x r), rows a stride
    apart; a, each (m x r); ranks, each r; sizes, each m."""
    first, start = 0, 0
    for i in tl.static_range(MEMBERS):  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]: Triton's own
        tile, rank = tl.program_id(0) - first, ranks[i]
        first += tl.cdiv(sizes[i], BN)
        if (tile >= 0) & (tl.program_id(0) < first):
            rows = tl.program_id(1) * BM + tl.arange(0, BM)
            columns = tile * BN + tl.arange(0, BN)
            row_inside, column_inside = rows < tokens, columns < sizes[i]
            t_rows = t[i] + rows[:, None].to(tl.int64) * strides[i]
            total = _product(t_rows, a[i], columns, row_inside, column_inside, rank, BM, BN, BK)
            y_tile = y + start + rows[:, None].to(tl.int64) * y_stride + columns[None, :]
            tl.store(y_tile, total.to(y.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])
        start += sizes[i]


def blocks(tokens: int) -> dict[str, int]:
    """Tile sizes and warps: narrow tiles of D, so that a matrix of a few megabytes keeps every multiprocessor busy."""
    if tokens <= 16:
        return {"BM": 16, "BN": 16, "BK": 256, "num_warps": 4, "num_stages": 3}
    if tokens <= 64:
        return {"BM": 64, "BN": 16, "BK": 128, "num_warps": 4, "num_stages": 4}
    return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}


def columns_reference(s: Sequence[torch.Tensor], d: Sequence[torch.Tensor]) -> None:
    """s_skel += s_rest D^T, the addition inside the GEMM. Of each group: s: (tokens, n), changed; d: (r, n - r)."""
    for own, each in zip(s, d, strict=True):
        if each.numel():
            own[:, : len(each)].addmm_(own[:, len(each) :], each.T)


def outputs_reference(
    t: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    parts: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
) -> torch.Tensor:
    """y = t A^T of each part, its members' rows side by side in their order. Of each part: t: (tokens, r); a: (m, r).
    Of each member: parts: its part; starts, sizes: its rows in that part's A."""
    y = [own @ each.T for own, each in zip(t, a, strict=True)]
    members = zip(parts, starts, sizes, strict=True)
    return torch.cat([y[part][:, start : start + size] for part, start, size in members], dim=-1)


def columns_kernel(s: Sequence[torch.Tensor], d: Sequence[torch.Tensor]) -> None:
    """`columns_reference` in one launch."""
    (tokens, width), tile = s[0].shape, blocks(len(s[0]))
    ranks = tuple(len(each) for each in d)
    grid = sum(triton.cdiv(rank, tile["BN"]) for rank in ranks), triton.cdiv(tokens, tile["BM"])
    strides = tuple(own.stride(0) for own in s)
    constants: dict[str, Any] = {"GROUPS": len(s), **tile}  # Any: Triton takes int for constexpr, its types do not
    _columns_kernel[grid](tuple(s), tuple(d), ranks, strides, tokens, width, **constants)


def outputs_kernel(
    t: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    parts: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
) -> torch.Tensor:
    """`outputs_reference` in one launch."""
    tokens, tile = len(t[0]), blocks(len(t[0]))
    y = t[0].new_empty(tokens, sum(sizes))
    grid = sum(triton.cdiv(size, tile["BN"]) for size in sizes), triton.cdiv(tokens, tile["BM"])
    own = tuple(t[part] for part in parts)
    rows = tuple(a[part][start : start + size] for part, start, size in zip(parts, starts, sizes, strict=True))
    ranks, strides = tuple(each.shape[1] for each in rows), tuple(each.stride(0) for each in own)
    constants: dict[str, Any] = {"MEMBERS": len(sizes), **tile}
    _outputs_kernel[grid](own, rows, y, ranks, tuple(sizes), strides, tokens, y.stride(0), **constants)
    return y


COLUMNS = Op("columns", columns_kernel, columns_reference, keyed_by_width=True)  # width of s, of which D shows a part
OUTPUTS = Op("outputs", outputs_kernel, outputs_reference, keyed_by_width=False)


@torch.library.custom_op("fermisvd::columns", mutates_args=("s",))
def columns(s: Sequence[torch.Tensor], d: Sequence[torch.Tensor]) -> None:
    """`columns_reference` of contiguous s with any number of leading dimensions."""
    COLUMNS([own.view(-1, own.shape[-1]) for own in s], d)


@torch.library.custom_op("fermisvd::outputs", mutates_args=())
def outputs(
    t: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    parts: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
) -> torch.Tensor:
    """`outputs_reference` of t with any number of leading dimensions."""
    y = OUTPUTS([own.reshape(-1, own.shape[-1]) for own in t], a, parts, starts, sizes)
    return y.view(*t[0].shape[:-1], y.shape[-1])


@outputs.register_fake
def _(t, a, parts, starts, sizes):
    return t[0].new_empty(*t[0].shape[:-1], sum(sizes))
