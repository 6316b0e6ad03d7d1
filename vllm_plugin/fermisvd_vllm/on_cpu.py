"""A compressed layer of a CPU as one op, which finds the layer by a number that it is given as a tensor.

So a compiled graph knows neither a layer's ranks nor which layer it is, and all decoder blocks share one: its C++ is
compiled once, as for a dense model, and not once for every block.
"""

from collections.abc import MutableMapping
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch


class Multiplies(Protocol):
    def product(self, x: torch.Tensor) -> torch.Tensor: ...


_numbers = count()
_layers: MutableMapping[int, Multiplies] = WeakValueDictionary()


def numbered(layer: Multiplies) -> torch.Tensor:
    """A number, of no dimension, that `layer_product` finds the layer by as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


def layer_product(x: torch.Tensor, number: torch.Tensor, outputs: int) -> torch.Tensor:
    """y (..., outputs) of that layer for x (..., n)."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return _layers[int(number)].product(rows).view(*x.shape[:-1], outputs)


_library = torch.library.Library("fermisvd", "FRAGMENT")  # torch.library.custom_op takes several times as long a call
_library.define("layer_product(Tensor x, Tensor number, SymInt outputs) -> Tensor")
_library.impl("layer_product", layer_product, "CPU")
torch.library.register_fake("fermisvd::layer_product", lambda x, _, outputs: x.new_empty(*x.shape[:-1], outputs))
