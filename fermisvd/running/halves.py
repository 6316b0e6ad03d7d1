"""A causal language model in two parts: the body, up to the states behind its last decoder block, and the head.

Logits are by far the widest of a model's tensors. What compares two models holds states instead, and asks the head for
a few tokens at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from fermisvd.groups import decoder_blocks
from fermisvd.precision import bfloat16_products
from fermisvd.running.blocks import BlocksError, Stop, forwards, hidden_of

PROBE_TOKENS = 8
HEAD_TOKENS = 1024  # that a head is asked for together
HEAD_TOKENS_ON_CPU = 128  # where two are compared: larger tensors are fresh memory each time, which is cleared first


class Halves(Protocol):
    """body: token ids (windows, length) -> states (windows, length, width), differentiable; head: states of some tokens
    (windows, tokens, width) -> logits (windows, tokens, vocabulary), differentiable in the states."""

    def body(self, batch: torch.Tensor) -> torch.Tensor: ...

    def head(self, states: torch.Tensor) -> torch.Tensor: ...


class Split:
    """A model whose head needs the states alone, and is not trained. Raises BlocksError for one whose head does not
    give its logits."""

    def __init__(self, model: nn.Module):
        self.model, self.prefix = model, decoder_blocks(model)
        self.container = model.get_submodule(self.prefix)
        self.blocks, self.output = list(self.container.children()), output_layer(model)
        self.float32_head = _float32_weight(self.output)
        seen = []
        hook = self.blocks[-1].register_forward_hook(lambda _, inputs, output: seen.append(output))
        self.probe = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
        with torch.no_grad():
            with _exact(self.output, self.float32_head):
                expected = logits_of(model, self.probe).float()
            hook.remove()
            if len(seen) != 1:
                raise BlocksError(f"{type(model).__name__}: its last block is called {len(seen)} times")
            self.as_tuple = isinstance(seen[0], tuple | list)
            if hidden_of(seen[0]).shape[:-1] != self.probe.shape:  # Gemma 3n's are several of a token
                raise BlocksError(f"{type(model).__name__}: its states are no (windows, length, width)")
            try:
                found = self.head(hidden_of(seen[0])).float()
            except Exception as error:  # of a model that wants more of its blocks than their states
                raise BlocksError(f"{type(model).__name__}: its head fails on the states alone ({error})") from error
        if (found - expected).nan_to_num().norm() > 1e-3 * expected.nan_to_num().norm():  # NaN is for others to find
            raise BlocksError(f"{type(model).__name__}: its head needs more than the states behind the last block")

    def body(self, batch: torch.Tensor) -> torch.Tensor:
        return self.through(batch, range(len(self.blocks)))

    @cached_property
    def resumes(self) -> bool:
        """Whether blocks can be run from the states before them alone; not where blocks share more (Gemma 4's keys and
        values)."""
        states = None
        with torch.no_grad():
            expected = self.body(self.probe)
            try:
                for number in range(len(self.blocks)):
                    states = self.through(self.probe, range(number, number + 1), states)
            except Exception:  # whatever a block does that misses an earlier one's
                return False
        return states is not None and torch.equal(states, expected)

    def through(self, batch: torch.Tensor, blocks: range, states: torch.Tensor | None = None) -> torch.Tensor:
        """States of these windows behind a run of blocks, given those before it, of a model that `resumes`; the first
        block needs none."""

        def stop(block, inputs, output):
            raise Stop(hidden_of(output))

        hook = self.blocks[blocks.stop - 1].register_forward_hook(stop)
        try:
            with self._skipped(blocks.start, states):
                logits_of(self.model, batch)
        except Stop as stopped:
            return stopped.hidden
        finally:
            hook.remove()
        raise BlocksError(f"{type(self.model).__name__}: block {blocks.stop - 1} is not called")

    def number_of(self, layer: str) -> int:
        """Of the block that a layer is in, by the layer's name."""
        return int(layer.removeprefix(f"{self.prefix}.").partition(".")[0])

    def head(self, states: torch.Tensor) -> torch.Tensor:
        tokens = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with self._skipped(len(self.blocks), states), _exact(self.output, self.float32_head):
            return logits_of(self.model, tokens)

    @contextmanager
    def _skipped(self, count: int, states: torch.Tensor | None) -> Iterator[None]:
        """The first so many blocks are not run; states: behind them."""
        modules = self.container._modules
        blocks = dict(list(self.container.named_children())[:count])
        output = (states,) if self.as_tuple else states
        modules.update({name: _Skip(block, output) for name, block in blocks.items()})
        try:
            yield
        finally:
            modules.update(blocks)


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that gives logits, where it is an ordinary one of a type narrower than float32."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Linear) and found.weight.dtype.itemsize < 4 else None


class Whole:
    """A model that cannot be taken apart: its states are its logits."""

    def __init__(self, model: nn.Module):
        self.model = model

    def body(self, batch: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model, batch)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        return states


def halves_of(model: nn.Module) -> Halves:
    """The model's two parts, found by running a few tokens."""
    try:
        return Split(model)
    except BlocksError:
        return Whole(model)


def compared_tokens(device: torch.device | str) -> int:
    """How many tokens two models' heads are compared for together."""
    return HEAD_TOKENS if str(device).startswith("cuda") else HEAD_TOKENS_ON_CPU


def few_tokens(states: torch.Tensor, tokens: int = HEAD_TOKENS) -> Iterator[torch.Tensor]:
    """Views of states (windows, length, width), or of ids, at most so many tokens each: whole windows where they are
    short."""
    for windows in states.split(max(1, tokens // states.shape[1])):
        yield from windows.split(tokens, dim=1)


def logits_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Token ids (windows, length) -> logits (windows, length, vocabulary)."""
    return model(input_ids=batch, use_cache=False).logits


class _Skip(nn.Module):
    """In a block's place: gives what it was made with, and has the block's other attributes. Hooks of the block
    (streamed weights, FSDP2's gathering) are not run."""

    def __init__(self, block: nn.Module, output: Any):
        super().__init__()
        vars(self)["block"], vars(self)["output"] = block, output  # the block is no child

    def forward(self, *_, **__):
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)


class _ExactLinear(torch.autograd.Function):
    """x W^T in float32, of narrower numbers: logits that were rounded would differ by more than a good student's from
    its teacher's. The gradient takes the narrower type's speed."""

    @staticmethod
    def forward(ctx, x, weight, float32):
        ctx.save_for_backward(weight)
        if float32 is None:
            flat = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
            return flat.view(*x.shape[:-1], len(weight))
        with bfloat16_products(x.dtype == weight.dtype == torch.bfloat16):
            return functional.linear(x.float(), float32)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None, None


def _float32_weight(layer: nn.Linear | None) -> torch.Tensor | None:
    """The layer's weight, which must be whole, in float32; not on CUDA, which has a product of narrower numbers that
    gives it."""
    return None if layer is None or layer.weight.is_cuda else layer.weight.detach().float()


@contextmanager
def _exact(layer: nn.Linear | None, float32: torch.Tensor | None) -> Iterator[None]:
    """The layer gives float32 for the duration. float32: of `_float32_weight`."""
    if layer is None:
        yield
        return
    with forwards([layer], [lambda x: _with_bias(_ExactLinear.apply(x, layer.weight, float32), layer.bias)]):
        yield


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias
