"""The Triton kernels, under Triton's interpreter where there is no GPU, against products in float64."""

from dataclasses import replace

import pytest
import torch

from fermisvd_vllm.tuning import check_agreement

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.9's interpreter multiplies bfloat16's bits as integers
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def columns_operands(tokens, ranks, width, dtype):
    """s and D of each group; and s with t in the place of s_skel, in float64."""
    s = [random(tokens, width, seed=i).to(dtype).to(DEVICE) for i in range(len(ranks))]
    ds = [random(rank, width - rank, seed=i).to(dtype).to(DEVICE) for i, rank in enumerate(ranks)]
    expected = [own.double() for own in s]
    for own, rank, d in zip(expected, ranks, ds, strict=True):
        own[:, :rank] += own[:, rank:] @ d.double().T
    return (s, ds), expected


def outputs_operands(tokens, parts, order, dtype):
    """parts: (r, rows of each of its members) of each; order: part of each member of the layer. t and A of each part,
    and where each member's rows are; and the y to expect, in float64."""
    t = [random(tokens, rank, seed=i).to(dtype).to(DEVICE) for i, (rank, _) in enumerate(parts)]
    a = [random(sum(sizes), rank, seed=i).to(dtype).to(DEVICE) for i, (rank, sizes) in enumerate(parts)]
    left = [[(i, sum(sizes[:n]), size) for n, size in enumerate(sizes)] for i, (_, sizes) in enumerate(parts)]
    members = [left[part].pop(0) for part in order]
    y = [t[part].double() @ a[part][start : start + size].double().T for part, start, size in members]
    return (t, a, *map(list, zip(*members, strict=True))), torch.cat(y, dim=1)


def check(found, expected, dtype, inner):
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * inner**0.5 * 4
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


WAYS = pytest.mark.parametrize("way", ["kernel", "reference"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "ranks", "width"),
    [
        *[(1, [5], 96), (7, [33], 96), (17, [64], 200), (70, [20], 130), (16, [96], 97), (3, [1], 40), (2, [40], 40)],
        *[(5, [16, 5, 33], 96), (20, [64, 1], 80), (66, [70, 130, 3], 200), (4, [8, 60, 60, 20], 60)],
    ],
)
@WAYS
def test_columns(kernels, way, tokens, ranks, width, dtype):
    (s, d), expected = columns_operands(tokens, ranks, width, dtype)
    getattr(kernels, f"columns_{way}")(s, d)
    for own, right in zip(s, expected, strict=True):
        check(own, right, dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "parts", "order"),
    [
        (1, [(5, [96]), (16, [32])], [0, 1]),
        (17, [(70, [33]), (7, [17]), (64, [5])], [0, 1, 2]),
        (66, [(20, [40, 16]), (9, [100])], [0, 1, 0]),  # members of a group far apart
        (3, [(4, [1]), (6, [70])], [1, 0]),
    ],
)
@WAYS
def test_outputs(kernels, way, tokens, parts, order, dtype):
    operands, expected = outputs_operands(tokens, parts, order, dtype)
    check(getattr(kernels, f"outputs_{way}")(*operands), expected, dtype, max(rank for rank, _ in parts))


def wider(x):
    """x as a slice of a fused product: rows further apart than they are long."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 40), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def trace(call):
    return torch.compile(call, backend="eager", fullgraph=True, dynamic=True)


@pytest.fixture(params=[0, 8])
def limited(request):
    """Has an op's kernel taken up to so many tokens, with operands of those shapes."""
    changed = []

    def limit(op, x, weights):
        op.limits[op.key(x, weights)] = request.param
        changed.append(op)

    yield limit
    for op in changed:
        op.limits.clear()


def test_columns_op(kernels, limited):
    """One op for any number of tokens and leading dimensions, which traces without a graph break for all of them."""
    (s, d), expected = columns_operands(8, [20, 7], 60, torch.float32)
    limited(kernels.COLUMNS, s, d)
    torch.library.opcheck(kernels.columns, ([own.clone() for own in s], d))

    def call(s):
        t = [own.clone() for own in s]
        kernels.columns(t, d)
        return t

    for tokens in (8, 4, 2):
        for own, right in zip(trace(call)([own[:tokens] for own in s]), expected, strict=True):
            check(own, right[:tokens], torch.float32, 60)
    for own, right in zip(call([own.view(2, 4, -1) for own in s]), expected, strict=True):
        check(own.flatten(0, 1), right, torch.float32, 60)


def test_outputs_op(kernels, limited):
    (t, *more), expected = outputs_operands(8, [(12, [40]), (20, [16, 8])], [1, 0, 1], torch.float32)
    limited(kernels.OUTPUTS, t, more[0])
    torch.library.opcheck(kernels.outputs, (t, *more))
    traced = trace(lambda t: kernels.outputs(t, *more))
    for tokens in (8, 4, 2):
        check(traced([wider(own[:tokens]) for own in t]), expected[:tokens], torch.float32, 60)
    check(kernels.outputs([own.view(2, 4, -1) for own in t], *more).flatten(0, 1), expected, torch.float32, 60)


def test_wrong_kernel_is_found_out(kernels):
    (s, d), _ = columns_operands(3, [16, 40], 96, torch.float32)
    check_agreement(kernels.COLUMNS, s, d)

    def off(s, d):
        kernels.columns_kernel(s, d)
        s[1][0, 0] += 1

    with pytest.raises(RuntimeError, match="off by"):
        check_agreement(replace(kernels.COLUMNS, kernel=off), s, d)
