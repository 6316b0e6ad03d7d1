"""Healing of a pruned model: the loss by whole logits falls, and what is kept can be stored as it is."""

import torch
from torch.nn.functional import kl_div

from benchmarks.quality import pruning
from benchmarks.quality.depth_pruning import without_blocks
from benchmarks.quality.pruning import heal_pruned, linear_weights
from fermisvd.healing import HealingSettings
from fermisvd.precision import with_parameters_in
from fermisvd.teacher import teach


@torch.no_grad()
def kl(teacher, student, windows) -> float:
    p, q = (model(windows).logits.double().log_softmax(-1) for model in (teacher, student))
    return kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def test_a_pruned_model_is_healed_in_the_type_of_the_passes(llama, windows, monkeypatch):
    """And is float32 again, of numbers that its stored type holds."""
    monkeypatch.setattr(pruning, "compute_type", lambda *_: torch.bfloat16)  # which this narrow model is too slow in
    with_parameters_in(with_parameters_in(llama, torch.bfloat16), torch.float32)
    pruned, taught = without_blocks(llama, [2]), teach(llama, windows, 4)
    before, weights = kl(llama, pruned, windows), {n: w.clone() for n, w in pruned.state_dict().items()}
    seen = set()
    pruned.model.layers[0].register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    record = heal_pruned(pruned, taught[:4], taught[4:], HealingSettings(steps=60), torch.bfloat16)
    assert kl(llama, pruned, windows) < 0.9 * before and record["kl_after"] < record["kl_before"]
    assert torch.bfloat16 in seen
    trained = linear_weights(pruned).keys()
    for name, tensor in pruned.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensor.bfloat16().float())
        assert torch.equal(tensor, weights[name]) == (name not in trained), name
