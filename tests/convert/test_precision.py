"""bfloat16 passes beside float32 ones: the same ranks but for a little, and the same quality."""

import pytest
import torch
from transformers import PretrainedConfig

from fermisvd import load_model
from fermisvd.precision import NARROW, compute_type, width_of
from fermisvd_convert.convert import convert
from tests.support import DEMO_MODEL
from tests.support.families import FAMILIES, UNSERVED, save
from tests.support.stdlib_text import training_documents

FAST = pytest.mark.skipif(
    compute_type("auto", "cpu", 4096) != torch.bfloat16, reason="minutes on a CPU without bfloat16"
)


def converted(model, text, folder, **settings):
    """Records by the type of the passes. FermiGrad and joining, neither refitted nor healed."""
    options = dict(calibration=[str(text)], bos=False, samples=128, gradient_samples=128, sequence_length=256)
    options |= dict(heal_steps=0, refit=False, align=1) | settings
    return {
        compute: convert(str(model), folder / compute, 0.3, work=folder / "work", compute=compute, **options)
        for compute in ("float32", "bfloat16")
    }


def check(records, perplexity=0.005, ranks=0.01):
    """ranks: mean difference of a group's rank over its full rank."""
    exact, narrow = records["float32"], records["bfloat16"]
    assert exact.settings["compute"] == "float32" and narrow.settings["compute"] == "bfloat16"
    assert narrow.perplexity.before == pytest.approx(exact.perplexity.before, rel=0.005)
    assert narrow.perplexity.after == pytest.approx(exact.perplexity.after, rel=perplexity)
    assert exact.perplexity.after > 1.1 * exact.perplexity.before  # or nothing was at stake
    differences = [abs(a.rank - b.rank) / a.full_rank for a, b in zip(exact.groups, narrow.groups, strict=True)]
    assert 0 < sum(differences) / len(differences) < ranks


@FAST
@pytest.mark.long
@pytest.mark.parametrize(("form", "perplexity", "ranks"), [("pivga", 0.005, 0.02), ("svd", 0.01, 0.08)])
def test_of_the_demo_model(tmp_path, form, perplexity, ranks):
    """0.02 % were seen in pivga form, and ranks that differ by 1.1 % on a CPU without AMX. In svd form a group that
    goes dense, or not, changes the others' ranks: bfloat16 passes were 0.08 % below float32 with one thread, and 0.63 %
    above with two."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(training_documents(with_tests=False)[:60]), encoding="utf-8")
    check(converted(DEMO_MODEL, text, tmp_path, form=form, groups="separate"), perplexity, ranks)


@FAST
@pytest.mark.long
@pytest.mark.parametrize(("form", "perplexity", "ranks"), [("pivga", 0.02, 0.04), ("svd", 0.06, 0.08)])
def test_of_stories260k(stories260k, tmp_path, form, perplexity, ranks):
    """0.4 and 3.1 % were seen, of a model that loses much; another number of threads alone moves float32 by 0.6 %."""
    text = stories260k.parent.parent / "text" / "tinystories.train.txt"
    check(converted(stories260k, text, tmp_path, form=form, groups="separate"), perplexity, ranks)


@pytest.mark.parametrize(
    ("amx", "avx512", "width", "expected"),
    [
        (True, True, 127, "float32"),
        (True, True, 128, "bfloat16"),
        (False, True, 127, "float32"),
        (False, True, 128, "bfloat16"),
        (False, False, 4096, "float32"),
    ],
)
def test_narrow_models_are_run_in_float32_on_a_cpu(monkeypatch, amx, avx512, width, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert str(compute_type("auto", "cpu", width)) == f"torch.{expected}"
    assert str(compute_type("bfloat16", "cpu", width)) == "torch.bfloat16"


@pytest.mark.parametrize("family", FAMILIES | UNSERVED)
def test_width_is_that_of_the_hidden_states(family, tmp_path):
    model = load_model(save(family, tmp_path / "model"))
    states = model(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True).hidden_states[-1]
    assert width_of(model.config) == states.shape[-1]


def test_width_of_a_config_that_does_not_say_is_enough():
    assert width_of(PretrainedConfig()) == NARROW


def test_what_is_asked_for_is_taken_whatever_the_device_is_fast_at():
    assert str(compute_type("float32", "cpu", 4096)) == "torch.float32"
    assert str(compute_type("bfloat16", "cpu", 4096)) == "torch.bfloat16"
