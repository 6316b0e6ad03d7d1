"""The closing distillation of the written checkpoint's factors."""

from pathlib import Path

from fermisvd.compress import set_aside
from fermisvd.format import read_config
from fermisvd.healing import HealingState, heal, rounded_factors
from fermisvd.teacher import Taught
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.loading import load_dense_or_compressed
from fermisvd_convert.progress import bar
from fermisvd_convert.workspace import file_hash
from fermisvd_convert.writer import replace_tensors


@timed("heal")
def heal_factors(conversion: Conversion, checkpoint: Path, taught: Taught) -> dict | None:
    """Put factors that were distilled from the dense model in the place of a written checkpoint's, and give the record
    of it; None where nothing is to be healed, or nothing can be. An interrupted run goes on where it was kept last."""
    options = conversion.options
    if not (options.healing.steps and read_config(checkpoint).groups):
        return None
    aside, training = set_aside(taught[: options.samples])
    factors = [file_hash(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    settings = (options.healing, options.batch_size, options.seed, options.compute)
    stage = conversion.workspace.stage("healed", conversion.key, factors, training.windows, aside.windows, *settings)

    def make() -> dict:
        found, keep = stage.tensor_progress()
        begun = HealingState(*found) if found else None
        done = len(begun.records) if begun else 0
        with bar("heal", options.healing.steps, done=done) as shown:
            student = load_dense_or_compressed(
                checkpoint, conversion.device, conversion.compute, options.trust_remote_code
            )
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
            )
        stage.save("factors", rounded_factors(student, conversion.storage))
        return record

    record = stage.json(make, lambda _: stage.has("factors"))
    replace_tensors(checkpoint, stage.load("factors"))
    return record
