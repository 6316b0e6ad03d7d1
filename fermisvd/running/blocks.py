"""A causal language model taken apart: what comes before the decoder blocks, block by block, what comes behind.

So a step can run one block over all of a text before it needs the next one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fermisvd.errors import FermiSVDError, NumericalError, OutputError
from fermisvd.groups import decoder_blocks
from fermisvd.running.streaming import present

KEPT_ACTIVATIONS = 2 * 2**30  # bytes


class BlocksError(FermiSVDError):
    """The model is no plain row of decoder blocks."""


class DecoderBlocks:
    """Runs a causal LM piece by piece. Batches are token ids, (windows, length).

    What each block is called with besides hidden states (positions, masks) is recorded once a batch shape, with other
    tokens: it must not depend on them, which is checked.
    Raises BlocksError for a model that is no plain row of blocks, or whose blocks are told of the tokens themselves.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.prefix = decoder_blocks(model)
        self.blocks = list(model.get_submodule(self.prefix).children())
        self._calls: dict[torch.Size, list[tuple[tuple, dict[str, Any], bool]]] = {}

    @property
    def body(self) -> nn.Module:
        """Without the head."""
        return getattr(self.model, "base_model", self.model)

    def first(self, batch: torch.Tensor) -> torch.Tensor:
        """Hidden states before block 0, (windows, length, hidden)."""
        self._record(batch)
        with forwards([self.blocks[0]], [_stop]):
            try:
                self.body(input_ids=batch, use_cache=False)
            except Stop as stop:
                return stop.hidden
        raise BlocksError(f"{type(self.model).__name__}: block 0 of {self.prefix} is not called")

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states behind block `index`."""
        args, kwargs, _ = self._calls[hidden.shape[:2]][index]
        return hidden_of(self.blocks[index](hidden, *args, **kwargs))

    def head(self, batch: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits from the hidden states behind the last block, (windows, tokens, vocabulary); differentiable. Of all
        tokens, or of any."""
        calls = iter(next(iter(self._calls.values())))

        def skip(*_, **__):
            return (hidden,) if next(calls)[2] else hidden

        with forwards(self.blocks, [skip] * len(self.blocks)):
            return self.model(input_ids=batch, use_cache=False).logits

    def present(self, index: int):
        """Context in which block `index` holds its weights."""
        return present(self.blocks[index])

    @torch.no_grad()
    def _record(self, batch: torch.Tensor) -> None:
        if batch.shape in self._calls:
            return
        calls: list[tuple[int, tuple, dict[str, Any], bool]] = []
        behind = torch.empty(0)

        def see(block, args, kwargs, output):
            nonlocal behind
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append((self.blocks.index(block), args[1:], rest, isinstance(output, tuple | list)))
            behind = hidden_of(output)

        hooks = [block.register_forward_hook(see, with_kwargs=True) for block in self.blocks]
        try:
            self.body(input_ids=batch.roll(1, dims=1), use_cache=False)
            recorded = calls.copy()
            self.body(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        name = f"{type(self.model).__name__}: {self.prefix}"
        if [index for index, *_ in recorded] != list(range(len(self.blocks))):
            raise BlocksError(f"{name} is not called block after block")
        self._calls[batch.shape] = [call[1:] for call in recorded]
        hidden = self.first(batch)
        for index in range(len(self.blocks)):
            hidden = self.run(index, hidden)
        if (hidden - behind).norm() > 1e-3 * behind.norm():
            raise BlocksError(f"{name}: a block is told more of the tokens than the hidden states")


class HiddenStates:
    """Hidden states by (place, batch number): on a GPU up to `device_room` bytes, beyond that in the host's memory up
    to `room` bytes, and beyond that in files of `folder`.

    Raises OutputError where these cannot be written.
    """

    def __init__(self, folder: Path, room: int, device_room: int = 0):
        self.folder, self.room, self.device_room = folder, room, device_room
        self._memory: dict[tuple[str, int], torch.Tensor] = {}

    def put(self, place: str, batch: int, hidden: torch.Tensor) -> None:
        """Keep (windows, length, hidden) there, in its own type, in place of what was."""
        hidden = hidden.detach()
        self._drop(place, batch)
        if hidden.is_cuda and hidden.nbytes <= self.device_room:
            self.device_room -= hidden.nbytes
            self._memory[place, batch] = hidden
        elif hidden.nbytes <= self.room:
            self.room -= hidden.nbytes
            self._memory[place, batch] = hidden.cpu()
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({"hidden": hidden.contiguous().cpu()}, self._file(place, batch))
            except (OSError, SafetensorError) as error:
                raise OutputError(f"{self.folder}: hidden states cannot be written ({error})") from None

    def get(self, place: str, batch: int, device: torch.device) -> torch.Tensor:
        """(windows, length, hidden); those that are on the device are not copied."""
        kept = self._memory.get((place, batch))
        return (load_file(self._file(place, batch))["hidden"] if kept is None else kept).to(device)

    def drop(self, place: str, batches: Sequence[tuple[int, Any]]) -> None:
        """Forget the states of these batches, given with their numbers, at a place."""
        for number, _ in batches:
            self._drop(place, number)

    def _drop(self, place: str, batch: int) -> None:
        if (place, batch) in self._memory:
            kept = self._memory.pop((place, batch))
            if kept.is_cuda:
                self.device_room += kept.nbytes
            else:
                self.room += kept.nbytes
        elif self.folder.is_dir():
            self._file(place, batch).unlink(missing_ok=True)

    def _file(self, place: str, batch: int) -> Path:
        return self.folder / f"{place} {batch}.safetensors"


@torch.no_grad()
def states_by_blocks(
    blocks: DecoderBlocks,
    batches: Sequence[tuple[int, torch.Tensor]],
    hidden: HiddenStates,
    on_batch: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of each batch and its states behind the last block, every block having been run over all of them before
    the next; see `sweep`, which calls on_batch."""
    device = device_of(blocks.model)
    sweep(blocks, batches, hidden, on_batch=on_batch)
    for number, batch in batches:
        yield number, hidden.get("last", number, device)
        hidden.drop("last", [(number, batch)])


@torch.no_grad()
def sweep(
    blocks: DecoderBlocks,
    batches: Sequence[tuple[int, torch.Tensor]],
    hidden: HiddenStates,
    kept: Sequence[int] = (),
    on_batch: Callable[[], object] = lambda: None,
) -> None:
    """Forward through all blocks, one at a time: leaves the states behind the last as "last" and, of the blocks i in
    `kept`, those before them as "before i". batches: numbered; on_batch: called whenever one is through a block.
    Raises NumericalError naming a block whose output is not finite.
    """
    device = device_of(blocks.model)
    for number, batch in batches:
        hidden.put("last", number, blocks.first(batch.to(device)))
    for index in range(len(blocks.blocks)):
        with blocks.present(index):
            for number, _ in batches:
                before = hidden.get("last", number, device)
                states = blocks.run(index, before)
                if not states.isfinite().all():
                    raise NumericalError(f"the output of {blocks.prefix}.{index} holds NaN or infinite values")
                hidden.put("last", number, states)  # which makes room
                if index in kept:
                    hidden.put(f"before {index}", number, before)
                on_batch()


def segments(blocks: range) -> list[range]:
    """Blocks in runs, each a block shorter than the one before it, so that going back through all of them from the
    states before each run takes the fewest places: j of those are still kept when run j is gone through, so a later
    run must be shorter. `places_back` says how many there are at once, about sqrt(2 blocks)."""
    found, length = [], places_back(len(blocks))
    while blocks:
        found.append(blocks[:length])
        blocks, length = blocks[length:], length - 1
    return found


def places_back(blocks: int) -> int:
    """States before so many blocks, at most, are there at once on the way back through `blocks`: the least p of which
    p + (p - 1) + ... + 1 is no fewer."""
    return math.ceil((math.sqrt(8 * blocks + 1) - 1) / 2)


@torch.no_grad()
def run_again(
    blocks: DecoderBlocks,
    segment: range,
    batches: Sequence[tuple[int, torch.Tensor]],
    hidden: HiddenStates,
    on_batch: Callable[[], object] = lambda: None,
) -> None:
    """From the states before its first block those before its others, as "before i"."""
    for index in segment[:-1]:
        with blocks.present(index):
            for number, _ in batches:
                before = hidden.get(f"before {index}", number, device_of(blocks.model))
                hidden.put(f"before {index + 1}", number, blocks.run(index, before))
                on_batch()


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return next(model.get_input_embeddings().parameters()).device


class Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


def _stop(*args, **kwargs):
    raise Stop(args[0] if args else kwargs["hidden_states"])


def hidden_of(output) -> torch.Tensor:
    """Hidden states of what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output  # GPT's blocks give a list


@contextmanager
def checkpointed(model: nn.Module, activations: int, tokens: int, kept_bytes: int = KEPT_ACTIVATIONS) -> Iterator[None]:
    """Blocks forget what they computed on the way and do it again for the gradient, where that would take more than
    kept_bytes for so many tokens. activations: numbers of a token."""
    if activations * tokens * next(model.parameters()).element_size() <= kept_bytes:
        yield
        return
    blocks = list(model.get_submodule(decoder_blocks(model)).children())
    with forwards(blocks, [partial(checkpoint, block.forward, use_reentrant=False) for block in blocks]):
        yield


@contextmanager
def forwards(modules: Sequence[nn.Module], functions: Sequence[Callable]) -> Iterator[None]:
    """Other forward functions for the duration."""
    before = [vars(module).get("forward") for module in modules]
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
