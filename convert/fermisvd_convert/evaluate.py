"""Perplexity, and how far a model is from a reference."""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from transformers import PreTrainedModel

from fermisvd.errors import NumericalError
from fermisvd.hf import vocabulary_of
from fermisvd.losses import Head, kl_divergence
from fermisvd.running.blocks import BlocksError, DecoderBlocks, HiddenStates, device_of, states_by_blocks
from fermisvd.running.distributed import own_part, sum_over_processes
from fermisvd.running.halves import compared_tokens, few_tokens, halves_of
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import Taught, teach
from fermisvd_convert.loading import SourceError, context_length, load_tokenizer, resolve_device, window_length
from fermisvd_convert.options import EvaluateOptions
from fermisvd_convert.progress import bar
from fermisvd_convert.source import load_checked
from fermisvd_convert.text import check_vocabulary, read_windows

logger = logging.getLogger("fermisvd")


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean negative log-likelihood, infinite where that is beyond all numbers; tokens: predicted
    ones; kl: mean KL(reference || model) in nats; top1_agreement: fraction of tokens where both put the same one first.
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: torch.Tensor,
    reference: Taught | None = None,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
    label: str = "evaluate",
) -> Evaluation:
    """Mean over the L-1 predicted tokens of each window; of several processes each takes its part of them.

    windows: (windows, L) token ids.
    reference: what another model makes of them; head: that model's, if it is not this model's own.
    """
    halves, device = halves_of(model), device_of(model)
    measured = Measured(lambda _, states: halves.head(states), head or halves.head)
    numbers = own_part(torch.arange(len(windows)).split(batch_size))
    with bar(label, len(numbers), "batch") as shown:
        for part in numbers:
            expected = None if reference is None else reference.batch(part, device)[1]
            batch = windows[part].to(device)
            measured.add(batch, halves.body(batch), expected)
            shown.advance()
    return measured.result()


@torch.no_grad()
def evaluate_by_blocks(
    model: PreTrainedModel,
    windows: torch.Tensor,
    hidden: HiddenStates,
    batch_size: int = BATCH_SIZE,
    label: str = "evaluate",
) -> Evaluation:
    """As `evaluate`, a decoder block at a time: for a streamed model, which reads each block's weights once."""
    device = device_of(model)
    try:
        blocks = DecoderBlocks(model)
        blocks.first(windows[:batch_size].to(device))
    except BlocksError as error:
        logger.warning("%s; the model is run whole", error)
        return evaluate(model, windows, batch_size=batch_size, label=label)
    batches, measured = own_part(list(enumerate(windows.split(batch_size)))), Measured(blocks.head)
    with bar(label, (len(blocks.blocks) + 1) * len(batches), "batch") as shown:
        for number, states in states_by_blocks(blocks, batches, hidden, shown.advance):
            measured.add(windows.split(batch_size)[number].to(device), states)
            shown.advance()
    return measured.result()


class Measured:
    """Sums over tokens, of which the head is asked for a few at a time.

    head: (ids, states) -> logits; reference: the reference's, states -> logits.
    """

    def __init__(
        self, head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], reference: Head = lambda states: states
    ):
        self.head, self.reference = head, reference
        self.loss = self.kl = self.agreement = 0.0
        self.tokens = self.compared = 0

    def add(self, batch: torch.Tensor, states: torch.Tensor, expected: torch.Tensor | None = None) -> None:
        """Token ids (windows, length), states behind the last block, and the reference's or none."""
        tokens = compared_tokens(states.device)
        parts = [few_tokens(each, tokens) for each in (batch[:, :-1], batch[:, 1:], states[:, :-1])]
        others = repeat(None) if expected is None else few_tokens(expected[:, :-1], tokens)
        for (ids, following, own), other in zip(zip(*parts, strict=True), others, strict=False):
            given = self.head(ids, own).float()
            self.loss -= given.log_softmax(-1).gather(-1, following[..., None]).double().sum().item()
            self.tokens += following.numel()
            if other is not None:
                wanted = self.reference(other.to(own.dtype)).float()
                self.kl += kl_divergence(wanted, given).item() * following.numel()
                self.agreement += (wanted.argmax(-1) == given.argmax(-1)).sum().item()
                self.compared += following.numel()

    def result(self) -> Evaluation:
        """Over all processes' windows. Raises NumericalError if the logits were not finite."""
        sums = torch.tensor([self.loss, self.tokens, self.kl, self.compared, self.agreement], dtype=torch.float64)
        loss, tokens, kl, compared, agreement = sum_over_processes(sums).tolist()
        mean = loss / tokens
        if math.isnan(mean):
            raise NumericalError("the model's logits hold NaN or infinite values on this text")
        return Evaluation(
            math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf,
            int(tokens),
            kl / compared if compared else None,
            agreement / compared if compared else None,
        )


def evaluate_files(model: str, **given: Any) -> Evaluation:
    """`fermisvd evaluate`: a model by folder or hub id. given: options of EvaluateOptions by name.

    Raises FermiSVDError for an unreadable model or a text shorter than one window.
    """
    options = EvaluateOptions.named(**given)
    device, trust = resolve_device(options.device), options.trust_remote_code
    loaded, folder = load_checked(model, device, options.compute, trust)
    compared = taught = head = None
    if options.reference is not None:
        compared = load_checked(options.reference, device, options.compute, trust)[0]
        if compared.config.vocab_size != loaded.config.vocab_size:
            sizes = f"{compared.config.vocab_size} and {loaded.config.vocab_size}"
            raise SourceError(f"--reference {options.reference}: another vocabulary than {model} ({sizes} tokens)")
    length = window_length(options.sequence_length, context_length(loaded.config))
    tokenizer = load_tokenizer(folder, trust)
    read = read_windows(tokenizer, options.text, length, options.windows, options.bos, options.skip_bad_rows)
    logger.warning("%s: %s", options.text, read.rows)
    check_vocabulary(read.ids, vocabulary_of(loaded), model)
    if compared is not None:
        taught, head = teach(compared, read.ids, options.batch_size), halves_of(compared).head
    return evaluate(loaded, read.ids, taught, head, options.batch_size)
