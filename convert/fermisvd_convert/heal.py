"""`fermisvd heal`: distil a compressed checkpoint's factors from its dense model, and write it anew."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fermisvd.errors import OutputError
from fermisvd.files import read_headers
from fermisvd.format import read_config, validate_checkpoint
from fermisvd.groups import StructureError
from fermisvd.healing import HealingState, heal, opened_factors, stored_factors
from fermisvd.precision import compute_type, width_of
from fermisvd.teacher import Taught, teach
from fermisvd_convert.checks import check_place
from fermisvd_convert.evaluate import Evaluation, evaluate
from fermisvd_convert.heal_room import bytes_of, windows_that_fit
from fermisvd_convert.loading import (
    SourceError,
    load_dense_or_compressed,
    load_tokenizer,
    resolve_device,
    window_length,
)
from fermisvd_convert.options import HealOptions
from fermisvd_convert.output import Place, check_free, claimed, complete, list_files, move_into_place, unfinished
from fermisvd_convert.places import OURS, ensure_own, real_path, remove_own
from fermisvd_convert.progress import bar
from fermisvd_convert.record import check_readable, list_files_anew
from fermisvd_convert.source import TORCH_TYPES, Source, open_source
from fermisvd_convert.space import check_space
from fermisvd_convert.text import CalibrationText, TextError, calibration_text, check_vocabulary, recorded_names
from fermisvd_convert.workspace import Stage, Workspace, file_hash
from fermisvd_convert.writer import replace_factors


def heal_checkpoint(checkpoint: str | Path, healed: str | Path, **given: Any) -> dict:
    """Write `healed`, a copy of `checkpoint` with trained factors; returns the record that `healed`/healing.json holds.

    given: options of HealOptions by name. `healed` appears whole or not at all; what an interrupted healing had done is
    kept beside it, and the same call goes on from there. Raises FermiSVDError for bad input, naming it.
    """
    checkpoint, healed, options = Path(checkpoint), real_path(healed), HealOptions.named(**given)
    check_healed(checkpoint, healed, options.teacher)
    validate_checkpoint(checkpoint)
    check_readable(checkpoint)
    source, device = dense_model(checkpoint, options), resolve_device(options.device)
    compute = compute_type(options.compute, device, width_of(source.parsed))
    text = training_text(checkpoint, source, options)
    stored = factors_type(checkpoint)
    dtype = torch.promote_types(compute, stored)  # no digit is lost
    with claimed(healed) as place:
        check_free(healed, "choose another HEALED")  # with what was put back
        check_space({healed: {"a copy of the checkpoint": bytes_of(checkpoint)}})
        at_once = windows_that_fit(checkpoint, source, text, options, dtype, device)
        expected, taught = asked(source, device, compute, (text.held_back, text.windows), at_once)
        student = load_dense_or_compressed(checkpoint, device, dtype, options.trust_remote_code)
        before = evaluate(student, text.held_back, expected, batch_size=at_once)
        begin = time.perf_counter()
        with kept_stage(place, healing_key(checkpoint, source, text, options, (compute, dtype))) as stage:
            outcome = train(student, taught, options, stage, at_once, stored)
        outcome["seconds"] = round(time.perf_counter() - begin, 2)
        with unfinished(place) as partial:
            shutil.copytree(checkpoint, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(OURS))
            replace_factors(partial, stored_factors(student, stored), options.trust_remote_code)
            del student  # or two would be held
            with complete(place):
                final = load_dense_or_compressed(partial, device, dtype, options.trust_remote_code)
                after = evaluate(final, text.held_back, expected, batch_size=at_once, label="evaluate healed")
                record = healing_record(source, text, options, compute, before, after) | outcome
                write_records(partial, record)
                move_into_place(place, overwrite=False)
    return record


def check_healed(checkpoint: Path, healed: Path, teacher: str | None) -> None:
    """Raises OutputError unless HEALED can be made, outside of what it is made of."""
    check_place(healed, "choose another HEALED")
    check_free(healed, "choose another HEALED")
    folders = [checkpoint, *([Path(teacher)] if teacher is not None and Path(teacher).is_dir() else [])]
    for folder in folders:
        if real_path(folder) in healed.parents:
            raise OutputError(f"{healed}: lies inside {folder}; choose another HEALED")


def factors_type(checkpoint: Path) -> torch.dtype:
    """Of a compressed checkpoint's factors, or of their scales. Raises StructureError if there are none."""
    groups, headers = read_config(checkpoint).groups, read_headers(checkpoint)
    if not groups:
        raise StructureError(f"{checkpoint}: the model has no compressed layer to heal")
    kinds = {info.dtype for name, info in headers.items() if name.startswith(f"{groups[0].name}.")}
    return next(TORCH_TYPES[kind] for kind in kinds if kind in TORCH_TYPES)


def dense_model(checkpoint: Path, options: HealOptions) -> Source:
    """The model that the checkpoint was made of. Raises SourceError if it is another, or not known."""
    provenance, teacher = read_config(checkpoint).provenance, options.teacher
    base, revision = str(provenance.get("model")), provenance.get("revision")
    if teacher is None and ("/" not in base or options.trust_remote_code):
        # a checkpoint does not choose whose code is run
        raise SourceError(f"{checkpoint}: its base model is {base!r}; give the dense model by --teacher")
    source = open_source(teacher or base, revision if teacher in (None, base) else None, options.trust_remote_code)
    if provenance.get("model_sha256") not in (None, source.check_values()):
        raise SourceError(f"--teacher {source.name}: not the model that {checkpoint} was made of (hashes differ)")
    return source


def training_text(checkpoint: Path, source: Source, options: HealOptions) -> CalibrationText:
    """Windows to train on, and held-back ones. Raises TextError for fewer than two."""
    length = window_length(options.sequence_length, source.context_length())
    tokenizer = load_tokenizer(checkpoint, options.trust_remote_code)
    text = calibration_text(
        tokenizer, options.text, options.samples, length, bos=options.bos, skip_bad_rows=options.skip_bad_rows
    )
    check_vocabulary(text.windows, source.vocabulary, checkpoint)
    if len(text.windows) < 2:
        raise TextError(
            f"{', '.join(options.text)}: one window of {length} tokens to train on, two are needed; give more text or "
            "--samples"
        )
    return text


def asked(
    source: Source, device: str, compute: torch.dtype, texts: Sequence[torch.Tensor], at_once: int
) -> list[Taught]:
    """What the dense model, which is then dropped, makes of each text's windows, at_once of them in a pass."""
    teacher = source.load(device, compute)
    batches = sum(len(windows.split(at_once)) for windows in texts)
    with bar("ask the teacher", batches, "batch") as shown:
        return [teach(teacher, windows, at_once, shown.advance) for windows in texts]


@contextmanager
def kept_stage(place: Place, key: list) -> Iterator[Stage]:
    """Where the training keeps how far it has come. What was kept by other settings goes, since it can be large, and
    the folder does if it stays empty."""
    stage = Workspace(ensure_own(place.work)).stage("healed", key)
    for kept in place.work.glob("healed-*"):
        if not kept.name.startswith(stage.name):
            kept.unlink() if kept.is_file() else remove_own(kept)
    try:
        yield stage
    finally:
        if not any(place.work.glob("*.json")):
            remove_own(place.work)


def healing_key(
    checkpoint: Path, source: Source, text: CalibrationText, options: HealOptions, types: Sequence[torch.dtype]
) -> list:
    """All that the trained factors depend on; the checkpoint has one dense model. types: of it and of the student."""
    factors = [file_hash(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    settings = [options.healing, options.batch_size, options.seed, str(types)]
    return [factors, source.title, text.windows, *settings]


def train(
    student: PreTrainedModel, taught: Taught, options: HealOptions, stage: Stage, at_once: int, stored: torch.dtype
) -> dict:
    """Distil the student in place, at_once windows in a pass, from where the stage was kept last; an eighth of the
    windows decides whether it helped.

    The last decide: the first may be those that the checkpoint was calibrated on.
    """
    held = -(-len(taught) // 8)
    found, keep = stage.tensor_progress()
    begun = HealingState(*found) if found else None
    with bar("heal", options.healing.steps, done=len(begun.records) if begun else 0) as shown:
        return heal(
            student,
            taught[:-held],
            taught[-held:],
            options.healing,
            batch_size=options.batch_size,
            at_once=at_once,
            seed=options.seed,
            on_step=shown.show,
            begun=begun,
            on_progress=lambda state: keep(state.records, state.factors),
            factors=opened_factors(student, stored),
        )


def healing_record(
    source: Source,
    text: CalibrationText,
    options: HealOptions,
    compute: torch.dtype,
    before: Evaluation,
    after: Evaluation,
) -> dict:
    """healing.json, but for what the training gives."""
    return {
        "teacher": source.title,
        "text": recorded_names(options.text),
        "training_text": text.record(recorded_names(options.text)),
        "bos": text.bos,
        "steps": options.healing.steps,
        "windows": len(text.windows),
        "step_windows": options.healing.step_windows(options.batch_size, text.windows.shape[1]),
        "learning_rate": options.healing.learning_rate,
        "seed": options.seed,
        "compute": str(compute).removeprefix("torch."),
        "before": before.as_dict(),
        "after": after.as_dict(),
    }


def write_records(folder: Path, record: dict) -> None:
    """healing.json, a line in the card, and the list of files in the conversion's record."""
    (folder / "healing.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    card = folder / "README.md"
    before, after = record["before"]["perplexity"], record["after"]["perplexity"]
    note = f"\nHealed: {record['steps']} steps of distillation from {record['teacher']}, held-back perplexity "
    note += f"{before:.4f} before and {after:.4f} after (healing.json).\n"
    card.write_text((card.read_text(encoding="utf-8") if card.exists() else "") + note, encoding="utf-8")
    list_files_anew(folder, list_files(folder))
