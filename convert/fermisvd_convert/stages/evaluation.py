"""Perplexity of the dense and of the compressed model on the held-back text, a decoder block in memory at a time."""

import logging
from pathlib import Path

from transformers import PreTrainedModel

from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.evaluate import evaluate_by_blocks
from fermisvd_convert.loading import open_streamed

logger = logging.getLogger("fermisvd")


@timed("calibrate")
def evaluate_dense(conversion: Conversion) -> dict:
    """Evaluation of the dense model, as a dict; a warning where it is no better than a guess."""
    stage = conversion.workspace.stage("dense", conversion.key, conversion.options.compute, conversion.text.held_back)
    found = stage.json(lambda: evaluate_streamed(conversion, conversion.stream(), "evaluate dense"), together=True)
    if found["perplexity"] >= conversion.source.vocabulary:
        logger.warning(
            "%s: perplexity %.1f on the held-back text, no better than a guess among its %d tokens: the tokenizer, "
            "the text or the weights are not this model's",
            conversion.source.folder,
            found["perplexity"],
            conversion.source.vocabulary,
        )
    return found


@timed("evaluate")
def evaluate_compressed(conversion: Conversion, folder: Path) -> dict:
    """Evaluation of a written checkpoint, as a dict."""
    student = open_streamed(folder, conversion.device, conversion.compute, conversion.options.trust_remote_code)
    return evaluate_streamed(conversion, student, "evaluate compressed")


def evaluate_streamed(conversion: Conversion, model: PreTrainedModel, label: str) -> dict:
    """Evaluation of a streamed model, as a dict."""
    text, batch_size, limits = conversion.text.held_back, conversion.passes.calibrated, conversion.limits
    with conversion.workspace.hidden_states(limits.hidden_bytes, limits.device_hidden_bytes) as hidden:
        return evaluate_by_blocks(model, text, hidden, batch_size, label).as_dict()
