"""Activation Gram matrices C = sum_b X_b X_b^T of the layers' inputs."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fermisvd.errors import FermiSVDError


class CalibrationError(FermiSVDError):
    """Activations of a layer are not finite."""


@torch.no_grad()
def gram_matrices(model: nn.Module, sources: Sequence[str], batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gram matrix of the input of each layer in `sources`, over all tokens of all batches.

    sources: names of linear layers; batches: token ids, (batch, length), without padding.
    Returns name -> (n x n) float64 tensors on the model's device. Sums are taken in float64: a Gram matrix squares the
    condition number, and the tail of the spectrum is what rank selection compares.
    Raises CalibrationError naming the layer whose input is NaN or infinite.
    """
    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)  # without the head: its logits would outweigh the matrices
    widths = {name: model.get_submodule(name).in_features for name in sources}
    grams = {name: torch.zeros(n, n, dtype=torch.float64, device=device) for name, n in widths.items()}

    def accumulate(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).double()  # (tokens, n)
        grams[name].addmm_(x.T, x)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: accumulate(name, inputs))
        for name in sources
    ]
    try:
        for batch in batches:
            body(input_ids=batch.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, gram in grams.items():
        if not gram.isfinite().all():
            raise CalibrationError(f"the input of {name} holds NaN or infinite values during calibration")
    return grams
