import json

import pytest
import torch
from safetensors.torch import load_file

from families import compress, save
from fermisvd.errors import FermiSVDError
from fermisvd.format import validate_checkpoint
from fermisvd_convert.convert import OutputError
from fermisvd_convert.heal import heal_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory, demo_text):
    dense = save("llama", tmp_path_factory.mktemp("heal") / "llama")
    return dense, compress(dense, "pivga", demo_text["calibration"], dense.parent / "work")


@pytest.fixture
def settings(models, demo_text):
    return dict(text=[str(demo_text["calibration"])], teacher=str(models[0]), steps=40, samples=200, sequence_length=32)


def test_healed_checkpoint_is_whole_and_better(models, settings, tmp_path):
    _, compressed = models
    record = heal_checkpoint(compressed, tmp_path / "healed", **settings)
    healed = tmp_path / "healed"
    assert validate_checkpoint(healed) == validate_checkpoint(compressed)
    assert record["after"]["kl"] < record["before"]["kl"]
    assert json.loads((healed / "healing.json").read_text())["steps"] == 40
    assert "Healed: 40 steps" in (healed / "README.md").read_text()
    old, new = (load_file(folder / "model.safetensors") for folder in (compressed, healed))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.rpartition(".")[2] in ("skeleton", "interpolation")}
    assert {p.name for p in healed.iterdir()} - {p.name for p in compressed.iterdir()} == {"healing.json"}


def test_refusals_leave_nothing_behind(models, settings, tmp_path):
    dense, compressed = models
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there: exists"):
        heal_checkpoint(compressed, tmp_path / "there", **settings)
    with pytest.raises(FermiSVDError, match=r"config\.json"):
        heal_checkpoint(dense, tmp_path / "a", **settings)
    with pytest.raises(FermiSVDError, match="give the dense model by --teacher"):
        heal_checkpoint(compressed, tmp_path / "b", **settings | {"teacher": None})
    with pytest.raises(FermiSVDError, match="nowhere"):
        heal_checkpoint(compressed, tmp_path / "c", **settings | {"teacher": str(tmp_path / "nowhere")})
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
