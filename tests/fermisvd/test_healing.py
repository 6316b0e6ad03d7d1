import copy
from typing import Any

import pytest
import torch

from fermisvd import load_model
from fermisvd.errors import NumericalError
from fermisvd.groups import StructureError
from fermisvd.healing import HealingSettings, HealingState, heal, rounded_factors, trained_factors
from fermisvd.losses import StudentLoss
from fermisvd.teacher import teach
from tests.support.families import compress, save


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save("phi3", tmp_path_factory.mktemp("healing") / "phi3")


@pytest.fixture(scope="module", params=["pivga", "svd"])
def compressed(request, dense, demo_text):
    return compress(dense, request.param, demo_text["calibration"], dense.parent / "work")


@pytest.mark.long
def test_healing_lowers_the_loss_and_moves_only_factors(dense, compressed):
    teacher, student = load_model(dense), load_model(compressed)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taught = teach(teacher, torch.randint(2048, (16, 32)), 8)
    loss = StudentLoss(student, taught, 8)
    start, settings = loss(), HealingSettings(steps=60, learning_rate=1.7)
    record = heal(student, taught, taught[:4], settings, batch_size=8, seed=0)
    assert loss() < 0.7 * start
    trace = record["trace"]
    assert trace[0]["kl"] > trace[-1]["kl"] and len(trace) == 60
    assert record["kl_after"] == StudentLoss(student, taught[:4], 8)() < record["kl_before"]
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(trained_factors(student))
    assert not any(parameter.requires_grad for parameter in student.parameters())
    again = load_model(compressed)
    assert heal(again, taught, taught[:4], settings, batch_size=8, seed=0) == record  # deterministic for a seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healing_that_does_not_help_is_taken_back(dense, compressed, dtype):
    """Trained on one text at a rate that is far too high, judged on another."""
    teacher, student = load_model(dense), load_model(compressed, dtype)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    settings = HealingSettings(steps=6, learning_rate=480.0)
    training, aside = teach(teacher, torch.full((2, 16), 7), 2), teach(teacher, torch.randint(2048, (4, 32)), 2)
    record = heal(student, training, aside, settings, batch_size=2, seed=0)
    assert record["kl_after"] == record["kl_before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_healing_goes_on_to_the_same_factors(dense, compressed, dtype):
    """Reference: the undisturbed run, bit for bit."""
    taught, states = teach(load_model(dense), torch.randint(2048, (10, 16)), 8), []
    given: Any = (taught, taught[:4], HealingSettings(steps=7, learning_rate=3.4))

    def keep(state: HealingState) -> None:
        states.append(copy.deepcopy(state))

    student, again = load_model(compressed, dtype), load_model(compressed, dtype)
    expected = heal(student, *given, batch_size=4, seed=3, on_progress=keep)
    assert [len(state.records) for state in states] == list(range(1, 8))
    shown = []
    record = heal(again, *given, batch_size=4, seed=3, begun=states[2], on_step=shown.append)
    assert record == expected and [each["step"] for each in shown] == [3, 4, 5, 6]
    assert expected["kl_after"] < expected["kl_before"]
    found, wanted = trained_factors(again), trained_factors(student)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_blocks_computed_again_for_the_gradient_change_nothing(dense, compressed):
    """Factors move while the backward pass runs: those of a block only when it has been computed again."""
    taught = teach(load_model(dense), torch.randint(2048, (8, 16)), 8)
    given: Any = (taught, taught[:4], HealingSettings(steps=3, learning_rate=3.4))
    students, runs = [load_model(compressed), load_model(compressed)], []
    expected = heal(students[0], *given, batch_size=4, seed=0)
    students[1].model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    found = heal(students[1], *given, batch_size=4, seed=0, kept_bytes=0)
    assert sum(runs) == 2 * 3
    assert found == expected
    pairs = zip(*(trained_factors(student).values() for student in students), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_batch_in_several_passes_gives_the_same_factors(dense, compressed):
    taught = teach(load_model(dense), torch.randint(2048, (7, 16)), 8)
    given: Any = (taught, taught[:4], HealingSettings(steps=3, learning_rate=3.4))
    students = [load_model(compressed), load_model(compressed)]
    expected = heal(students[0], *given, batch_size=5, seed=0)
    found = heal(students[1], *given, batch_size=5, seed=0, at_once=2)
    assert found["kl_after"] == pytest.approx(expected["kl_after"], rel=1e-3)
    before = load_model(compressed)
    for one, other, start in zip(*(trained_factors(each).values() for each in (*students, before)), strict=True):
        assert (one - other).norm() < 0.05 * (one - start).norm()


@pytest.mark.parametrize(
    ("tokens", "length", "processes", "windows"),
    [(512, 256, 1, 2), (512, 200, 1, 2), (512, 2048, 1, 1), (512, 16, 1, 8), (512, 2048, 4, 4), (1, 256, 16, 8)],
)
def test_windows_of_a_step_are_those_of_its_tokens_but_one_a_process_and_a_batch_at_most(
    tokens, length, processes, windows
):
    assert HealingSettings(step_tokens=tokens).step_windows(8, length, processes) == windows


def test_a_step_of_few_tokens_takes_a_part_of_a_batch(dense, compressed):
    """Reference: batches of as many windows, bit for bit."""
    taught = teach(load_model(dense), torch.randint(2048, (9, 16)), 8)
    few, large = (HealingSettings(steps=4, learning_rate=3.4, step_tokens=tokens) for tokens in (40, 1024))
    students = [load_model(compressed), load_model(compressed)]
    found = heal(students[0], taught, taught[:4], few, batch_size=8, seed=0)
    expected = heal(students[1], taught, taught[:4], large, batch_size=2, seed=0)
    assert found == expected and found["kl_after"] < found["kl_before"]
    pairs = zip(*(trained_factors(student).values() for student in students), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.long
def test_a_bfloat16_student_has_float32_factors_and_learns_as_much(dense, compressed):
    taught = teach(load_model(dense), torch.randint(2048, (16, 32)), 8)
    settings, gains = HealingSettings(steps=24, learning_rate=1.7), []
    for dtype in (torch.float32, torch.bfloat16):
        student = load_model(compressed, dtype)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        record = heal(student, taught, taught[:4], settings, batch_size=8, seed=0)
        gains.append(record["kl_before"] - record["kl_after"])
        factors = trained_factors(student)
        assert all(factor.dtype == torch.float32 for factor in factors.values())
        assert any(not torch.equal(factor, factor.bfloat16().float()) for factor in factors.values())
        rest = {name: tensor for name, tensor in student.state_dict().items() if name not in factors}
        assert all(torch.equal(tensor, before[name]) for name, tensor in rest.items())
    assert gains[1] == pytest.approx(gains[0], rel=0.05)


@torch.no_grad()
def test_rounding_solves_the_interpolation_against_the_rounded_skeleton(dense, compressed):
    """Reference: the output of the float32 layers; plain rounding of D is worse."""
    student = load_model(compressed)
    for parameter in trained_factors(student).values():  # not already representable in the narrow type
        parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    exact = {name: parameter.clone() for name, parameter in trained_factors(student).items()}
    rounded = rounded_factors(student, torch.bfloat16)
    assert rounded.keys() == exact.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in rounded.values())
    worse = 0
    for name, d in exact.items():
        if not name.endswith("interpolation"):
            assert torch.equal(rounded[name], d.to(torch.bfloat16))
            continue
        layer: Any = student.get_submodule(name.removesuffix(".interpolation"))
        x = torch.randn(64, layer.in_features)
        expected, skeleton_name = layer(x), name.replace("interpolation", "skeleton")
        layer.skeleton.copy_(rounded[skeleton_name].float())
        layer.interpolation.copy_(rounded[name].float())
        solved = (layer(x) - expected).norm()
        layer.interpolation.copy_(d.to(torch.bfloat16).float())
        worse += solved < (layer(x) - expected).norm()
    assert worse >= 0.8 * sum(name.endswith("interpolation") for name in exact)


def test_a_dense_model_has_nothing_to_heal(dense):
    with pytest.raises(StructureError, match="no compressed layer"):
        model = load_model(dense)
        taught = teach(model, torch.randint(2048, (2, 8)), 8)
        heal(model, taught, taught, HealingSettings(steps=1), batch_size=8, seed=0)


@torch.no_grad()
def test_a_loss_that_is_not_finite_is_an_error(dense, compressed):
    student = load_model(compressed)
    student.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="KL is nan before healing"):
        taught = teach(load_model(dense), torch.randint(2048, (2, 8)), 8)
        heal(student, taught, taught, HealingSettings(steps=1), batch_size=8, seed=0)


def test_given_matrices_of_a_dense_student_are_trained_instead(dense):
    """A model whose blocks were disturbed comes back towards the undisturbed one, by these matrices alone."""
    student = load_model(dense)
    taught = teach(load_model(dense), torch.randint(2048, (16, 32)), 8)
    weights = {name: p for name, p in student.named_parameters() if name.endswith("_proj.weight")}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.3 * weight.square().mean().sqrt() * torch.randn_like(weight)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    record = heal(
        student, taught, taught[:4], HealingSettings(steps=40, learning_rate=0.6), batch_size=8, seed=0, factors=weights
    )
    assert record["kl_after"] == StudentLoss(student, taught[:4], 8)() < 0.7 * record["kl_before"]
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(weights)
