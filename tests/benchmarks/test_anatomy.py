"""Where a compressed model's loss comes from: parts are swapped as named, and what is split adds up."""

import copy
from itertools import chain

import pytest
import torch

import fermisvd
from benchmarks.quality.anatomy import Swapped, anatomy, by_place, by_rarity, losses, parts_by_depth, parts_by_kind
from fermisvd.teacher import teach
from fermisvd_convert.evaluate import evaluate


@pytest.fixture
def models(llama, windows):
    small = fermisvd.compress(llama, windows, remove=0.4, ranks="uniform", groups="joint", heal_steps=0, refit=False)
    return llama.requires_grad_(False), small


def test_tokens_losses_are_evaluates(models, windows):
    dense, small = models
    taught = teach(dense, windows, 4)
    kl, nll = losses(small, taught)
    found = evaluate(small, windows, taught)
    assert kl[:, :-1].mean().item() == pytest.approx(found.kl, rel=1e-4)
    assert nll.mean().exp().item() == pytest.approx(found.perplexity, rel=1e-5)


def test_a_part_of_a_group_is_dense_again(models, windows):
    """v behind k and q, whose first member holds what all three share: the outputs are those of the layers by hand."""
    dense, small = models
    by_hand = copy.deepcopy(dense)
    name = "model.layers.1.self_attn.v_proj"
    layer = small.get_submodule(name)
    with torch.no_grad():
        by_hand.get_submodule(name).weight.copy_((layer(torch.eye(32)) - layer.bias).T)
    swapped = Swapped(dense, small)
    swapped.compress_only([name])
    torch.testing.assert_close(small(windows).logits, by_hand(windows).logits, rtol=1e-4, atol=1e-4)
    swapped.compress_only([])
    torch.testing.assert_close(small(windows).logits, dense(windows).logits)


def test_parts_and_groups_of_tokens_hold_everything_once():
    names = [f"model.layers.{block}.mlp.{kind}_proj" for block in range(7) for kind in ("up", "down")]
    kinds, depths = parts_by_kind(names), parts_by_depth(names)
    assert list(kinds) == ["up_proj", "down_proj"] and list(depths) == ["0 to 4", "5 to 6"]
    assert sorted(chain(*kinds.values())) == sorted(chain(*depths.values())) == sorted(names)
    following, calibration = torch.tensor([7, 3, 3, 9, 1, 1, 7, 3]), torch.tensor([[3, 3, 3, 1, 7, 7]])
    rare = by_rarity(following, calibration)
    assert [following[chosen].tolist() for chosen in rare.values()] == [[9, 1], [1, 7], [7, 3], [3, 3]]
    places = by_place(40, 2)
    assert places["first"].tolist() == [0, 39] and places["2 to 8"].tolist() == [*range(1, 8), *range(40, 47)]
    assert torch.cat(list(places.values())).sort().values.tolist() == list(range(78))


def test_shares_and_kept_parameters_add_up(models, windows):
    dense, small = models
    found = anatomy(dense, small, windows, windows)
    for title in ("by place", "by rarity"):
        rows = found[title].values()
        assert sum(row["share"] for row in rows) == pytest.approx(1) == sum(row["tokens"] for row in rows)
    assert set(found["kept"]) == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(0 < value < 1 and len(row) == 4 for row in found["kept"].values() for value in row)
