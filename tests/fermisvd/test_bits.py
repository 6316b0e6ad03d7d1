"""Bits and ranks together. References: the KL that is measured, all subsets tried, the tensors that are stored."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fermisvd.bits import (
    Way,
    check_room_for_bits,
    coarse_bytes,
    loss_of,
    product_of,
    ranked_within,
    spend,
    ways_of,
)
from fermisvd.budget import Budget, RankedGroup
from fermisvd.byte_budget import ByteBudget
from fermisvd.compress import Compression, CompressOptions, calibrate, compress
from fermisvd.decomposition import OutputGram
from fermisvd.errors import OptionError
from fermisvd.groups import LinearGroup, find_groups
from fermisvd.hf import load_model
from fermisvd.losses import StudentLoss, set_weight
from fermisvd.storage import compressed_tensors, group_tensors
from fermisvd.teacher import teach
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

LENGTH, SAMPLES = 128, 48


@pytest.fixture(scope="module")
def model(demo_model):
    return load_model(demo_model)


@pytest.fixture(scope="module")
def windows(demo_model, demo_text):
    return windows_of(load_tokenizer(demo_model), str(demo_text["calibration"]), LENGTH, SAMPLES)


@pytest.fixture(scope="module")
def held_back(demo_model, demo_text):
    return windows_of(load_tokenizer(demo_model), str(demo_text["validation"]), LENGTH, 24)


@pytest.fixture(scope="module")
def calibrated(model, windows):
    work = Compression(model, windows, CompressOptions.named(bytes=0.3, weights="mixed"))
    groups = find_groups(work.teacher, "separate")
    return work, groups, calibrate(work, groups)


def no_factors(group):
    raise AssertionError("a group that stays dense has none")


def test_the_loss_is_the_measured_one(calibrated):
    """Dense matrices in int4: each group's estimate against the KL that it causes alone, and the sum against that of
    all together."""
    work, groups, decomposition = calibrated
    loss = StudentLoss(student := work.teacher, work.taught[:24], 8)
    estimates, measured, rounded = [], [], {}
    for group in groups:
        ranked = RankedGroup(group, group.full_rank, "pivga", "int4")
        coarse = ways_of(ranked, no_factors, decomposition, torch.bfloat16, work.windows.numel())[0]
        tensors = group_tensors(ranked, no_factors, decomposition, torch.bfloat16, "cpu")
        rounded[group] = product_of(ranked, tensors)
        set_weight(student, group, rounded[group])
        estimates.append(coarse.loss)
        measured.append(loss())
        set_weight(student, group, decomposition.weights(group))
    for group, weight in rounded.items():
        set_weight(student, group, weight)
    together = loss()
    for group in groups:
        set_weight(student, group, decomposition.weights(group))
    logs = torch.tensor([estimates, measured]).log()
    assert torch.corrcoef(logs)[0, 1] > 0.97
    assert 0.6 < sum(estimates) / together < 1.4


@pytest.mark.parametrize(("form", "side"), [("svd", "columns"), ("pivga", "columns"), ("pivga", "rows")])
def test_ways(form, side):
    """Bytes are those of the tensors, finer factors lose less, and the error is that of the product."""
    group = (
        LinearGroup(("0.a", "0.b"), (24, 40), 96, side, "0.a")
        if side == "columns"
        else LinearGroup(("0.a",), (64,), 96, side, "0.a")
    )
    a, b, x = torch.randn(64, 32), torch.randn(32, 96), torch.randn(300, 96)
    gram = (x.T @ x).double()
    outputs = [OutputGram(torch.eye(rows), float(2 + i)) for i, rows in enumerate(group.member_rows)]

    class Fixed:
        def gram(self, source):
            return gram

        def outputs(self, group, device):
            return outputs

    ranked = RankedGroup(group, 32, form, "int4")
    ways = ways_of(ranked, lambda _: (a, b), Fixed(), torch.bfloat16, 300)  # pyright: ignore[reportArgumentType]
    assert [len(way.fine) for way in ways] == [0, 1, 1, 2]
    for way in ways:
        tensors = compressed_tensors(way.of(ranked), (a, b), torch.bfloat16, gram)
        assert way.bytes == sum(tensor.nbytes for tensor in tensors.values())
        error = (product_of(way.of(ranked), tensors) - a @ b).double()
        outputs_off = (x.double() @ error.T).split(list(group.member_rows), dim=1)
        expected = sum((2 + i) * part.square().sum().item() / 2 / 300**2 for i, part in enumerate(outputs_off))
        assert way.loss == pytest.approx(expected, rel=1e-6)
    assert ways[3].loss < min(ways[1].loss, ways[2].loss) < ways[0].loss
    assert ways[3].loss < 0.02 * ways[0].loss


def test_each_member_by_its_gradients():
    group = LinearGroup(("q", "k"), (2, 1), 3, "columns", "q")
    error, gram = torch.ones(3, 3).double(), torch.eye(3).double()
    assert (
        loss_of(error, gram, [OutputGram(torch.eye(2), 4.0), OutputGram(torch.eye(1), 1.0)], group)
        == (4 * 6 + 1 * 3) / 2
    )


def some_ways(sizes):
    return [
        [Way((), 10, loss), Way(("a",), 10 + step, loss * part), Way(("a", "b"), 10 + 2 * step + 1, loss * part / 8)]
        for loss, step, part in sizes
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 9), st.floats(0.1, 0.9)), min_size=1, max_size=5),
    st.integers(0, 120),
)
def test_spend(sizes, room):
    """Never beyond the room, nothing that helps left out, and worse than the best of all choices by less than one
    group's change."""
    ways = some_ways(sizes)
    room += 10 * len(ways)
    chosen = spend(ways, room)
    used = sum(way.bytes for way in chosen)
    assert used <= room
    for now, each in zip(chosen, ways, strict=True):
        assert not [way for way in each if way.loss < now.loss and used - now.bytes + way.bytes <= room]
    best = min(sum(way.loss for way in choice) for choice in product(*ways) if sum(way.bytes for way in choice) <= room)
    assert sum(way.loss for way in chosen) <= best + max(loss for loss, _, _ in sizes)


def test_what_gains_most_a_byte_comes_first():
    ways = [[Way((), 10, 1.0), Way(("a",), 20, 0.0)], [Way((), 10, 3.0), Way(("a",), 20, 0.0)]]
    assert [way.fine for way in spend(ways, 30)] == [(), ("a",)]
    assert [way.fine for way in spend(ways, 40)] == [("a",), ("a",)]
    assert [way.fine for way in spend(ways, 5)] == [(), ()]


def stored(model) -> tuple[int, set[str]]:
    """Bytes of the compressed layers, and the schemes of their factors."""
    groups = model.config.quantization_config.to_dict()["groups"]
    names = {member for group in groups for member in group["members"]}
    state = model.state_dict()
    size = sum(tensor.nbytes for name, tensor in state.items() if name.rpartition(".")[0] in names)
    schemes = {each for group in groups for each in group["schemes"].values()}
    return size, schemes


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_never_worse_than_one_type(model, windows, held_back, form):
    """At 0.3 and 0.4 of bfloat16's bytes, against all in int4, which fits, and against int8 at as many bytes."""
    options = {"form": form, "heal_steps": 0, "refit": False, "groups": "separate", "ranks": "uniform"}
    dense, taught = copy.deepcopy(model).to(torch.bfloat16), teach(model, held_back, 8)

    def kl(compressed):
        return StudentLoss(compressed.float(), taught, 8)()

    whole = 2 * sum(group.dense_parameters for group in find_groups(model, "separate"))
    int4, losses = kl(compress(dense, windows, bytes=0.3, weights="int4", **options)), []
    for kept in (0.3, 0.4):
        mixed = compress(dense, windows, bytes=kept, weights="mixed", **options)
        size, schemes = stored(mixed)
        assert kept - 0.02 < size / whole <= kept
        assert "int8" in schemes and any(name.startswith("int4") for name in schemes)
        losses.append(kl(mixed))
        assert losses[-1] < kl(compress(dense, windows, bytes=kept, weights="int8", **options))
    assert losses[1] < losses[0] < int4


def test_ranks_by_one_budget_and_bits_by_another(model, windows):
    """--remove and --bytes together: as many parameters as with --remove alone, and the bytes spent."""
    options = {"heal_steps": 0, "refit": False, "groups": "separate", "ranks": "uniform", "align": 8}
    mixed = compress(model, windows, 0.3, bytes=0.14, weights="mixed", **options)
    int4 = compress(model, windows, 0.3, weights="int4", **options)
    ranks = [[group["rank"] for group in each.config.quantization_config.to_dict()["groups"]] for each in (mixed, int4)]
    assert ranks[0] == ranks[1]
    whole = 4 * sum(group.dense_parameters for group in find_groups(model, "separate"))
    assert stored(int4)[0] / whole < 0.12 and 0.13 < stored(mixed)[0] / whole <= 0.14


def test_bytes_too_few(model):
    groups = find_groups(model, "separate")
    budget = Budget.removing(0.2, "pivga", None, 1, "int4")
    bits = replace(ByteBudget.keeping(0.15, "pivga", None, 1, "int4"), dtype="bfloat16")
    with pytest.raises(OptionError, match=r"--bytes leaves .* need .* in int4; allow more, or remove more"):
        check_room_for_bits(budget, bits, groups)


def test_ranks_come_down_to_the_bytes(model):
    """Where ranks take a little more than is allowed: as few steps as that takes."""
    groups = find_groups(model, "separate")
    budget = Budget.removing(0.2, "pivga", 1, 1, "int4")
    ideal = budget.uniform_ranks(groups)
    bits = replace(ByteBudget.keeping(0.3, "pivga", 1, 1, "int4"), dtype="bfloat16")
    free = ranked_within(budget, bits, groups, ideal)
    assert free == budget.ranked(groups, ideal)
    needed = coarse_bytes(free, bits) / bits.total(groups)
    bits = replace(bits, kept=0.99 * needed)
    held = ranked_within(budget, bits, groups, ideal)
    assert 0.97 * needed < coarse_bytes(held, bits) / bits.total(groups) <= 0.99 * needed


def test_heals(model, windows, held_back):
    """Straight through both grids at once."""
    options = {"bytes": 0.15, "weights": "mixed", "groups": "separate", "ranks": "uniform", "form": "svd"}
    taught, losses = teach(model, held_back, 8), []
    for steps in (0, 24):
        mixed = compress(model, windows, remove=0.2, heal_steps=steps, refit=False, **options)
        kinds = {name.partition("_")[0] for name in stored(mixed)[1]}
        assert kinds == {"int4", "int8"}
        losses.append(StudentLoss(mixed, taught, 8)())
    assert losses[1] < 0.95 * losses[0]
