"""The method in memory. Reference: the converter, which does the same by blocks, through files."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fermisvd
from fermisvd import compress, load_model, validate_checkpoint
from fermisvd.errors import OptionError
from fermisvd_convert.convert import convert
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import calibration_text

LENGTH, SAMPLES, BATCH = 32, 16, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    return path


@pytest.fixture(scope="module")
def windows(tiny_llama, text):
    return calibration_text(load_tokenizer(tiny_llama), [str(text)], SAMPLES, LENGTH).windows


SETTINGS = {
    "default": dict(steps=6, heal_steps=4),
    "uniform, joint, input, refitted": dict(ranks="uniform", groups="joint", whitening="input", heal_steps=0),
    "uniform, rescaled": dict(ranks="uniform", groups="separate", heal_steps=0, refit=False, rescale=True),
}


@pytest.mark.long
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_the_converter_gives_the_same(tiny_llama, text, windows, tmp_path, form, settings):
    """Ranks and groups are equal; logits as close as sums in another order leave them."""
    options = dict(form=form, align=1, batch_size=BATCH, compute="float32", **SETTINGS[settings])
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = copy.deepcopy(dense.state_dict())
    small = compress(dense, windows, 0.3, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    out, cut = tmp_path / "converted", dict(samples=SAMPLES, gradient_samples=SAMPLES, sequence_length=LENGTH)
    cut["heal_samples"] = SAMPLES
    convert(tiny_llama, out, 0.3, calibration=[str(text)], **options, **cut)
    small.save_pretrained(tmp_path / "saved")
    assert validate_checkpoint(tmp_path / "saved").groups == validate_checkpoint(out).groups
    saved, written = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", out))
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in written.items()}
    with torch.no_grad():
        expected = load_model(out)(input_ids=windows[:4]).logits
        found = small(input_ids=windows[:4]).logits
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * expected.std().item())
        assert torch.equal(load_model(tmp_path / "saved")(input_ids=windows[:4]).logits, found)


def test_a_narrow_model_stays_narrow(tiny_llama, windows, tmp_path):
    """bfloat16 in, bfloat16 out, healed in float32 and rounded once."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    small = compress(dense, windows, 0.3, steps=4, heal_steps=4, batch_size=BATCH)
    assert {t.dtype for t in small.state_dict().values()} == {torch.bfloat16, torch.int32}
    small.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=windows[:2]).logits, small(input_ids=windows[:2]).logits)


def test_what_cannot_be_compressed_is_refused(tiny_llama, windows):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    quick = dict(ranks="uniform", groups="joint", heal_steps=0, refit=False)
    for wrong in (
        windows[0],
        windows[:1],
        windows.float(),
        windows.bool(),
        windows.tolist(),
        windows - 5000,
        windows + 5000,
    ):
        with pytest.raises(OptionError, match=r"^windows (are token ids|hold tokens)"):
            compress(dense, wrong, 0.3, **quick)
    with pytest.raises(OptionError, match="between 0 and 1"):
        compress(dense, windows, 1.5, **quick)
    with pytest.raises(OptionError, match=r"^--heal-steps: "):
        compress(dense, windows, 0.3, **quick | {"heal_steps": -1})
    with pytest.raises(OptionError, match=r"^--ranks: "):
        compress(dense, windows, 0.3, **quick | {"ranks": "greedy"})
    with pytest.raises(OptionError, match="compressed already"):
        compress(compress(dense, windows, 0.3, **quick), windows, 0.3, **quick)


def test_what_is_public_is_there():
    assert all(hasattr(fermisvd, name) for name in fermisvd.__all__)


@pytest.mark.long
def test_quickstart(smallest_llama, text, tmp_path):
    """As a user runs it: what it saved is a checkpoint, loads and is smaller."""
    script = Path(__file__).parents[2] / "examples" / "quickstart.py"
    command = [sys.executable, str(script), str(smallest_llama), str(text), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = (int(word.replace(",", "")) for word in re.findall(r"[\d,]+(?= parameters| after)", result.stdout))
    assert validate_checkpoint(tmp_path / "out").groups and after < before
    assert load_tokenizer(tmp_path / "out")("def f(x):")["input_ids"]
    load_model(tmp_path / "out")
