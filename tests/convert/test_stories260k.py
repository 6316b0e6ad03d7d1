"""On a real checkpoint of others, against the trial's figures in DESIGN section 5, made by other code."""

import pytest
import torch

from fermisvd.budget import Budget
from fermisvd.calibration import gram_matrices
from fermisvd.decomposition import data_aware_svd
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.hf import load_model
from fermisvd.linear import linear_layer
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

TRIAL = {("svd", "separate"): (29.57, 53.15, 97.18), ("pivga", "joint"): (9.522, 22.32, 46.00)}


@pytest.mark.long
@pytest.mark.parametrize(("form", "partition"), TRIAL)
def test_uniform_ranks_rounded_down_give_the_trials_perplexity(stories260k, form, partition):
    text = stories260k.parent.parent / "text"
    tokenizer, model = load_tokenizer(stories260k), load_model(stories260k)
    calibration = windows_of(tokenizer, str(text / "tinystories.train.txt"), 256, 256, bos=False)
    evaluation = windows_of(tokenizer, str(text / "tinystories.valid.txt"), 256, 96, bos=False)
    groups = find_groups(model, partition)
    grams = gram_matrices(model, [g.source for g in groups], calibration.split(8))
    weights = {g.name: stacked_weight(model, g).clone() for g in groups}
    factors = {g.name: data_aware_svd(weights[g.name], grams[g.source]) for g in groups}
    for remove, trial in zip((0.2, 0.3, 0.4), TRIAL[form, partition], strict=True):
        budget = Budget.removing(remove, form)
        with torch.no_grad():
            for g in groups:
                a, b = factors[g.name].truncated(int(budget.uniform_rank(g)))
                for member, part in zip(g.members, (a @ b).split(list(g.member_rows)), strict=True):
                    linear_layer(model, member).weight.copy_(part)
        assert evaluate(model, evaluation).perplexity == pytest.approx(trial, rel=0.01)
