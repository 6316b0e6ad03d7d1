"""Rounding with error feedback. References: sums for every row, nearest points, compressed-tensors' own functions."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from fermisvd.rounding import (
    best_scales,
    round_for_inputs,
    round_to_nearest,
    round_with_error_feedback,
    to_type,
)
from fermisvd.schemes import FP8, INT4, INT8, SCHEMES, codes_of, dequantised, scheme_for, stored


def test_error_feedback_beats_rounding_to_nearest():
    generator = torch.Generator().manual_seed(0)
    skeleton = torch.randn(80, 40, dtype=torch.float64, generator=generator)
    skeleton = skeleton @ torch.randn(40, 40, dtype=torch.float64, generator=generator)
    d = torch.randn(40, 30, dtype=torch.float64, generator=generator)
    plain = (skeleton @ (d.bfloat16().double() - d)).norm()
    triangle = torch.linalg.qr(skeleton, mode="r")[1]
    feedback = (skeleton @ (round_with_error_feedback(d, triangle, to_type(torch.bfloat16)) - d)).norm()
    assert feedback < 0.8 * plain


def test_error_feedback_row_by_row():
    """Reference: the same greedy rounding with a sum for every row, over more rows than a block has."""
    generator = torch.Generator().manual_seed(0)
    skeleton = torch.randn(300, 150, dtype=torch.float64, generator=generator)
    d = torch.randn(150, 20, dtype=torch.float64, generator=generator)
    r_factor = torch.linalg.qr(skeleton, mode="r")[1]
    expected = d.clone()
    for i in reversed(range(150)):
        carried = sum(r_factor[i, j] * (expected[j] - d[j]) for j in range(i + 1, 150)) / r_factor[i, i]
        expected[i] = (d[i] - carried).bfloat16().double()
    found = round_with_error_feedback(d, r_factor, to_type(torch.bfloat16))
    assert (found != expected).double().mean() < 1e-3  # sums in another order: a tie may fall the other way


def correlated(inputs, tokens=400, seed=0):
    """C of inputs that share a few directions, (n x n)."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 4, dtype=torch.float64, generator=generator)
    mixed = few @ torch.randn(4, inputs, dtype=torch.float64, generator=generator)
    x = mixed + 0.2 * torch.randn(tokens, inputs, dtype=torch.float64, generator=generator)
    return x.T @ x


def error(matrix, other, gram):
    """Squared error of the outputs."""
    return ((matrix - other) @ gram * (matrix - other)).sum()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("columns", [96, 70])
def test_feedback_beats_nearest(scheme, columns):
    """For inputs that are correlated; both lie on the grid, and what is stored gives the same numbers."""
    matrix = torch.randn(40, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = correlated(columns)
    plain, aware = (
        round_to_nearest(matrix, scheme, torch.bfloat16),
        round_for_inputs(matrix, gram, scheme, torch.bfloat16),
    )
    assert error(matrix, aware.values, gram) < 0.4 * error(matrix, plain.values, gram)
    assert torch.equal(scheme.nearest(aware.codes), aware.codes)
    tensors = stored(scheme, "skeleton", aware.codes, aware.scales)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == scheme.shapes("skeleton", 40, columns)
    assert all(scheme.type_of(name) in (None, tensor.dtype) for name, tensor in tensors.items())
    codes = codes_of(scheme, "skeleton", tensors, columns)
    back = dequantised(scheme, codes, tensors["skeleton_scale"].double())
    assert torch.equal(back, aware.values)


@pytest.mark.parametrize("scheme", [INT8, FP8, INT4[-1]], ids=["int8", "fp8", "int4"])
def test_uncorrelated_inputs_leave_nothing_to_feed_back(scheme):
    """Then the nearest number of each entry is best: reference, the distance to all numbers of the grid."""
    matrix = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = round_for_inputs(matrix, torch.eye(64, dtype=torch.float64), scheme, torch.float32)
    if scheme.code.is_floating_point:
        grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        grid = grid[grid.isfinite()]
    else:
        grid = torch.arange(scheme.least, scheme.largest + 1, dtype=torch.float64)
    points = grid * scheme.spread(found.scales.double(), 64).expand(6, 64)[..., None]
    nearest = (points - matrix[..., None]).abs().amin(-1)
    torch.testing.assert_close((found.values - matrix).abs(), nearest, rtol=0, atol=1e-12)


def test_scales_are_chosen_by_error():
    """One large entry among many small ones: a grid that ends below it is finer for all others."""
    row = torch.randn(1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    row[0, 5] = 12.0
    scheme = scheme_for("int4", 128)
    assert scheme is not None
    chosen = round_to_nearest(row, scheme, torch.float32)
    assert chosen.scales < 0.95 * 12.0 / 7
    largest = row.abs().amax() / 7
    plain = scheme.nearest(row / largest) * largest
    assert (chosen.values - row).square().sum() < (plain - row).square().sum()


def test_scales_of_nothing():
    """Rows of zeros, and matrices without rows or columns."""
    zeros = torch.zeros(3, 64, dtype=torch.float64)
    for scheme in SCHEMES.values():
        assert torch.equal(round_to_nearest(zeros, scheme, torch.bfloat16).values, zeros)
        for shape in ((0, 64), (3, 0)):
            empty = round_for_inputs(zeros.new_zeros(shape), torch.eye(shape[1]).double(), scheme, torch.bfloat16)
            assert empty.values.shape == shape
            assert empty.scales.shape == (shape[0], scheme.groups(shape[1]))
    assert (best_scales(zeros, INT8, torch.bfloat16) > 0).all()


def test_massive_channel():
    """One channel has a million times the energy of the others: it is rounded first, and the others pay for it."""
    gram = correlated(64)
    gram[7] *= 1e3
    gram[:, 7] *= 1e3
    matrix = torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = round_to_nearest(matrix, INT4[1], torch.bfloat16).values
    aware = round_for_inputs(matrix, gram, INT4[1], torch.bfloat16).values
    assert error(matrix, aware, gram) < 0.1 * error(matrix, plain, gram)


PRESETS = {"int8": "W8A8", "fp8": "FP8_DYNAMIC", "int4_group128": "W4A16"}


@pytest.mark.parametrize("name", SCHEMES)
def test_described_in_the_words_of_compressed_tensors(name):
    """Reference: its own scheme of that kind."""
    described = QuantizationScheme.model_validate(SCHEMES[name].described())
    expected = preset_name_to_scheme(PRESETS.get(name, "W4A16"), ["Linear"])
    if name.startswith("int4"):
        assert expected.weights is not None
        expected.weights.group_size = SCHEMES[name].group_size
    for part in ("weights", "input_activations"):
        found, wanted = getattr(described, part), getattr(expected, part)
        assert (found is None) == (wanted is None)
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
            assert wanted is None or getattr(found, field) == getattr(wanted, field)


def test_packed_as_compressed_tensors_packs():
    """Low bits first, offset by 8. Reference: its unpacking, and one number by hand."""
    codes = torch.arange(-8, 8).repeat(3, 1)
    packed = stored(INT4[-1], "weight", codes, torch.ones(3, 1))["weight_packed"]
    assert torch.equal(unpack_from_int32(packed, 4, torch.Size((3, 16))).long(), codes)
    assert packed[0, 0] == sum(number << 4 * number for number in range(8))


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32), (70, 32), (20, 32)])
def test_group_size(columns, size):
    scheme = scheme_for("int4", columns)
    assert scheme is not None and scheme.group_size == size
    assert scheme.groups(columns) == -(-columns // size)
