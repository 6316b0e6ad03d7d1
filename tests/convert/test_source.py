"""Where a model is, what it is called and what its config says, by whatever names."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fermisvd_convert import source as source_module
from fermisvd_convert.convert import convert
from fermisvd_convert.loading import SourceError, context_length, load_tokenizer
from fermisvd_convert.source import OTHER_WEIGHTS, SLICE, folder_name, open_source
from tests.support.folders import in_hub_cache


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    return path


QUICK = dict(ranks="uniform", groups="joint", heal_steps=0, refit=False, samples=8, sequence_length=32)


@pytest.mark.parametrize(
    ("given", "name"),
    [("a/model", "model"), ("a/model/", "model"), (".", "here"), ("..", "above"), ("sub/..", "here"), ("./", "here")],
)
def test_a_folder_has_its_last_name_however_it_is_written(tmp_path, monkeypatch, given, name):
    (tmp_path / "above" / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert folder_name(given) == name


def test_model_as_dot_and_dot_dot(smallest_llama, tmp_path, monkeypatch, text):
    """Its name is in card and record, and the work directory is below .fermisvd, not OUT's parent."""
    model = shutil.copytree(smallest_llama, tmp_path / "a" / "model")
    (model / "sub").mkdir()
    mine = tmp_path / "b" / "hidden-project"
    mine.mkdir(parents=True)
    (mine / "a").write_text("mine")
    for given, here in ((".", model), ("..", model / "sub")):
        monkeypatch.chdir(here)
        out = tmp_path / "b" / f"out{len(given)}"
        record = convert(given, out, 0.3, calibration=[str(text)], **QUICK)
        assert record.model == "model"
        assert "# model, " in (out / "README.md").read_text()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {".fermisvd", "hidden-project", "out1", "out2"}
    assert (mine / "a").read_text() == "mine"
    assert (tmp_path / "b" / ".fermisvd" / "stages" / "model" / "manifest.jsonl").is_file()


def test_a_hub_models_commit_is_recorded_and_a_folders_is_not(smallest_llama, tmp_path, monkeypatch, text):
    in_hub_cache(tmp_path / "hub", "lab/base", smallest_llama, commit="0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    record = convert("lab/base", tmp_path / "out", 0.3, revision="main", calibration=[str(text)], **QUICK)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record.revision == config["quantization_config"]["provenance"]["revision"] == "0123abc"
    assert "(revision `0123abc`)" in (tmp_path / "out" / "README.md").read_text()
    assert open_source(str(smallest_llama)).revision is None


def test_a_tokenizers_bin_file_is_downloaded_and_pickles_are_not():
    from huggingface_hub.utils import filter_repo_objects

    files = ["vocab.bin", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf", "model.safetensors"]
    assert list(filter_repo_objects(files, ignore_patterns=OTHER_WEIGHTS)) == ["vocab.bin", "model.safetensors"]


CONTEXTS = {
    "LlamaConfig": dict(max_position_embeddings=77),
    "GPT2Config": dict(n_positions=77),
    "GPTJConfig": dict(n_positions=77),
    "CodeGenConfig": dict(n_positions=77),
    "GPTBigCodeConfig": dict(n_positions=77),
    "OPTConfig": dict(max_position_embeddings=77),
    "BloomConfig": {},
    "Gemma3Config": dict(text_config=dict(max_position_embeddings=77, num_hidden_layers=5)),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_context_is_found_under_every_name(kind, tmp_path):
    """Also after config.json was written and read again, which is what a converter sees."""
    config = getattr(transformers, kind)(**CONTEXTS[kind])
    config.save_pretrained(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert context_length(config) == context_length(read) == (77 if CONTEXTS[kind] else None)


@pytest.mark.parametrize("asked", [None, 64, 129])
@pytest.mark.parametrize("kind", ["GPTBigCodeConfig", "GPTJConfig", "CodeGenConfig"])
def test_models_with_n_positions_convert_with_default_length(kind, asked, demo_model, tmp_path, text):
    """Learnt or rotary positions of 128: beyond them is refused, not an IndexError."""
    settings = dict(vocab_size=2048, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    more = {} if kind == "GPTBigCodeConfig" else dict(rotary_dim=8, tie_word_embeddings=False)
    config = getattr(transformers, kind)(**settings, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(demo_model).save_pretrained(tmp_path / "model")
    options = QUICK | dict(sequence_length=asked, calibration=[str(text)])
    if asked == 129:
        with pytest.raises(SourceError, match="--sequence-length 129: must be 2 to 128"):
            convert(str(tmp_path / "model"), tmp_path / "out", 0.3, **options)
        return
    record = convert(str(tmp_path / "model"), tmp_path / "out", 0.3, **options)
    assert record.settings["sequence_length"] == (asked or 128)


def damaged(kind: str):
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        if kind == "list":
            content = [1]
        elif kind == "no such model":
            content["model"]["type"] = "NotAModel"
        elif kind == "no such pre-tokenizer":
            content["pre_tokenizer"] = {"type": "Nope"}
        elif kind == "empty object":
            content = {}
        elif kind == "empty vocabulary":
            content |= {"added_tokens": [], "model": content["model"] | {"vocab": {}, "merges": []}}
        path.write_text(json.dumps(content))

    return change


def settings_of(**entries):
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x00\x01garbage")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


def none(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


TOKENIZERS = {
    "a list": damaged("list"),
    "a kind that tokenizers does not know": damaged("no such model"),
    "a pre-tokenizer that it does not know": damaged("no such pre-tokenizer"),
    "an empty object": damaged("empty object"),
    "an empty vocabulary": damaged("empty vocabulary"),
    "special tokens as a list": settings_of(extra_special_tokens=["a"]),
    "code of its own": settings_of(auto_map={"AutoTokenizer": ["tok.Tok", None]}),
    "settings that are no JSON": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "settings that are no object": lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
    "a sentencepiece model that is none": sentencepiece,
    "none": none,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_either_gives_tokens_or_is_refused_in_one_line(smallest_llama, tmp_path, kind):
    folder = shutil.copytree(smallest_llama, tmp_path / "model")
    TOKENIZERS[kind](folder)
    try:
        tokenizer = load_tokenizer(folder)
    except SourceError as error:
        assert str(error).startswith((f"{folder}: no usable tokenizer: ", f"{folder}/tokenizer_config.json: "))
        assert "\n" not in str(error)
        assert "trust_remote_code" not in str(error)  # the option is called --trust-remote-code
    else:
        assert len(tokenizer("def f(x): return x")["input_ids"]) > 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_no_truncated_one(smallest_llama, tmp_path):
    folder = shutil.copytree(smallest_llama, tmp_path / "model")
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(Exception, match=r"model\.safetensors: cannot be read \(.*[Pp]ermission"):
        open_source(str(folder))


@pytest.mark.parametrize("per_slice", [64, SLICE])
def test_one_reading_checks_every_number_and_hashes_every_byte(tiny_llama, tmp_path, monkeypatch, per_slice):
    """Reference: the files' own SHA-256; and NaN as first, middle or last number of any tensor is found."""
    monkeypatch.setattr(source_module, "SLICE", per_slice)
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    file, source = folder / "model.safetensors", open_source(str(folder))
    config = hashlib.sha256((folder / "config.json").read_bytes())
    config.update(hashlib.sha256(file.read_bytes()).digest())
    assert source.check_values() == config.hexdigest()
    tensors = load_file(file)
    for name, tensor in list(tensors.items())[::5]:
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            spoilt = tensor.clone()
            spoilt.view(-1)[place] = float("nan")
            save_file(tensors | {name: spoilt}, file, metadata={"format": "pt"})
            with pytest.raises(SourceError, match=f"{re.escape(name)}: holds NaN"):
                source.check_values()
            spoilt.view(-1)[place] = 1e30
            save_file(tensors | {name: spoilt}, file, metadata={"format": "pt"})
            with pytest.raises(SourceError, match=f"{re.escape(name)}: holds values too large for --dtype float16"):
                source.check_values(torch.float16)
            assert source.check_values() != config.hexdigest()


def test_a_model_is_read_once(tiny_llama, monkeypatch):
    """Bytes that are read, by a count of them, and none but those of a slice are held."""
    source, read, held = open_source(str(tiny_llama)), [], []
    plain = source_module.torch.frombuffer
    monkeypatch.setattr(source_module, "SLICE", 512)

    def see(data, dtype):
        read.append(len(data))
        held.append(len(data.obj))
        return plain(data, dtype=dtype)

    monkeypatch.setattr(source_module.torch, "frombuffer", see)
    source.check_values()
    assert sum(read) == sum(info.bytes for info in source.headers.values()) and max(held) == 8 * 512
