"""Rounded weights: each is within half a step of its own, and bytes are as many as counted by hand."""

import copy

import pytest
import torch

from benchmarks.quality.pruning import linear_weights
from benchmarks.quality.rounding import group_size, round_linear, rounded


@pytest.mark.parametrize(("bits", "group"), [(8, 256), (4, 128), (4, 32)])
def test_a_weight_is_within_half_a_step(bits, group):
    """A step is the largest number of a group over 127 or 7; scales are rounded to bfloat16, by a 256th at most."""
    weight = torch.randn(48, 256) * torch.logspace(-3, 2, 48)[:, None]
    weight[5] = 0.0
    numbers, scales = rounded(weight, bits, group)
    most = 127 if bits == 8 else 7
    assert numbers.abs().max() <= most and torch.equal(numbers, numbers.round()) and scales.dtype == torch.bfloat16
    error = (numbers * scales.float() - weight.view(48, -1, group)).abs()
    step = weight.view(48, -1, group).abs().amax(-1, keepdim=True) / most
    assert (error <= 0.5 * step * (1 + 2**-8) + 1e-12).all()
    assert (error / step.clamp(min=1e-30)).max() > 0.45  # and no finer than that


def test_whole_numbers_of_a_step_stay():
    weight = torch.tensor([[127.0, -3.0, 0.0, 64.0], [-254.0, 2.0, 10.0, 0.0]])
    numbers, scales = rounded(weight, 8, 4)
    assert torch.equal((numbers * scales).view(2, 4), weight) and scales.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bits", [8, 4])
def test_only_linear_weights_change_and_bytes_are_counted(llama, bits):
    before = copy.deepcopy(llama.state_dict())
    taken = round_linear(llama, bits)
    changed = {name for name, tensor in llama.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(linear_weights(llama))
    scales = 0
    for name in linear_weights(llama):
        m, n = before[name].shape
        scales += m if bits == 8 else m * n // group_size(n)
    numbers = sum(before[name].numel() for name in linear_weights(llama))
    assert taken == numbers * bits / 8 + 2 * scales


def test_groups_of_what_divides_the_width():
    assert [group_size(columns) for columns in (1536, 576, 96)] == [128, 64, 32]
    with pytest.raises(ValueError, match="multiple of 32"):
        group_size(100)
