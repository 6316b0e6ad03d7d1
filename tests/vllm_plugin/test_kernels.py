"""The Triton kernels, under Triton's interpreter where there is no GPU, against products in float64."""

import pytest
import torch

from fermisvd_vllm.tuning import operands

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.9's interpreter multiplies bfloat16's bits as integers
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_permutation(rank, width):
    order = torch.randperm(width, generator=torch.Generator().manual_seed(rank))
    return torch.cat([order[:rank].sort().values, order[rank:].sort().values])


def columns_operands(tokens, ranks, width, dtype):
    """x, the groups' D one after the other, their permutations, ranks; and the t to expect, in float64."""
    x = random(tokens, width).to(dtype)
    ds = [random(rank, width - rank, seed=i).to(dtype) for i, rank in enumerate(ranks)]
    permutations = [random_permutation(rank, width) for rank in ranks]
    expected = []
    for rank, d, permutation in zip(ranks, ds, permutations, strict=True):
        full = torch.zeros(width, rank, dtype=torch.float64)  # [I | D] P^T, transposed
        full[permutation] = torch.cat([torch.eye(rank).to(full), d.double()], dim=1).T
        expected.append(x.double() @ full)
    flat, order = torch.cat([d.flatten() for d in ds]), torch.stack(permutations)
    return (x.to(DEVICE), flat.to(DEVICE), order.to(DEVICE), list(ranks)), torch.cat(expected, dim=1).to(DEVICE)


def outputs_operands(tokens, members, dtype):
    """members: (group, r, m) of each; t, their A, ranks, starts, sizes; and the y to expect, in float64."""
    groups = dict.fromkeys(group for group, _, _ in sorted(members))
    of_group = {group: next(rank for g, rank, _ in members if g == group) for group in groups}
    starts = dict(zip(groups, [0, *torch.tensor(list(of_group.values())).cumsum(0).tolist()], strict=False))
    t = random(tokens, sum(of_group.values())).to(dtype)
    a = [random(size, rank, seed=i).to(dtype) for i, (_, rank, size) in enumerate(members)]
    expected = [
        t[:, starts[group] : starts[group] + rank].double() @ own.double().T
        for (group, rank, _), own in zip(members, a, strict=True)
    ]
    more = [rank for _, rank, _ in members], [starts[group] for group, _, _ in members], [m for _, _, m in members]
    flat = torch.cat([own.flatten() for own in a])
    return (t.to(DEVICE), flat.to(DEVICE), *more), torch.cat(expected, dim=1).to(DEVICE)


def rows_operands(tokens, rank, height, dtype):
    """z, D, permutation; and the y to expect, in float64."""
    z, d, permutation = random(tokens, rank).to(dtype), random(height - rank, rank).to(dtype), None
    permutation = random_permutation(rank, height)
    full = torch.zeros(height, rank, dtype=torch.float64)  # P [I ; D]
    full[permutation] = torch.cat([torch.eye(rank).to(full), d.double()])
    return (z.to(DEVICE), d.to(DEVICE), permutation.to(DEVICE)), (z.double() @ full.T).to(DEVICE)


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
    operands, expected = columns_operands(tokens, ranks, width, dtype)
    check(getattr(kernels, f"columns_{way}")(*operands), expected, dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "members"),
    [
        *[(1, [(0, 5, 96), (1, 16, 32)]), (17, [(0, 70, 33), (1, 7, 17), (2, 64, 5)])],
        *[(66, [(0, 20, 40), (1, 9, 100), (0, 20, 16)]), (3, [(1, 4, 1), (0, 6, 70)])],  # members of a group far apart
    ],
)
@WAYS
def test_outputs(kernels, way, tokens, members, dtype):
    operands, expected = outputs_operands(tokens, members, dtype)
    check(getattr(kernels, f"outputs_{way}")(*operands), expected, dtype, max(rank for _, rank, _ in members))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rank", "height"), [(1, 5, 96), (7, 33, 96), (17, 64, 200), (70, 20, 130), (16, 96, 97), (3, 1, 40)]
)
@WAYS
def test_rows(kernels, way, tokens, rank, height, dtype):
    operands, expected = rows_operands(tokens, rank, height, dtype)
    check(getattr(kernels, f"rows_{way}")(*operands), expected, dtype, rank)


def wider(x):
    """x as a slice of a fused product: rows further apart than they are long."""
    wide = x.new_full((len(x), x.shape[1] + 40), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


OPERANDS = {
    "pivga_columns": lambda: columns_operands(8, [20, 7], 60, torch.float32),
    "low_rank_outputs": lambda: outputs_operands(8, [(0, 12, 40), (1, 20, 16)], torch.float32),
    "pivga_rows": lambda: rows_operands(8, 20, 60, torch.float32),
}


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("most_tokens", [0, 8])
def test_op(kernels, name, most_tokens):
    """One op for any number of tokens and leading dimensions, which traces without a graph break for all of them."""
    op = getattr(kernels, name)
    (x, *more), expected = OPERANDS[name]()
    torch.library.opcheck(op, (x, *more, most_tokens))
    traced = torch.compile(lambda v: op(v, *more, most_tokens), backend="eager", fullgraph=True, dynamic=True)
    for tokens in (8, 4, 2):
        check(traced(x[:tokens]), expected[:tokens], torch.float32, 60)
    check(op(x.view(2, 4, -1), *more, most_tokens).flatten(0, 1), expected, torch.float32, 60)
    check(op(wider(x), *more, most_tokens), expected, torch.float32, 60)


@pytest.mark.parametrize("name", OPERANDS)
def test_kernels_measured_at_load_take_what_is_made_for_them(kernels, name):
    """Shapes of `operands` fit kernel and reference; a GPU is needed to time them, not to call them."""
    side = name.removeprefix("pivga_").removeprefix("low_rank_")
    inner, shape = {"columns": (96, ((16, 40),)), "outputs": (56, ((40, 16), (0, 40), (32, 24))), "rows": (16, (50,))}[
        side
    ]
    more = operands(side, inner, shape, torch.float32, torch.device(DEVICE))
    x = random(3, inner).to(DEVICE)
    found = (getattr(kernels, f"{side}_{way}")(x, *more) for way in ("kernel", "reference"))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
