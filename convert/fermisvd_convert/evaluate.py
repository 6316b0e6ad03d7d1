"""Perplexity, and how far a model is from a reference."""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from transformers import PreTrainedModel

from fermisvd.errors import NumericalError
from fermisvd.hf import vocabulary_of
from fermisvd.losses import kl_divergence
from fermisvd.running.blocks import BlocksError, DecoderBlocks, HiddenStates, device_of, logits_by_blocks
from fermisvd.settings import BATCH_SIZE
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
    reference: PreTrainedModel | None = None,
    batch_size: int = BATCH_SIZE,
    label: str = "evaluate",
) -> Evaluation:
    """Mean over the L-1 predicted tokens of each window. windows: (windows, L) token ids."""
    batches, device = windows.split(batch_size), device_of(model)
    logits = (model(input_ids=batch.to(device), use_cache=False).logits for batch in batches)
    expected = repeat(None)
    if reference is not None:
        expected = (reference(input_ids=batch.to(device), use_cache=False).logits for batch in batches)
    with bar(label, len(batches), "batch") as shown:
        return _measure(batches, logits, expected, shown.advance)


@torch.no_grad()
def evaluate_by_blocks(
    model: PreTrainedModel,
    windows: torch.Tensor,
    hidden: HiddenStates,
    batch_size: int = BATCH_SIZE,
    label: str = "evaluate",
) -> Evaluation:
    """As `evaluate`, a decoder block at a time: for a streamed model, which reads each block's weights once."""
    try:
        blocks = DecoderBlocks(model)
        blocks.first(windows[:batch_size].to(device_of(model)))
    except BlocksError as error:
        logger.warning("%s; the model is run whole", error)
        return evaluate(model, windows, None, batch_size, label)
    batches = windows.split(batch_size)
    with bar(label, (len(blocks.blocks) + 1) * len(batches), "batch") as shown:
        return _measure(batches, logits_by_blocks(blocks, batches, hidden, shown.advance), repeat(None))


def _measure(
    batches: Sequence[torch.Tensor],
    logits: Iterable[torch.Tensor],
    expected: Iterable[torch.Tensor | None],
    on_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """expected: the reference's logits, or None."""
    loss = kl = agreement = 0.0
    compared = False
    for batch, given, wanted in zip(batches, logits, expected, strict=False):
        given, batch = given[:, :-1].float(), batch.to(given.device)
        loss -= given.log_softmax(-1).gather(-1, batch[:, 1:, None]).double().sum().item()
        if wanted is not None:
            compared, wanted = True, wanted[:, :-1].float()
            kl += kl_divergence(wanted, given).item() * batch[:, 1:].numel()
            agreement += (wanted.argmax(-1) == given.argmax(-1)).sum().item()
        on_batch()
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    mean = loss / tokens
    if math.isnan(mean):
        raise NumericalError("the model's logits hold NaN or infinite values on this text")
    return Evaluation(
        math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf,
        tokens,
        kl / tokens if compared else None,
        agreement / tokens if compared else None,
    )


def evaluate_files(model: str, **given: Any) -> Evaluation:
    """`fermisvd evaluate`: a model by folder or hub id, in float32. given: options of EvaluateOptions by name.

    Raises FermiSVDError for an unreadable model or a text shorter than one window.
    """
    options = EvaluateOptions.named(**given)
    device, trust = resolve_device(options.device), options.trust_remote_code
    loaded, folder = load_checked(model, device, trust)
    compared = None
    if options.reference is not None:
        compared = load_checked(options.reference, device, trust)[0]
        if compared.config.vocab_size != loaded.config.vocab_size:
            sizes = f"{compared.config.vocab_size} and {loaded.config.vocab_size}"
            raise SourceError(f"--reference {options.reference}: another vocabulary than {model} ({sizes} tokens)")
    length = window_length(options.sequence_length, context_length(loaded.config))
    tokenizer = load_tokenizer(folder, trust)
    read = read_windows(tokenizer, options.text, length, options.windows, options.bos, options.skip_bad_rows)
    logger.warning("%s: %s", options.text, read.rows)
    check_vocabulary(read.ids, vocabulary_of(loaded), model)
    return evaluate(loaded, read.ids, compared, options.batch_size)
