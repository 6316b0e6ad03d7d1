"""What the dense model makes of the text that is trained on: asked once, for every step that compares a student."""

import logging
from collections.abc import Callable
from itertools import chain

import torch
from transformers import PreTrainedModel

from fermisvd.running import distributed
from fermisvd.running.blocks import BlocksError, DecoderBlocks, device_of, states_by_blocks
from fermisvd.running.halves import Split, halves_of
from fermisvd.teacher import Taught, teach
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.memory import give_back
from fermisvd_convert.progress import bar
from fermisvd_convert.workspace import Stage, settings_key

logger = logging.getLogger("fermisvd")


def teacher_stage(conversion: Conversion) -> Stage:
    """Where the states of each batch of windows are kept, by its name; a longer text finds those of its beginning."""
    return conversion.workspace.stage("teacher", conversion.key, conversion.options.compute)


def batches_of(conversion: Conversion) -> list[tuple[str, torch.Tensor]]:
    """Of the text's windows, by name."""
    return [(settings_key(batch), batch) for batch in conversion.text.windows.split(conversion.passes.calibrated)]


def batches_to_ask(conversion: Conversion) -> list[tuple[str, torch.Tensor]]:
    """Of the text's windows, those whose states are not kept, by name."""
    stage = teacher_stage(conversion)
    return [(name, batch) for name, batch in batches_of(conversion) if not stage.has(name)]


def keeper(conversion: Conversion, model: PreTrainedModel) -> Callable[[int, torch.Tensor], None]:
    """Keeps a batch's states that calibration comes by, unless the batch is cut short for the text's last windows; none
    of a model whose head needs more than them, or where no step asks."""
    stage, batches = teacher_stage(conversion), batches_of(conversion)
    useful = conversion.options.asks_teacher and isinstance(halves_of(model), Split)

    def keep(number: int, states: torch.Tensor) -> None:
        name, batch = batches[number]
        if useful and len(states) == len(batch):
            stage.save(name, {"states": states})

    return keep


@timed("calibrate")
def ask_teacher(conversion: Conversion) -> Taught:
    """All of the text's windows, and the dense model's states; those that calibration did not keep on its way are
    computed, by each process its part. No states where no step asks for them."""
    stage, windows = teacher_stage(conversion), conversion.text.windows
    if not conversion.options.asks_teacher:
        return Taught(windows, [])
    first, batches = distributed.this_process() == 0, batches_of(conversion)
    missing = distributed.from_first([name for name, _ in batches_to_ask(conversion)] if first else None)
    if missing:
        if mine := distributed.own_part([each for each in batches if each[0] in missing]):
            _ask(conversion, stage, mine)
        conversion.workspace.wait_for_all()
    kept = (stage.load(name)["states"] for name, _ in batches)  # as far as they are read: in the page cache
    return Taught(windows, list(chain.from_iterable(states.unbind() for states in kept)))


@torch.no_grad()
def _ask(conversion: Conversion, stage: Stage, batches: list[tuple[str, torch.Tensor]]) -> None:
    model = conversion.stream()
    try:
        blocks = DecoderBlocks(model)
        blocks.first(batches[0][1].to(device_of(model)))
        if not isinstance(halves_of(model), Split):
            raise BlocksError(f"{type(model).__name__}: its head needs more than the states behind the last block")
    except BlocksError as error:
        if conversion.limits.bounded:
            raise BlocksError(f"{error}; it is run whole, which --max-memory does not allow") from None
        logger.warning("%s; the model is run whole", error)
        with bar("ask the teacher", len(batches), "batch") as shown:
            for name, batch in batches:
                states = teach(model, batch, len(batch)).states
                stage.save(name, {"states": torch.stack(list(states))})
                shown.advance()
        return
    numbered = [(number, batch) for number, (_, batch) in enumerate(batches)]
    with (
        conversion.workspace.hidden_states(conversion.limits.hidden_bytes) as hidden,
        bar("ask the teacher", len(blocks.blocks) * len(batches), "batch") as shown,
    ):
        for number, states in states_by_blocks(blocks, numbered, hidden, shown.advance):
            stage.save(batches[number][0], {"states": states})
            give_back()
