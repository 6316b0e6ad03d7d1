import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from fermisvd.errors import FermiSVDError, OptionError, OutputError
from fermisvd.format import validate_checkpoint
from fermisvd_convert import heal, heal_room, source, workspace
from fermisvd_convert.convert import convert
from fermisvd_convert.heal import heal_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory, demo_model, demo_text):
    """A real model: what healing learns from one text must help on another."""
    out = tmp_path_factory.mktemp("heal") / "half"
    options = {"ranks": "uniform", "samples": 32, "sequence_length": 64, "heal_steps": 0, "refit": False}
    convert(str(demo_model), out, 0.5, calibration=[str(demo_text["calibration"])], **options)
    return demo_model, out


@pytest.fixture
def settings(models, demo_text):
    return dict(text=[str(demo_text["calibration"])], teacher=str(models[0]), steps=40, samples=256, sequence_length=64)


@pytest.mark.long
def test_healed_checkpoint_is_whole_and_better(models, settings, tmp_path):
    _, compressed = models
    path = compressed / "fermisvd.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"by_hand": 1}))
    record = heal_checkpoint(compressed, tmp_path / "healed", **settings)
    healed = tmp_path / "healed"
    files = sorted([*written["files"], "healing.json"])
    assert json.loads((healed / "fermisvd.json").read_text()) == written | {"by_hand": 1, "files": files}
    assert validate_checkpoint(healed) == validate_checkpoint(compressed)
    assert record["after"]["kl"] < record["before"]["kl"]
    assert json.loads((healed / "healing.json").read_text())["steps"] == 40
    assert "Healed: 40 steps" in (healed / "README.md").read_text()
    old, new = (load_file(folder / "model.safetensors") for folder in (compressed, healed))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.rpartition(".")[2] in ("skeleton", "interpolation")}
    assert {p.name for p in healed.iterdir()} - {p.name for p in compressed.iterdir()} == {"healing.json"}


def test_an_interrupted_healing_goes_on(models, settings, tmp_path, monkeypatch):
    """To the factors of an undisturbed one, without the steps that were done; and nothing is left beside them."""
    _, compressed = models
    settings |= {"steps": 5, "samples": 32}
    heal_checkpoint(compressed, tmp_path / "expected", **settings)
    monkeypatch.setattr(workspace, "STATE_SECONDS", 0)
    monkeypatch.setattr(workspace, "STATE_PAUSE", 0)
    steps, original = [], heal.heal

    def interrupted(*given, on_step, on_progress, **named):
        def kept(state):
            on_progress(state)
            if len(state.records) == 3:
                raise KeyboardInterrupt

        return original(*given, on_step=on_step, on_progress=kept, **named)

    monkeypatch.setattr(heal, "heal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(compressed, tmp_path / "healed", **settings)
    assert not (tmp_path / "healed").exists()
    monkeypatch.setattr(heal, "heal", lambda *a, on_step, **n: original(*a, on_step=steps.append, **n))
    heal_checkpoint(compressed, tmp_path / "healed", **settings)
    assert [each["step"] for each in steps] == [3, 4]
    found, wanted = (tmp_path / name / "model.safetensors" for name in ("healed", "expected"))
    assert found.read_bytes() == wanted.read_bytes()
    assert not list((tmp_path / ".fermisvd").glob("*.work"))


def test_a_small_machine_takes_smaller_passes_or_is_refused(models, settings, tmp_path, monkeypatch, caplog):
    _, compressed = models
    settings |= {"steps": 2, "samples": 16, "compute": "float32"}
    whole = heal_checkpoint(compressed, tmp_path / "whole", **settings)
    monkeypatch.setattr(heal_room, "memory_of", lambda *_: 40_000_000)
    asked, original = [], heal.teach
    monkeypatch.setattr(heal, "teach", lambda *given: asked.append(given[2]) or original(*given))
    fewer = heal_checkpoint(compressed, tmp_path / "fewer", **settings)
    assert set(asked) == {1} and "memory has room for passes of 1 windows" in caplog.text
    assert [step["kl"] for step in fewer["trace"]] == pytest.approx([step["kl"] for step in whole["trace"]], rel=1e-3)
    for room, step in ((20_000_000, "healing"), (4_000_000, "the dense model")):
        monkeypatch.setattr(heal_room, "memory_of", lambda *_, room=room: room)
        with pytest.raises(OptionError, match=rf"{step} takes about .*\(what the machine has\); give more"):
            heal_checkpoint(compressed, tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()


def test_teacher_and_student_are_given_back(models, settings, tmp_path, monkeypatch):
    """Each before the next is loaded: memory is counted so."""
    loaded, original = [], heal.load_dense_or_compressed

    def load(*given):
        assert not [each for each in loaded if each() is not None]
        model = original(*given)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(heal, "load_dense_or_compressed", load)
    monkeypatch.setattr(source, "load_dense_or_compressed", load)
    heal_checkpoint(models[1], tmp_path / "healed", **settings | {"steps": 2, "samples": 16})
    assert len(loaded) == 3


def test_a_checkpoint_without_a_record_is_healed(models, settings, tmp_path):
    """As fermisvd.compress and save_pretrained leave it."""
    compressed = shutil.copytree(models[1], tmp_path / "compressed")
    (compressed / "fermisvd.json").unlink()
    record = heal_checkpoint(compressed, tmp_path / "healed", **settings | {"steps": 2, "samples": 16})
    assert len(record["trace"]) == 2 and not (tmp_path / "healed" / "fermisvd.json").exists()


def test_a_full_disk_is_refused_before_the_work(models, settings, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1000))
    with pytest.raises(OutputError, match=r"no space: .* a copy of the checkpoint "):
        heal_checkpoint(models[1], tmp_path / "none", **settings)
    assert not list(tmp_path.iterdir())


def test_refusals_leave_nothing_behind(models, settings, tmp_path):
    dense, compressed = models
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="there: exists"):
        heal_checkpoint(compressed, tmp_path / "there", **settings)
    with pytest.raises(FermiSVDError, match=r"config\.json"):
        heal_checkpoint(dense, tmp_path / "a", **settings)
    with pytest.raises(FermiSVDError, match="give the dense model by --teacher"):
        heal_checkpoint(compressed, tmp_path / "b", **settings | {"teacher": None})
    with pytest.raises(FermiSVDError, match="nowhere"):
        heal_checkpoint(compressed, tmp_path / "c", **settings | {"teacher": str(tmp_path / "nowhere")})
    other = shutil.copytree(dense, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FermiSVDError, match="not the model that"):
        heal_checkpoint(compressed, tmp_path / "d", **settings | {"teacher": str(other)})
    shutil.rmtree(other)
    with pytest.raises(OutputError, match="lies inside"):
        heal_checkpoint(compressed, compressed / "inside", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
