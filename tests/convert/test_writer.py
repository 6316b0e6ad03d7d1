"""What of a dense model's folder reaches OUT."""

import json
import os
import shutil

import pytest
import torch

from fermisvd.errors import NumericalError
from fermisvd.files import is_pickle
from fermisvd.format import validate_before_serving
from fermisvd_convert.convert import convert
from fermisvd_convert.output import place_of
from fermisvd_convert.writer import copied_files

COPIED = {
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "LICENSE": b"free",
    "nested/deeper/notes.txt": b"notes",
    "vocab.bin": b"\x00\x01a vocabulary of a tokenizer's own",
    "tokenizer.model": b"\x0apieces",
    "nested/README.md": b"of the folder, not of the model",
    "preprocessor/config.json": b"{}",
}
LEFT = {
    "consolidated.safetensors": b"",
    "model.gguf": b"GGUF",
    "onnx/model.onnx": b"",
    "onnx/model.onnx_data": b"",
    "original/consolidated.00.pth": b"PK",
    "tf_model.h5": b"",
    "pytorch_model-00001-of-00002.bin": b"PK\x03\x04",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"PK\x03\x04",
    "adapter/adapter_config.json": b"{}",
    "adapter/adapter_model.safetensors": b"",
    "openvino/openvino_model.bin": b"\x00",
}
NEITHER = {".gitattributes": b"", ".git/config": b"", ".cache/huggingface/x": b"", "README.md": b"of the dense model"}


@pytest.fixture
def folder(smallest_llama, tmp_path):
    folder = shutil.copytree(smallest_llama, tmp_path / "model")
    for name, content in (COPIED | LEFT | NEITHER).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_all_but_weights_is_copied_whatever_its_folder(folder, tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    options = dict(ranks="uniform", heal_steps=0, samples=8, sequence_length=32, calibration=[str(text)])
    record = convert(str(folder), tmp_path / "out", 0.3, **options)
    for name, content in COPIED.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    assert not any((tmp_path / "out" / name).exists() for name in LEFT)
    assert not any((tmp_path / "out" / name).exists() for name in NEITHER.keys() - {"README.md"})
    assert "fermisvd" in (tmp_path / "out" / "README.md").read_text()
    assert set(record.left_out.files) == LEFT.keys()
    assert f"not copied to OUT: {len(LEFT)} files" in caplog.text
    assert json.loads((tmp_path / "out" / "fermisvd.json").read_text())["left_out"] == record.left_out.model_dump()
    validate_before_serving(tmp_path / "out")  # vocab.bin is no pickle


def test_files_that_are_links_are_copied_and_a_broken_one_is_passed_over(folder):
    """As in the hub's cache, where each file is a link."""
    (folder / "linked.txt").symlink_to(folder / "LICENSE")
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    copied = {path.as_posix() for path in copied_files(folder)[0]}
    assert "linked.txt" in copied and "broken.txt" not in copied


def test_pickles_are_known_by_name_and_by_content(tmp_path):
    """Reference: what torch.save and pickle write, in every protocol."""
    import pickle

    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"{protocol}.bin").write_bytes(pickle.dumps({"a": 1}, protocol))
        assert is_pickle(tmp_path / f"{protocol}.bin")
    for name in ("new.bin", "old.bin"):
        torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=name == "new.bin")
        assert is_pickle(tmp_path / name)
    (tmp_path / "vocab.bin").write_bytes(b"words")
    (tmp_path / "model.pt").write_bytes(b"anything")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert not is_pickle(tmp_path / "vocab.bin")
    assert is_pickle(tmp_path / "model.pt") and is_pickle(tmp_path / "pytorch_model.bin")


@pytest.fixture
def smallest(smallest_llama, tmp_path):
    """Options of a quick conversion, the first one's files of weights in `one`."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    options = dict(ranks="uniform", groups="joint", heal_steps=0, refit=False, samples=8, sequence_length=32)
    options |= {"calibration": [str(text)], "work": tmp_path / "work"}
    convert(str(smallest_llama), tmp_path / "one", 0.3, **options)
    return options


def test_several_at_work_write_what_one_does(smallest_llama, tmp_path, smallest, monkeypatch):
    """As beside a GPU, here on a CPU."""
    monkeypatch.setattr("fermisvd_convert.conversion.workers_beside", lambda *_: 3)
    convert(str(smallest_llama), tmp_path / "three", 0.3, **smallest)
    one, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "three"))
    assert one == three


def test_an_error_of_one_at_work_is_the_conversions(smallest_llama, tmp_path, smallest, monkeypatch):
    def overflow(ranked, *_):
        raise NumericalError(f"{ranked.group.name}: the factors overflow")

    monkeypatch.setattr("fermisvd_convert.conversion.workers_beside", lambda *_: 3)
    monkeypatch.setattr("fermisvd_convert.writer.group_tensors", overflow)
    with pytest.raises(NumericalError, match=r"layers\.0.*: the factors overflow"):
        convert(str(smallest_llama), tmp_path / "three", 0.3, **smallest)
    assert not (tmp_path / "three").exists() and not place_of(tmp_path / "three").new.exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_are_for_those_who_may_read_new_files(tmp_path, mask):
    from fermisvd_convert.writer import usual_mode

    before = os.umask(mask)
    try:
        assert usual_mode() == 0o666 & ~mask
        (tmp_path / "new").touch()
        assert (tmp_path / "new").stat().st_mode & 0o777 == usual_mode()
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
