"""What the pruned baselines of `real` share: a Llama of a smaller config, its linear weights, and their healing."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fermisvd.groups import decoder_blocks
from fermisvd.healing import HealingSettings, heal
from fermisvd.precision import compute_type, width_of, with_parameters_in
from fermisvd.settings import BATCH_SIZE, SEED
from fermisvd.teacher import Taught
from fermisvd_convert.progress import bar


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the decoder blocks' linear layers by tensor name: what compression makes smaller."""
    blocks = decoder_blocks(model)
    return {
        f"{name}.weight": parameter
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and isinstance(module, nn.Linear)
        for kind, parameter in module.named_parameters(recurse=False)
        if kind == "weight"
    }


def linear_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in linear_weights(model).values())


def of_smaller_config(model: LlamaForCausalLM, tensors: Mapping[str, torch.Tensor], **changes: Any) -> LlamaForCausalLM:
    """An ordinary Llama of the model's config with these changes, and of these tensors, which it does not share."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    pruned = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)
    pruned.load_state_dict(tensors)
    return pruned.eval()


def heal_pruned(
    model: LlamaForCausalLM, taught: Taught, aside: Taught, settings: HealingSettings, stored: torch.dtype
) -> dict:
    """Distil a pruned model, which is float32 before and afterwards, in place, as `fermisvd convert` does a compressed
    one: its loss, batches, optimiser, rule of the learning rate and type of the passes. All linear weights of the
    decoder blocks are trained, and rounded once, at the end, to the type that all weights are stored in. Gives `heal`'s
    record."""
    with_parameters_in(model, torch.promote_types(compute_type("auto", model.device, width_of(model.config)), stored))
    weights = linear_weights(model)
    with bar("heal", settings.steps) as shown:
        record = heal(
            model, taught, aside, settings, batch_size=BATCH_SIZE, seed=SEED, on_step=shown.show, factors=weights
        )
    with_parameters_in(with_parameters_in(model, stored), torch.float32)
    return record
