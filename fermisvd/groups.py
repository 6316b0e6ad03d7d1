"""Groups: linear layers of the decoder blocks that read the same input and are decomposed together."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from fermisvd.errors import FermiSVDError, NumericalError
from fermisvd.fused import by_fused_layer
from fermisvd.kept_dense import why_dense
from fermisvd.linear import Conv1D, Linear, linear_layer, weight_of

Side = Literal["columns", "rows"]
Partition = Literal["joint", "separate"]
PROBE_TOKENS = 16


@dataclass(frozen=True)
class LinearGroup:
    """A group: its members' weights stacked by rows form one (rows x columns) matrix W.

    members: module names, in stacking order; member_rows: output width of each member;
    columns: input width; side: where the PivGa skeleton is chosen, i.e. the side that tensor
    parallelism replicates; source: first layer that reads this input, the key of its Gram matrix; transposed: whether
    the members' weights are stored the other way round, (columns x rows of the member), as GPT-2's.
    """

    members: tuple[str, ...]
    member_rows: tuple[int, ...]
    columns: int
    side: Side
    source: str
    transposed: bool = False

    @property
    def name(self) -> str:
        """The first member's name: shared tensors are stored under it."""
        return self.members[0]

    @property
    def rows(self) -> int:
        return sum(self.member_rows)

    @property
    def full_rank(self) -> int:
        """k = min(m, n)."""
        return min(self.rows, self.columns)

    @property
    def dense_parameters(self) -> int:
        return self.rows * self.columns


class StructureError(FermiSVDError):
    """The model has no decoder blocks with linear layers that can be compressed."""


def decoder_blocks(model: nn.Module) -> str:
    """Name of the ModuleList that holds the decoder blocks: the outermost one with most parameters in matrices, of the
    language model where there are towers for images or sounds beside it.

    Raises StructureError if the model has no ModuleList with matrices.
    """
    best, most = None, 0
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    inside = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) in inside:
            size = sum(p.numel() for p in module.parameters() if p.dim() == 2)
            if size > most:
                best, most = name, size
    if best is None:
        raise StructureError(f"{type(model).__name__} has no list of decoder blocks with linear layers")
    return best


@torch.no_grad()
def find_groups(model: nn.Module, partition: Partition = "joint") -> list[LinearGroup]:
    """Groups of all linear layers of the decoder blocks, in the order the forward pass calls them.

    Found by running a few tokens: layers called with one and the same tensor, which vLLM fuses, are a group (`joint`),
    or each a group of its own that shares the Gram matrix (`separate`). A parent module's last group
    gives the parent's output, so it is row-parallel under tensor parallelism and takes its skeleton
    from rows; all others take columns (the side that tensor parallelism replicates).
    Layers that not every token passes exactly once (experts, with all others of their list), and those of
    fermisvd.kept_dense, are in no group: see `left_dense`.
    Raises StructureError if no layer is left to compress, NumericalError naming the first layer whose input is not
    finite.
    """
    blocks = decoder_blocks(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and isinstance(module, Linear)
    }
    calls = _calls_of(model, layers)
    seen = Counter()
    for name, x in calls:  # two calls or a part of the tokens: no
        seen[name] += 1 if x.numel() == PROBE_TOKENS * weight_of(layers[name]).shape[1] else 2
    lists = {list_of(model, blocks, name) for name in layers if seen[name] != 1} - {None}
    calls = [(name, x) for name, x in calls if seen[name] == 1 and list_of(model, blocks, name) not in lists]
    if not calls:
        raise StructureError(f"{type(model).__name__}: no linear layer of {blocks} is called once in a forward pass")

    readers: dict[
        tuple, list[str]
    ] = {}  # the parent belongs to the key: a parallel block's MLP is no part of attention
    for name, x in calls:
        kind = isinstance(layers[name], Conv1D)
        readers.setdefault((parent_of(name), x.data_ptr(), x.shape, x.stride(), kind), []).append(name)
    inputs_of: dict[str, list[str]] = {}
    for names in readers.values():
        inputs_of.setdefault(parent_of(names[0]), []).append(names[0])

    groups = []
    for names in readers.values():
        inputs = inputs_of[parent_of(names[0])]
        is_output = len(names) == 1 and len(inputs) > 1 and names[0] == inputs[-1]
        names = [name for name in names if why_dense(model, name) is None]
        for members in by_fused_layer(names) if partition == "joint" else [[name] for name in names]:
            groups.append(
                LinearGroup(
                    members=tuple(members),
                    member_rows=tuple(len(weight_of(layers[name])) for name in members),
                    columns=weight_of(layers[members[0]]).shape[1],
                    side="rows" if is_output else "columns",
                    source=names[0],
                    transposed=isinstance(layers[members[0]], Conv1D),
                )
            )
    return groups


def _calls_of(model: nn.Module, layers: dict[str, Linear]) -> list[tuple[str, torch.Tensor]]:
    """Name and input of each call of these layers while PROBE_TOKENS tokens run through the model. The inputs are held,
    so that no address is used twice."""
    calls: list[tuple[str, torch.Tensor]] = []
    hooks = [layer.register_forward_pre_hook(partial(_note_call, calls, name)) for name, layer in layers.items()]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.arange(PROBE_TOKENS, device=device)[None])
    finally:
        for hook in hooks:
            hook.remove()
    for name, x in calls:
        if not x.isfinite().all():
            raise NumericalError(f"the input of {name} holds NaN or infinite values; the weights before it are wrong")
    return calls


def _note_call(
    calls: list[tuple[str, torch.Tensor]], name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    calls.append((name, inputs[0]))


def check_unshared(model: nn.Module) -> None:
    """Raises StructureError if a linear layer of the decoder blocks holds the parameter of another module.

    Compressed one by one, the two would no longer be the same. One module that is called in several places is no such
    case: `find_groups` leaves it dense.
    """
    blocks, holders = decoder_blocks(model), defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append((name, module))
    for sharing in holders.values():
        linear = [n for n, m in sharing if n.startswith(f"{blocks}.") and isinstance(m, Linear)]
        if len(sharing) > 1 and linear:
            other = next(name for name, _ in sharing if name != linear[0])
            raise StructureError(
                f"{linear[0]} shares its weight with {other}; layers are compressed one by one, untie them first"
            )


def list_of(model: nn.Module, blocks: str, name: str) -> str | None:
    """The list inside a decoder block that holds the layer, such as one of experts; None if there is none."""
    parent = parent_of(name)
    while len(parent) > len(blocks):
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return parent
        parent = parent_of(parent)
    return None


def left_dense(model: nn.Module, groups: Iterable[LinearGroup]) -> dict[str, int]:
    """Matrices of the decoder blocks that are in no group, such as experts and routers: name -> parameters."""
    members = {f"{name}.weight" for group in groups for name in group.members}
    blocks = model.get_submodule(prefix := decoder_blocks(model))
    return {
        f"{prefix}.{name}": parameter.numel()
        for name, parameter in blocks.named_parameters()
        if parameter.dim() > 1 and f"{prefix}.{name}" not in members
    }


def parent_of(name: str) -> str:
    """Name of the module that holds this one."""
    return name.rpartition(".")[0]


def block_of(name: str) -> str:
    """Name of the decoder block that holds a module or tensor, model.layers.3; the name itself outside of blocks."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)


def stacked_weight(model: nn.Module, group: LinearGroup) -> torch.Tensor:
    """W of a group: the members' weights stacked by rows, (rows x columns)."""
    return torch.cat([weight_of(linear_layer(model, name)).detach() for name in group.members])
