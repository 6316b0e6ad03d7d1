"""The closing distillation of the written checkpoint's factors."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fermisvd.compress import set_aside
from fermisvd.format import read_config
from fermisvd.healing import HealingState, heal, opened_factors, stored_factors
from fermisvd.running import distributed
from fermisvd.running.streaming import fill_all
from fermisvd.teacher import Taught
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.loading import open_streamed
from fermisvd_convert.progress import bar
from fermisvd_convert.workspace import file_hash
from fermisvd_convert.writer import replace_factors


@timed("heal")
def heal_factors(conversion: Conversion, checkpoint: Path, taught: Taught) -> dict | None:
    """Put factors that were distilled from the dense model in the place of a written checkpoint's, and give the record
    of it; None where nothing is to be healed, or nothing can be. An interrupted run of one process goes on where it was
    kept last."""
    options = conversion.options
    if not (options.healing.steps and read_config(checkpoint).groups):
        return None
    aside, training = set_aside(taught[: options.heal_samples])
    factors = [file_hash(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    windows = options.healing.step_windows(options.batch_size, conversion.length, distributed.process_count())
    settings = (options.healing, windows, options.seed, options.compute)
    stage = conversion.workspace.stage("healed", conversion.key, factors, training.windows, aside.windows, *settings)

    def make() -> dict:
        found, keep = stage.tensor_progress() if distributed.process_count() == 1 else (None, lambda *_: None)
        begun = HealingState(*found) if found else None
        done = len(begun.records) if begun else 0
        with bar("heal", options.healing.steps, done=done) as shown:
            student = load_student(conversion, checkpoint)
            record = heal(
                student,
                training,
                aside,
                options.healing,
                batch_size=options.batch_size,
                at_once=conversion.passes.windows,
                seed=options.seed,
                on_step=shown.show,
                begun=begun,
                on_progress=lambda state: keep(state.records, state.factors),
                factors=opened_factors(student, conversion.storage),
            )
        factors = stored_factors(student, conversion.storage)
        if distributed.this_process() == 0:
            stage.save("factors", factors)
        return record

    record = stage.json(make, lambda _: stage.has("factors"), together=True)
    if distributed.this_process() == 0:
        replace_factors(checkpoint, stage.load("factors"), options.trust_remote_code)
    distributed.wait_for_all()
    return record


def load_student(conversion: Conversion, checkpoint: Path) -> PreTrainedModel:
    """A written checkpoint, its blocks divided among the processes where memory asks for it, one after the other, so
    that the whole need not fit. In the type of the passes, or a wider one where that would lose digits of the factors.
    """
    dtype, trust = torch.promote_types(conversion.compute, conversion.storage), conversion.options.trust_remote_code
    student = open_streamed(checkpoint, conversion.device, dtype, trust)
    fill_all(student, shard=conversion.passes.parts > 1)
    return student
