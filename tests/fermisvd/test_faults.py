"""Every broken checkpoint is refused by transformers' loading and by the check before serving, with the same words."""

import shutil

import pytest

from fermisvd.errors import FermiSVDError
from fermisvd.format import validate_before_serving
from fermisvd.hf import check_architecture, load_model
from tests.support.faults import FAULTS, SVD_FAULTS, edit_config

ALL = [("pivga", *item) for item in FAULTS.items()] + [("svd", *item) for item in SVD_FAULTS.items()]
NAMES = [f"{form} {fault}" for form, fault, _ in ALL]


@pytest.mark.parametrize(("form", "fault", "spec"), ALL, ids=NAMES)
def test_from_pretrained_refuses(form, fault, spec, family_checkpoints, tmp_path):
    folder = shutil.copytree(family_checkpoints("llama", form)[1], tmp_path / "broken")
    spoil, words = spec
    spoil(folder)
    with pytest.raises(FermiSVDError) as caught:
        load_model(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize(("form", "fault", "spec"), ALL, ids=NAMES)
def test_check_before_serving_refuses(form, fault, spec, family_checkpoints, tmp_path):
    """All but the values of factors, which a server checks as it loads them."""
    if "in a factor" in fault:
        pytest.skip("values of factors are checked while they load: test_serve.py")
    folder = shutil.copytree(family_checkpoints("llama", form)[1], tmp_path / "broken")
    spoil, words = spec
    spoil(folder)
    with pytest.raises(FermiSVDError) as caught:
        validate_before_serving(folder)
        check_architecture(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_code_of_its_own_switches_no_check_off(family_checkpoints, tmp_path):
    """Many checkpoints that transformers knows carry auto_map, too."""
    folder = shutil.copytree(family_checkpoints("llama", "pivga")[1], tmp_path / "broken")
    FAULTS["another width"][0](folder)
    edit_config(folder, lambda config: config.update(auto_map={"AutoConfig": "configuration.Config"}))
    with pytest.raises(FermiSVDError, match="144"):
        check_architecture(folder)


def test_model_that_transformers_does_not_know_is_left_to_the_layers(family_checkpoints, tmp_path, caplog):
    folder = shutil.copytree(family_checkpoints("llama", "pivga")[1], tmp_path / "unknown")
    edit_config(folder, lambda config: config.update(model_type="unheard_of"))
    check_architecture(folder)
    assert "layer by layer" in caplog.text
