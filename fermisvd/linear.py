"""What a linear layer is: torch's, or GPT-2's Conv1D, whose weight lies the other way round."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def weight_of(layer: Linear) -> torch.Tensor:
    """W (m x n), out x in, of y = x W^T; a view of the layer's parameter."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def linear_layer(model: nn.Module, name: str) -> Linear:
    """The linear layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear), name
    return layer
