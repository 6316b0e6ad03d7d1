from typing import Any

import pytest
import torch

from fermisvd import load_model
from fermisvd.errors import NumericalError
from fermisvd.groups import StructureError
from fermisvd.healing import HealingSettings, heal, rounded_factors, trained_factors
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
    start, settings = loss(), HealingSettings(steps=60, learning_rate=0.3)
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


def test_healing_that_does_not_help_is_taken_back(dense, compressed):
    """Trained on one text at a rate that is far too high, judged on another."""
    teacher, student = load_model(dense), load_model(compressed)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    settings = HealingSettings(steps=6, learning_rate=30.0)
    training, aside = teach(teacher, torch.full((2, 16), 7), 2), teach(teacher, torch.randint(2048, (4, 32)), 2)
    record = heal(student, training, aside, settings, batch_size=2, seed=0)
    assert record["kl_after"] == record["kl_before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


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
