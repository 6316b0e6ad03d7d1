from itertools import islice

import torch

from fermisvd.batches import shuffled_batches

WINDOWS = torch.arange(22).view(11, 2)


def passes(count, seed=0):
    """Lists of the batches of each pass: eleven windows by four make three batches."""
    batches = shuffled_batches(len(WINDOWS), 4, seed)
    return [[WINDOWS[numbers] for numbers in islice(batches, 3)] for _ in range(count)]


def test_every_pass_holds_each_window_once():
    for batches in passes(3):
        assert sorted(len(batch) for batch in batches) == [3, 4, 4]
        assert sorted(torch.cat(batches).tolist()) == WINDOWS.tolist()


def test_passes_differ_and_seeds_repeat():
    first, second = (torch.cat(batches).tolist() for batches in passes(2))
    assert first != second
    assert torch.cat(passes(1)[0]).tolist() == first
    assert torch.cat(passes(1, seed=1)[0]).tolist() != first
