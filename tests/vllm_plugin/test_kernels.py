"""The Triton kernels, under Triton's interpreter where there is no GPU, against products in float64."""

import pytest
import torch

from fermisvd_vllm.tuning import check_agreement, operands

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


def outputs_operands(tokens, members, dtype):
    """members: (r, m) of each; t and A of each; and the y to expect, in float64."""
    t = [random(tokens, rank, seed=i).to(dtype).to(DEVICE) for i, (rank, _) in enumerate(members)]
    a = [random(size, rank, seed=i).to(dtype).to(DEVICE) for i, (rank, size) in enumerate(members)]
    return (t, a), torch.cat([own.double() @ each.double().T for own, each in zip(t, a, strict=True)], dim=1)


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
    ("tokens", "members"),
    [(1, [(5, 96), (16, 32)]), (17, [(70, 33), (7, 17), (64, 5)]), (66, [(20, 40), (9, 100)]), (3, [(4, 1), (6, 70)])],
)
@WAYS
def test_outputs(kernels, way, tokens, members, dtype):
    operands, expected = outputs_operands(tokens, members, dtype)
    check(getattr(kernels, f"outputs_{way}")(*operands), expected, dtype, max(rank for rank, _ in members))


def wider(x):
    """x as a slice of a fused product: rows further apart than they are long."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 40), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def trace(call):
    return torch.compile(call, backend="eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize("most_tokens", [0, 8])
def test_columns_op(kernels, most_tokens):
    """One op for any number of tokens and leading dimensions, which traces without a graph break for all of them."""
    (s, d), expected = columns_operands(8, [20, 7], 60, torch.float32)
    torch.library.opcheck(kernels.pivga_columns, ([own.clone() for own in s], d, most_tokens))

    def call(s):
        t = [own.clone() for own in s]
        kernels.pivga_columns(t, d, most_tokens)
        return t

    for tokens in (8, 4, 2):
        for own, right in zip(trace(call)([own[:tokens] for own in s]), expected, strict=True):
            check(own, right[:tokens], torch.float32, 60)
    for own, right in zip(call([own.view(2, 4, -1) for own in s]), expected, strict=True):
        check(own.flatten(0, 1), right, torch.float32, 60)


@pytest.mark.parametrize("most_tokens", [0, 8])
def test_outputs_op(kernels, most_tokens):
    (t, a), expected = outputs_operands(8, [(12, 40), (20, 16)], torch.float32)
    torch.library.opcheck(kernels.low_rank_outputs, (t, a, most_tokens))
    traced = trace(lambda t: kernels.low_rank_outputs(t, a, most_tokens))
    for tokens in (8, 4, 2):
        check(traced([wider(own[:tokens]) for own in t]), expected[:tokens], torch.float32, 60)
    found = kernels.low_rank_outputs([own.view(2, 4, -1) for own in t], a, most_tokens)
    check(found.flatten(0, 1), expected, torch.float32, 60)


SHAPES = {"columns": (96, (16, 40)), "outputs": ((40, 16, 40), (32, 24, 8))}


@pytest.mark.parametrize("side", SHAPES)
def test_kernels_agree_on_what_is_measured_at_load(kernels, side):
    """Operands made for the measurement fit kernel and reference; a wrong kernel is found out."""
    kernel, reference = (getattr(kernels, f"{side}_{way}") for way in ("kernel", "reference"))
    given = operands(side, SHAPES[side], 3, torch.float32, torch.device(DEVICE))
    check_agreement(kernel, reference, given)

    def off(first, *more):
        found = kernel(first, *more)
        (first[0] if found is None else found)[0, 0] += 1
        return found

    with pytest.raises(RuntimeError, match="off by"):
        check_agreement(off, reference, given)
