"""Calibration statistics: Gram matrices C = sum X X^T of inputs and G = sum g g^T of output gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fermisvd.decomposition import OutputGram
from fermisvd.errors import FermiSVDError
from fermisvd.groups import linear_layer


class CalibrationError(FermiSVDError):
    """Activations or gradients of a layer are not finite."""


@torch.no_grad()
def gram_matrices(model: nn.Module, sources: Sequence[str], batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gram matrix of the input of each layer in `sources`, over all tokens of all batches; see `calibration_grams`."""
    return calibration_grams(model, sources, [], batches)[0]


def calibration_grams(
    model: nn.Module,
    sources: Sequence[str],
    members: Sequence[str],
    batches: Iterable[torch.Tensor],
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], dict[str, OutputGram]]:
    """C of the inputs of `sources` and G of the outputs of `members`, over all tokens of all batches, in one pass.

    sources, members: names of linear layers; batches: token ids, (batch, length), without padding; seed: of the drawn
    tokens. g is the gradient of log p(y) at the layer's output, y drawn from the model's own prediction: G is then the
    output side of the KL's second derivative (the Fisher matrix), which the text's own next tokens only resemble.
    Returns name -> (n x n) float64 tensors on the model's device, and name -> OutputGram. Sums are taken in float64: a
    Gram matrix squares the condition number, and the tail of the spectrum is what rank selection compares.
    Raises CalibrationError naming the layer whose input or gradient is NaN or infinite.
    """
    device = next(model.parameters()).device
    grams = {name: _zeros(linear_layer(model, name).in_features, device) for name in sources}
    layers = {name: linear_layer(model, name) for name in members}
    outputs = {name: _zeros(min(layer.weight.shape), device) for name, layer in layers.items()}
    totals = dict.fromkeys(members, torch.zeros((), dtype=torch.float64, device=device))

    def see_input(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).double()  # (tokens, n)
        grams[name].addmm_(x.T, x)

    def see_gradient(name: str, gradient: torch.Tensor) -> None:
        weight, g = layers[name].weight, gradient.flatten(0, -2).double()  # (tokens, m)
        totals[name] = totals[name] + g.square().sum()
        g = g @ weight.detach().double() if weight.shape[0] > weight.shape[1] else g
        outputs[name].addmm_(g.T, g)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: see_input(name, inputs))
        for name in sources
    ]
    hooks += [
        layer.register_forward_hook(
            lambda _, inputs, y, name=name: y.register_hook(lambda g: see_gradient(name, g)) and None
        )
        for name, layer in layers.items()
    ]
    try:
        if members:
            _pass_back_and_forth(model, batches, torch.Generator(device).manual_seed(seed))
        else:
            body = getattr(model, "base_model", model)  # without the head: its logits would outweigh the matrices
            with torch.no_grad():
                for batch in batches:
                    body(input_ids=batch.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, gram in grams.items():
        if not gram.isfinite().all():
            raise CalibrationError(f"the input of {name} holds NaN or infinite values during calibration")
    found = {}
    for name, matrix in outputs.items():
        if not matrix.isfinite().all():
            raise CalibrationError(f"the gradient at the output of {name} is NaN or infinite during calibration")
        found[name] = OutputGram(matrix, totals[name].item() / layers[name].out_features)
    return grams, found


def _pass_back_and_forth(model: nn.Module, batches: Iterable[torch.Tensor], draw: torch.Generator) -> None:
    """Forward and backward passes of -log p(y), y drawn from the model; no parameter gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, y: y.requires_grad_())
    try:
        for batch in batches:
            logits = model(input_ids=batch.to(draw.device), use_cache=False).logits
            gradient = logits.detach().float().softmax(-1)
            drawn = torch.multinomial(gradient.flatten(0, -2), 1, generator=draw).view(*batch.shape, 1)
            gradient.scatter_add_(-1, drawn, gradient.new_full(drawn.shape, -1.0))
            logits.backward(gradient.to(logits.dtype))
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_()


def group_output_gram(members: Sequence[OutputGram], weights: Sequence[torch.Tensor]) -> OutputGram:
    """The members' gradient covariances as the group's, one output space per member: block-diagonal, without the
    correlation between members. weights: W_i, (m_i x n)."""
    rows, columns = sum(len(w) for w in weights), weights[0].shape[1]
    mean = sum(g.mean * len(w) for g, w in zip(members, weights, strict=True)) / rows
    if rows <= columns:
        return OutputGram(torch.block_diag(*[g.matrix for g in members]), mean)
    total = torch.zeros(columns, columns, dtype=torch.float64, device=weights[0].device)
    for gram, weight in zip(members, weights, strict=True):
        w = weight.double()
        total += gram.matrix if len(w) > columns else w.T @ gram.matrix @ w
    return OutputGram(total, mean)


def _zeros(width: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(width, width, dtype=torch.float64, device=device)
