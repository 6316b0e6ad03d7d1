"""Every broken checkpoint is refused by transformers' loading and by the check before serving, with the same words."""

import shutil

import pytest

from faults import FAULTS
from fermisvd.errors import FermiSVDError
from fermisvd.format import validate_before_serving
from fermisvd.hf import check_architecture, load_model


@pytest.mark.parametrize("fault", FAULTS)
def test_from_pretrained_refuses(fault, family_checkpoints, tmp_path):
    folder = shutil.copytree(family_checkpoints("llama", "pivga")[1], tmp_path / "broken")
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(FermiSVDError) as caught:
        load_model(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("fault", [name for name in FAULTS if "in a factor" not in name])
def test_check_before_serving_refuses(fault, family_checkpoints, tmp_path):
    """All but the values of factors, which a server checks as it loads them."""
    folder = shutil.copytree(family_checkpoints("llama", "pivga")[1], tmp_path / "broken")
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(FermiSVDError) as caught:
        validate_before_serving(folder)
        check_architecture(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
