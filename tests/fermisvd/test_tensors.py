"""One folder, one model: what is streamed, what from_pretrained loads and what is written are the same weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fermisvd import load_model
from fermisvd.errors import FormatError
from fermisvd.files import read_headers
from fermisvd.format import validate_before_serving
from fermisvd.running.streaming import stream_model
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.source import open_source
from fermisvd_convert.text import calibration_text
from tests.support.folders import SAME, TWO_MODELS

TIED = [name for name in SAME if name.startswith("tied")]
OTHERS = ["names without their prefix", "more layers", "buffers of an old version", "shards, a tensor not listed"]


@pytest.fixture
def folder(smallest_llama, tmp_path):
    return shutil.copytree(smallest_llama, tmp_path / "model")


@pytest.mark.parametrize("kind", SAME)
@torch.no_grad()
def test_streamed_logits_are_those_of_from_pretrained(folder, kind):
    """Reference: transformers' own loading, which knows nothing of us."""
    SAME[kind](folder)
    ids = torch.randint(2048, (2, 12))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    expected = reference(input_ids=ids).logits
    assert torch.equal(stream_model(folder, "cpu")(input_ids=ids).logits, expected)
    assert torch.equal(load_model(folder)(input_ids=ids).logits, expected)
    source = open_source(str(folder))
    parameters = dict(reference.named_parameters())
    assert source.headers.keys() == parameters.keys()
    assert all(torch.equal(source.tensor(name).float(), parameters[name]) for name in parameters)


@pytest.mark.parametrize("kind", TWO_MODELS)
def test_what_two_readers_would_read_differently_is_refused_by_every_stage(folder, kind):
    spoil, words = TWO_MODELS[kind]
    spoil(folder)
    for read in (
        lambda: stream_model(folder, "cpu"),
        lambda: load_model(folder),
        lambda: open_source(str(folder)),
    ):
        with pytest.raises(FormatError) as error:
            read()
        assert all(word in str(error.value) for word in (*words, str(folder))), str(error.value)


def compress(folder, tmp_path, **settings):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    options = dict(ranks="uniform", heal_steps=0, samples=8, sequence_length=32, calibration=[str(text)], align=1)
    options |= dict(compute="float32")
    return convert(str(folder), tmp_path / "out", 0.3, **{**options, **settings}), text


@pytest.mark.parametrize("kind", [*TIED, *OTHERS])
def test_out_has_the_models_tensors_and_the_record_is_of_them(folder, tmp_path, kind, caplog):
    """Recorded perplexities against those of the models that transformers loads; what is left out is told."""
    SAME[kind](folder)
    before = set(load_file(folder / "model.safetensors")) if (folder / "model.safetensors").exists() else set()
    record, text = compress(folder, tmp_path)
    out = tmp_path / "out"
    held_back = calibration_text(load_tokenizer(folder), [str(text)], 8, 32).held_back
    for model, when in ((folder, "before"), (out, "after")):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert evaluate(loaded, held_back).perplexity == pytest.approx(getattr(record.perplexity, when), rel=1e-5)
    stored, state = read_headers(out), loaded.state_dict()
    assert stored.keys() <= state.keys()
    assert ("lm_head.weight" in stored) == (kind not in TIED)  # vLLM ties by the embedding's name
    assert "model.embed_tokens.weight" in stored
    left = record.left_out.tensors
    assert set(left) == {name for name in before if "layers.2." in name or "inv_freq" in name}
    assert all(name in caplog.text for name in left[:5])
    assert record.bytes.after == sum(t.nbytes for t in load_file(out / "model.safetensors").values())


SERVED = {
    "a pickle": lambda out: (out / "pytorch_model.bin").write_bytes(b""),
    "further weights": lambda out: shutil.copy(out / "model.safetensors", out / "extra.safetensors"),
    "an adapter's config": lambda out: (out / "adapter_config.json").write_text("{}"),
    "shards beside": lambda out: (out / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}'
    ),
}


def test_a_checkpoint_beside_other_weights_is_not_served(folder, tmp_path):
    """vLLM would read them too, or instead."""
    compress(folder, tmp_path)
    validate_before_serving(tmp_path / "out")
    for name, spoil in SERVED.items():
        spoilt = shutil.copytree(tmp_path / "out", tmp_path / name)
        spoil(spoilt)
        with pytest.raises(FormatError, match=r"remove|move away"):
            validate_before_serving(spoilt)
