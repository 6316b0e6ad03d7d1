"""bfloat16 passes beside float32 ones: the same ranks but for a little, and the same quality."""

import pytest

from fermisvd.precision import compute_type
from fermisvd_convert.convert import convert
from tests.support import DEMO_MODEL
from tests.support.stdlib_text import training_documents

WITHIN = 0.005  # of perplexity, and of each group's mean rank


def converted(model, text, folder, **settings):
    """Records by the type of the passes. FermiGrad and joining, neither refitted nor healed."""
    options = dict(calibration=[str(text)], bos=False, samples=32, gradient_samples=32, sequence_length=128)
    options |= dict(steps=32, heal_steps=0, refit=False, align=1) | settings
    return {
        compute: convert(str(model), folder / compute, 0.3, work=folder / "work", compute=compute, **options)
        for compute in ("float32", "bfloat16")
    }


def check(records):
    exact, narrow = records["float32"], records["bfloat16"]
    assert exact.settings["compute"] == "float32" and narrow.settings["compute"] == "bfloat16"
    assert narrow.perplexity.before == pytest.approx(exact.perplexity.before, rel=WITHIN)
    assert narrow.perplexity.after == pytest.approx(exact.perplexity.after, rel=WITHIN)
    assert exact.perplexity.after > 1.02 * exact.perplexity.before  # or nothing was at stake
    ranks = [
        {tuple(group.members): group.rank / group.full_rank for group in record.groups} for record in (exact, narrow)
    ]
    shared = ranks[0].keys() & ranks[1].keys()
    assert len(shared) > 0.5 * len(ranks[0])
    differences = [abs(ranks[0][members] - ranks[1][members]) for members in shared]
    assert sum(differences) / len(differences) < 10 * WITHIN
    assert differences and max(differences) > 0  # the passes did differ


@pytest.mark.long
@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_of_the_demo_model(tmp_path, form):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(training_documents(with_tests=False)[:60]), encoding="utf-8")
    check(converted(DEMO_MODEL, text, tmp_path, form=form, groups="separate"))


@pytest.mark.long
@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_of_stories260k(stories260k, tmp_path, form):
    text = stories260k.parent.parent / "text" / "tinystories.train.txt"
    check(converted(stories260k, text, tmp_path, form=form, groups="separate"))


def test_what_is_asked_for_is_taken_whatever_the_device_is_fast_at():
    assert str(compute_type("float32", "cpu")) == "torch.float32"
    assert str(compute_type("bfloat16", "cpu")) == "torch.bfloat16"
    assert compute_type("auto", "cpu") in (compute_type("float32", "cpu"), compute_type("bfloat16", "cpu"))
