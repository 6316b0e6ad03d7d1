"""Perplexity, and how far a model is from a reference."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from tqdm import tqdm

from fermisvd.losses import kl_divergence
from fermisvd_convert.source import SourceError, load_dense_or_compressed, load_tokenizer, resolve_device, window_length
from fermisvd_convert.text import windows_of


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean negative log-likelihood; tokens: predicted ones; kl: mean KL(reference || model) in
    nats; top1_agreement: fraction of tokens where both put the same one first."""

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
    device = next(model.parameters()).device
    loss = kl = agreement = 0.0
    for batch in tqdm(windows.split(batch_size), desc=label, leave=False):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss -= logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).double().sum().item()
        if reference is not None:
            expected = reference(input_ids=batch, use_cache=False).logits[:, :-1].float()
            kl += kl_divergence(expected, logits).item() * batch[:, 1:].numel()
            agreement += (expected.argmax(-1) == logits.argmax(-1)).sum().item()
    tokens = windows[:, 1:].numel()
    compared = reference is not None
    return Evaluation(
        math.exp(loss / tokens), tokens, kl / tokens if compared else None, agreement / tokens if compared else None
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
) -> Evaluation:
    """`fermisvd evaluate`: models by folder or hub id, the text by file, in float32.

    Raises FermiSVDError for an unreadable model or a text shorter than one window.
    """
    where = resolve_device(device)
    loaded = load_dense_or_compressed(model, where, trust_remote_code)
    compared = None if reference is None else load_dense_or_compressed(reference, where, trust_remote_code)
    if compared is not None and compared.config.vocab_size != loaded.config.vocab_size:
        sizes = f"{compared.config.vocab_size} and {loaded.config.vocab_size}"
        raise SourceError(f"--reference {reference}: another vocabulary than {model} ({sizes} tokens)")
    length = window_length(sequence_length, getattr(loaded.config, "max_position_embeddings", None))
    ids = windows_of(load_tokenizer(model, trust_remote_code), text, length, windows)
    return evaluate(loaded, ids, compared, batch_size)
