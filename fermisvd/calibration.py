"""Calibration sums: Gram matrices C = sum X X^T of inputs and G = sum g g^T of output gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from fermisvd.decomposition import OutputGram, float32_is_whole
from fermisvd.errors import NumericalError
from fermisvd.linear import linear_layer, weight_of
from fermisvd.precision import bfloat16_products
from fermisvd.running.blocks import DecoderBlocks, HiddenStates, device_of, run_again, segments, sweep
from fermisvd.running.distributed import own_part, sum_over_processes
from fermisvd.running.halves import few_tokens, logits_of
from fermisvd.settings import SEED

Grams = dict[str, torch.Tensor]
OutputGrams = dict[str, OutputGram]
Part = tuple[list[str], list[str]]  # names of sources, names of members
TOKENS = 4096  # added up in float32 at most, before they go into a sum in float64
PANEL = 256  # columns of a Gram matrix that are computed together, at least; else an eighth of them


class GramSums:
    """Running sums of C for the inputs of `sources` and of G for the outputs of `members`, names of linear layers.

    Sums are float64, since a Gram matrix squares the condition number, and the tail of the spectrum is what rank
    selection compares; products of narrower numbers are float32 (`add_gram`).
    """

    def __init__(self, model: PreTrainedModel, sources: Sequence[str], members: Sequence[str]):
        self.model = model
        self.layers = {name: linear_layer(model, name) for name in members}
        device = device_of(model)
        self.grams = {name: _zeros(weight_of(linear_layer(model, name)).shape[1], device) for name in sources}
        self.outputs = {name: _zeros(min(layer.weight.shape), device) for name, layer in self.layers.items()}
        self.totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in members}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forward and backward passes inside are added."""
        hooks = [
            linear_layer(self.model, name).register_forward_pre_hook(partial(self._see_input, name))
            for name in self.grams
        ]
        hooks += [
            layer.register_forward_hook(partial(self._await_gradient, name)) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see_input(self, name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        add_gram(self.grams[name], inputs[0].detach().flatten(0, -2))

    def _await_gradient(self, name: str, _: nn.Module, inputs: object, outputs: torch.Tensor) -> None:
        outputs.register_hook(partial(self._see_gradient, name))

    def _see_gradient(self, name: str, gradient: torch.Tensor) -> None:
        weight, gradients = weight_of(self.layers[name]).detach(), gradient.flatten(0, -2)  # (m, n), (tokens, m)
        assert weight.device == gradients.device, name  # torch multiplies by a tensor without values and says nothing
        self.totals[name] += torch.linalg.vector_norm(gradients, dtype=torch.float64).square()
        for g in gradients.split(TOKENS):
            add_gram(self.outputs[name], product(g, weight) if weight.shape[0] > weight.shape[1] else g)

    def result(self) -> tuple[Grams, OutputGrams]:
        """The sums over all processes. Raises NumericalError naming a layer where they are NaN or infinite."""
        for name, gram in self.grams.items():
            if not _mirror(sum_over_processes(gram)).isfinite().all():
                raise NumericalError(f"the input of {name} holds NaN or infinite values during calibration")
        found = {}
        for name, matrix in self.outputs.items():
            if not _mirror(sum_over_processes(matrix)).isfinite().all():
                raise NumericalError(f"the gradient at the output of {name} is NaN or infinite during calibration")
            mean = sum_over_processes(self.totals[name]).item() / len(weight_of(self.layers[name]))
            found[name] = OutputGram(matrix, mean)
        return self.grams, found


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to the lower triangle of `total` (n x n), float64, in panels of columns; what is above it is not
    meaningful before `_mirror`. x: (tokens, n); what it adds up in float32 are TOKENS at most (docs/results.md,
    Where float32 suffices)."""
    width = panel_width(len(total))
    for part in x.split(TOKENS):
        for first in range(0, len(total), width):
            total[first:, first : first + width] += product(part[:, first:].T, part[:, first : first + width])


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (a x k) right (k x b): float64 where either is, else float32, never rounded to less: torch's own product of
    two bfloat16 matrices would be bfloat16, and one of float32 may be TF32."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)  # tensor cores; products of bfloat16 are exact in float32
    exact = left.dtype == right.dtype == torch.bfloat16
    wide = torch.float64 in (left.dtype, right.dtype) or not float32_is_whole()
    kind = torch.float64 if wide else torch.float32
    with bfloat16_products(exact and not wide):
        return left.to(kind) @ right.to(kind)


def panel_width(n: int) -> int:
    """Columns of an (n x n) Gram matrix that are computed together: few panels, for large products."""
    return max(PANEL, -(-n // 8))


def _mirror(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle also above the diagonal, in place."""
    width = panel_width(len(matrix))
    for first in range(0, len(matrix), width):
        matrix[first : first + width, first + width :] = matrix[first + width :, first : first + width].T
    return matrix


@torch.no_grad()
def gram_matrices(model: PreTrainedModel, sources: Sequence[str], batches: Iterable[torch.Tensor]) -> Grams:
    """Gram matrix of the input of each layer in `sources`, over all tokens of all batches; see `calibration_grams`."""
    return calibration_grams(model, sources, [], batches)[0]


def calibration_grams(
    model: PreTrainedModel,
    sources: Sequence[str],
    members: Sequence[str],
    batches: Iterable[torch.Tensor],
    seed: int = SEED,
    on_batch: Callable[[], object] = lambda: None,
) -> tuple[Grams, OutputGrams]:
    """C of the inputs of `sources` and G of the outputs of `members`, over all tokens of all batches, in one pass of
    the whole model: for models that `DecoderBlocks` does not take apart, and the reference of `grams_by_blocks`.

    sources, members: names of linear layers; batches: token ids, (batch, length), without padding, of which each
    process takes its part; seed: of the drawn tokens; on_batch: called after each batch. g is the gradient of log p(y)
    at the layer's output, y drawn from the model's own prediction: G is then the output side of the KL's second
    derivative (the Fisher matrix), which the text's own next tokens only resemble.
    Returns name -> (n x n) float64 tensors on the model's device, and name -> OutputGram.
    Raises NumericalError naming the layer whose input or gradient is NaN or infinite.
    """
    sums, device = GramSums(model, sources, members), device_of(model)
    with sums.watching():
        for number, batch in _of_this_process(batches):
            if members:
                with frozen(model), _differentiable_embeddings(model):
                    batch = batch.to(device)
                    logits = logits_of(model, batch)
                    logits.backward(drawn_gradient(batch, logits, lambda _, few: few, seed, number))
            else:
                body = getattr(model, "base_model", model)  # without the head: its logits would outweigh the matrices
                with torch.no_grad():
                    body(input_ids=batch.to(device), use_cache=False)
            on_batch()
    return sums.result()


def grams_by_blocks(
    blocks: DecoderBlocks,
    sources: Sequence[str],
    members: Sequence[str],
    batches: Sequence[torch.Tensor],
    hidden: HiddenStates,
    seed: int = SEED,
    limit_bytes: int | None = None,
    on_batch: Callable[[], object] = lambda: None,
    on_last: Callable[[int, torch.Tensor], object] = lambda number, states: None,
) -> Iterator[tuple[Grams, OutputGrams]]:
    """As `calibration_grams`, a decoder block at a time and its results at once, blocks in the order that they are
    done: with gradients wanted from the last to the first. The states before a block are then those that were kept on
    the way there, or computed once more from these (`segments`).

    limit_bytes: of the matrices gathered in one pass over a block; it is run again for the others. on_batch: called
    whenever a batch is through a block and, with gradients, through the head, again through a block whose states were
    not kept, and back through each block; `passes_by_blocks` says how often. on_last: called with each batch's number
    and its states behind the last block, (windows, length, hidden), in the model's own type.
    """
    mine, device = _of_this_process(batches), device_of(blocks.model)
    wanted, reached = _by_block(blocks, sources, members)
    with frozen(blocks.model):
        if not members:
            with torch.no_grad():
                for number, batch in mine:
                    hidden.put("last", number, blocks.first(batch.to(device)))
            for index, names in enumerate(wanted):
                with blocks.present(index):
                    parts = _parts(blocks.model, *names, limit_bytes)
                    for part in parts:
                        yield _there(blocks, index, part, part is parts[-1], mine, hidden, on_batch)
            for number, _ in mine:
                on_last(number, hidden.get("last", number, device))
            hidden.drop("last", mine)
            return
        back = segments(range(reached[0], len(blocks.blocks)))
        sweep(blocks, mine, hidden, [segment.start for segment in back], on_batch)
        for number, batch in mine:
            on_last(number, hidden.get("last", number, device))
            states = hidden.get("last", number, device)
            hidden.drop("last", [(number, batch)])
            hidden.put("gradient", number, drawn_gradient(batch.to(device), states, blocks.head, seed, number))
            on_batch()
        for segment in reversed(back):
            run_again(blocks, segment, mine, hidden, on_batch)
            for index in reversed(segment):
                with blocks.present(index):
                    parts = _parts(blocks.model, *wanted[index], limit_bytes)
                    for part in parts:
                        yield _back(blocks, index, part, part is parts[-1], mine, hidden, on_batch)
                hidden.drop(f"before {index}", mine)
        hidden.drop("gradient", mine)


def passes_by_blocks(
    blocks: DecoderBlocks,
    sources: Sequence[str],
    members: Sequence[str],
    batches: Sequence[torch.Tensor],
    limit_bytes: int | None = None,
) -> int:
    """How often `grams_by_blocks` calls on_batch in this process."""
    wanted, reached = _by_block(blocks, sources, members)
    visited = range(reached[0] if members else 0, len(wanted))
    passes = sum(len(_parts(blocks.model, *wanted[index], limit_bytes)) for index in visited)
    if members:  # the way there, the head, and blocks whose states were not kept
        passes += len(wanted) + 1 + len(visited) - len(segments(visited))
    return passes * len(_of_this_process(batches))


@torch.no_grad()
def _there(
    blocks: DecoderBlocks,
    index: int,
    part: Part,
    final: bool,
    mine: Sequence[tuple[int, torch.Tensor]],
    hidden: HiddenStates,
    on_batch: Callable[[], object],
) -> tuple[Grams, OutputGrams]:
    """final: the block's states are not needed again."""
    sums, device = GramSums(blocks.model, *part), device_of(blocks.model)
    with sums.watching():
        for number, _ in mine:
            states = blocks.run(index, hidden.get("last", number, device))
            if final:
                hidden.put("last", number, states)
            on_batch()
    return sums.result()


def _back(
    blocks: DecoderBlocks,
    index: int,
    part: Part,
    final: bool,
    mine: Sequence[tuple[int, torch.Tensor]],
    hidden: HiddenStates,
    on_batch: Callable[[], object],
) -> tuple[Grams, OutputGrams]:
    """final: the gradient behind the block is not needed again, and that before it takes its place."""
    sums, device = GramSums(blocks.model, *part), device_of(blocks.model)
    with sums.watching():
        for number, _ in mine:
            states = hidden.get(f"before {index}", number, device).detach().requires_grad_()
            blocks.run(index, states).backward(hidden.get("gradient", number, device))
            if final:
                hidden.put("gradient", number, _gradient_of(states))
            on_batch()
    return sums.result()


def _by_block(blocks: DecoderBlocks, sources: Sequence[str], members: Sequence[str]) -> tuple[list[Part], list[int]]:
    """Of each block the names that are layers of it, and the numbers of the blocks that have any."""
    prefixes = [f"{blocks.prefix}.{index}." for index in range(len(blocks.blocks))]
    wanted = [
        ([n for n in sources if n.startswith(prefix)], [n for n in members if n.startswith(prefix)])
        for prefix in prefixes
    ]
    return wanted, [index for index, names in enumerate(wanted) if any(names)]


def _parts(model: PreTrainedModel, sources: list[str], members: list[str], limit_bytes: int | None) -> list[Part]:
    """Names whose matrices are gathered together; one at least in each part, and one part at least."""
    parts: list[Part] = [([], [])]
    room = limit_bytes
    for kind, names in enumerate((sources, members)):
        for name in names:
            shape = weight_of(linear_layer(model, name)).shape
            size = 8 * (min(shape) if kind else shape[1]) ** 2
            if room is not None:
                assert limit_bytes is not None
                if size > room and any(parts[-1]):
                    parts.append(([], []))
                    room = limit_bytes
                room -= size
            parts[-1][kind].append(name)
    return parts


def _of_this_process(batches: Iterable[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    """This process' part of the batches, with their numbers."""
    return own_part(list(enumerate(batches)))


def drawn_gradient(
    batch: torch.Tensor,
    states: torch.Tensor,
    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int,
    number: int,
) -> torch.Tensor:
    """Gradient of -log p(y) at the states (windows, length, width), y drawn from the logits that the head makes of ids
    and states, a few tokens at a time; the draw depends on the batch's number alone, whichever process has it. Raises
    NumericalError if the logits are not finite."""
    draw, found = torch.Generator(states.device).manual_seed(seed * 2**20 + number), torch.empty_like(states)
    for ids, few, gradient in zip(few_tokens(batch), few_tokens(states), few_tokens(found), strict=True):
        few = few.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(ids, few)
        if not logits.isfinite().all():
            raise NumericalError("the model's logits hold NaN or infinite values during calibration")
        error = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(error.flatten(0, -2), 1, generator=draw).view(*logits.shape[:-1], 1)
        error.scatter_add_(-1, drawn, error.new_full(drawn.shape, -1.0))
        gradient.copy_(torch.autograd.grad(logits, few, error.to(logits.dtype))[0])
    return found


def _gradient_of(states: torch.Tensor) -> torch.Tensor:
    assert states.grad is not None
    return states.grad


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def _differentiable_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """So that there is a graph though no parameter is trained."""
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, y: y.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


def _zeros(width: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(width, width, dtype=torch.float64, device=device)
