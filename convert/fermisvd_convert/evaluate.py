"""Perplexity, and how far a model is from a reference."""

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat

import torch
from torch import nn
from tqdm import tqdm

from fermisvd.blocks import BlocksError, DecoderBlocks, HiddenStates, device_of, logits_by_blocks
from fermisvd.errors import FermiSVDError
from fermisvd.losses import kl_divergence
from fermisvd_convert.source import (
    SourceError,
    context_length,
    load_checked,
    load_tokenizer,
    resolve_device,
    window_length,
)
from fermisvd_convert.text import check_vocabulary, read_windows

logger = logging.getLogger("fermisvd")


class EvaluationError(FermiSVDError):
    """The model computes no numbers."""


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
    model: nn.Module,
    windows: torch.Tensor,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    label: str = "evaluate",
) -> Evaluation:
    """Mean over the L-1 predicted tokens of each window. windows: (windows, L) token ids."""
    batches, device = windows.split(batch_size), device_of(model)
    logits = (model(input_ids=batch.to(device), use_cache=False).logits for batch in batches)
    expected = repeat(None)
    if reference is not None:
        expected = (reference(input_ids=batch.to(device), use_cache=False).logits for batch in batches)
    with tqdm(total=len(batches), desc=label, leave=False) as bar:
        return _measure(batches, logits, expected, bar)


@torch.no_grad()
def evaluate_by_blocks(
    model: nn.Module, windows: torch.Tensor, hidden: HiddenStates, batch_size: int = 8, label: str = "evaluate"
) -> Evaluation:
    """As `evaluate`, a decoder block at a time: for a streamed model, which reads each block's weights once."""
    try:
        blocks = DecoderBlocks(model)
        blocks.first(windows[:batch_size].to(device_of(model)))
    except BlocksError as error:
        logger.warning("%s; the model is run whole", error)
        return evaluate(model, windows, None, batch_size, label)
    batches = windows.split(batch_size)
    with tqdm(total=len(blocks.blocks) + len(batches), desc=label, leave=False) as bar:
        return _measure(batches, logits_by_blocks(blocks, batches, hidden, bar.update), repeat(None), bar)


def _measure(
    batches: Sequence[torch.Tensor],
    logits: Iterable[torch.Tensor],
    expected: Iterable[torch.Tensor | None],
    bar: tqdm,
) -> Evaluation:
    """expected: the reference's logits, or None; bar: moved once a batch."""
    loss = kl = agreement = 0.0
    compared = False
    for batch, given, wanted in zip(batches, logits, expected, strict=False):
        given, batch = given[:, :-1].float(), batch.to(given.device)
        loss -= given.log_softmax(-1).gather(-1, batch[:, 1:, None]).double().sum().item()
        if wanted is not None:
            compared, wanted = True, wanted[:, :-1].float()
            kl += kl_divergence(wanted, given).item() * batch[:, 1:].numel()
            agreement += (wanted.argmax(-1) == given.argmax(-1)).sum().item()
        bar.update()
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    mean = loss / tokens
    if math.isnan(mean):
        raise EvaluationError("the model's logits hold NaN or infinite values on this text")
    return Evaluation(
        math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf,
        tokens,
        kl / tokens if compared else None,
        agreement / tokens if compared else None,
    )


def evaluate_files(
    model: str,
    text: str,
    reference: str | None,
    sequence_length: int | None,
    windows: int | None,
    batch_size: int,
    device: str,
    trust_remote_code: bool = False,
    bos: bool = True,
    skip_bad_rows: bool = False,
) -> Evaluation:
    """`fermisvd evaluate`: models by folder or hub id, the text by file, in float32; bos, skip_bad_rows: as of
    text.windows_of.

    Raises FermiSVDError for an unreadable model or a text shorter than one window.
    """
    where = resolve_device(device)
    loaded, folder = load_checked(model, where, trust_remote_code)
    compared = None if reference is None else load_checked(reference, where, trust_remote_code)[0]
    if compared is not None and compared.config.vocab_size != loaded.config.vocab_size:
        sizes = f"{compared.config.vocab_size} and {loaded.config.vocab_size}"
        raise SourceError(f"--reference {reference}: another vocabulary than {model} ({sizes} tokens)")
    length = window_length(sequence_length, context_length(loaded.config))
    read = read_windows(load_tokenizer(folder, trust_remote_code), text, length, windows, bos, skip_bad_rows)
    logger.warning("%s: %s", text, read.rows)
    check_vocabulary(read.ids, len(loaded.get_input_embeddings().weight), model)
    return evaluate(loaded, read.ids, compared, batch_size)
