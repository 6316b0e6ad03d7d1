"""Healing of a pruned model: the loss by whole logits falls, and what is kept can be stored as it is."""

import torch
from torch.nn.functional import kl_div

from benchmarks.quality.depth_pruning import without_blocks
from benchmarks.quality.pruning import heal_pruned, linear_weights
from fermisvd.precision import with_parameters_in
from fermisvd.teacher import teach


@torch.no_grad()
def kl(teacher, student, windows) -> float:
    p, q = (model(windows).logits.double().log_softmax(-1) for model in (teacher, student))
    return kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def test_a_pruned_model_is_healed_in_the_type_it_is_stored_in(llama, windows):
    with_parameters_in(with_parameters_in(llama, torch.bfloat16), torch.float32)
    pruned, taught = without_blocks(llama, [2]), teach(llama, windows, 4)
    before, weights = kl(llama, pruned, windows), {n: w.clone() for n, w in pruned.state_dict().items()}
    record = heal_pruned(pruned, taught[:4], taught[4:], 60, torch.bfloat16)
    assert kl(llama, pruned, windows) < 0.9 * before and record["kl_after"] < record["kl_before"]
    trained = linear_weights(pruned).keys()
    for name, tensor in pruned.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensor.bfloat16().float())
        assert torch.equal(tensor, weights[name]) == (name not in trained), name
