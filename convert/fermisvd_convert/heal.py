"""`fermisvd heal`: distil a compressed checkpoint's factors from its dense model, and write it anew."""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from tqdm import tqdm

from fermisvd.files import read_headers
from fermisvd.format import read_config, validate_checkpoint
from fermisvd.healing import HealingSettings, heal, rounded_factors, trained_factors
from fermisvd.hf import load_model
from fermisvd_convert.checks import Count, Natural, Texts, check_place, checked
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.output import (
    RECORD,
    OutputError,
    check_free,
    claimed,
    complete,
    list_files,
    move_into_place,
    unfinished,
)
from fermisvd_convert.places import OURS, real_path
from fermisvd_convert.report import calibration_name
from fermisvd_convert.source import (
    TORCH_TYPES,
    Source,
    SourceError,
    context_length,
    load_dense_or_compressed,
    load_tokenizer,
    open_source,
    resolve_device,
    window_length,
)
from fermisvd_convert.text import TextError, calibration_text, check_vocabulary
from fermisvd_convert.writer import replace_tensors


@checked
def heal_checkpoint(
    checkpoint: str | Path,
    healed: str | Path,
    text: Texts,
    *,
    teacher: str | None = None,
    steps: Count = 200,
    samples: Annotated[int, Field(ge=2)] = 1024,
    sequence_length: Count | None = None,
    bos: bool = True,
    skip_bad_rows: bool = False,
    batch_size: Count = 8,
    learning_rate: Annotated[float, Field(ge=0)] = 0.1,
    device: str = "auto",
    seed: Natural = 0,
    trust_remote_code: bool = False,
) -> dict:
    """Write `healed`, a copy of `checkpoint` with trained factors; returns the record that `healed`/healing.json holds.

    teacher: the dense model, None for the base model that the checkpoint names; text: as --calibration of convert;
    bos, skip_bad_rows: as of text.windows_of; samples: windows to train on, over and over; learning_rate: as in
    HealingSettings. `healed` appears whole or not at all. Raises FermiSVDError for bad input, naming it.
    """
    checkpoint, healed = Path(checkpoint), real_path(healed)
    check_place(healed, "choose another HEALED")
    check_free(healed, "choose another HEALED")
    if real_path(checkpoint) in healed.parents:
        raise OutputError(f"{healed}: lies inside {checkpoint}; choose another HEALED")
    if teacher is not None and Path(teacher).is_dir() and real_path(teacher) in healed.parents:
        raise OutputError(f"{healed}: lies inside {teacher}; choose another HEALED")
    validate_checkpoint(checkpoint)
    provenance = read_config(checkpoint).provenance
    source = _teacher(checkpoint, teacher, provenance, trust_remote_code)
    device = resolve_device(device)
    student, dense = load_dense_or_compressed(checkpoint, device, trust_remote_code), source.load(device)
    length = window_length(sequence_length, context_length(student.config))
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    chosen = calibration_text(tokenizer, text, samples, length, bos=bos, skip_bad_rows=skip_bad_rows)
    check_vocabulary(chosen.windows, source.vocabulary, checkpoint)
    if len(chosen.windows) < 2:
        raise TextError(
            f"{', '.join(text)}: one window of {length} tokens to train on, two are needed; give more text or --samples"
        )
    with claimed(healed) as place:
        check_free(healed, "choose another HEALED")  # with what was put back
        before = evaluate(student, chosen.held_back, dense, batch_size, label="evaluate")
        begin = time.perf_counter()
        settings = HealingSettings(steps, batch_size, learning_rate, seed)
        with tqdm(total=steps, desc="heal", leave=False) as bar:

            def show(record: dict) -> None:
                bar.update()
                bar.set_postfix(kl=f"{record['kl']:.4f}")

            held = -(-len(chosen.windows) // 8)
            # the last decide whether it helped: the first may be those that the checkpoint was calibrated on
            outcome = heal(dense, student, chosen.windows[:-held], chosen.windows[-held:], settings, show)
        seconds = round(time.perf_counter() - begin, 2)
        with unfinished(place) as partial:
            shutil.copytree(checkpoint, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(OURS))
            stored = read_headers(checkpoint)[next(iter(trained_factors(student)))]  # all factors have one type
            replace_tensors(partial, rounded_factors(student, TORCH_TYPES[stored.dtype]))
            with complete(place):
                final = load_model(partial, torch.float32, trust_remote_code=trust_remote_code).to(device)
                after = evaluate(final, chosen.held_back, dense, batch_size, label="evaluate healed")
                record = {
                    "teacher": source.title,
                    "text": [Path(source).name for source in text],
                    "training_text": chosen.record([calibration_name(source) for source in text]),
                    "bos": chosen.bos,
                    "steps": steps,
                    "windows": len(chosen.windows),
                    "learning_rate": learning_rate,
                    "seed": seed,
                    "before": before.as_dict(),
                    "after": after.as_dict(),
                    "seconds": seconds,
                    **outcome,
                }
                (partial / "healing.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                card = partial / "README.md"
                note = f"\nHealed: {steps} steps of distillation from {record['teacher']}, held-back perplexity "
                note += f"{before.perplexity:.4f} before and {after.perplexity:.4f} after (healing.json).\n"
                card.write_text((card.read_text(encoding="utf-8") if card.exists() else "") + note, encoding="utf-8")
                if (partial / RECORD).exists():
                    conversion = json.loads((partial / RECORD).read_text(encoding="utf-8"))
                    conversion["files"] = list_files(partial)
                    (partial / RECORD).write_text(json.dumps(conversion, indent=1) + "\n", encoding="utf-8")
                move_into_place(place, overwrite=False)
    return record


def _teacher(checkpoint: Path, teacher: str | None, provenance: dict, trust_remote_code: bool) -> Source:
    """The dense model that the checkpoint was made of. Raises SourceError if it is another, or not known."""
    base, revision = str(provenance.get("model")), provenance.get("revision")
    if teacher is None and ("/" not in base or trust_remote_code):  # a checkpoint does not choose whose code is run
        raise SourceError(f"{checkpoint}: its base model is {base!r}; give the dense model by --teacher")
    source = open_source(teacher or base, revision if teacher in (None, base) else None, trust_remote_code)
    if provenance.get("model_sha256") not in (None, source.key):
        raise SourceError(f"--teacher {source.name}: not the model that {checkpoint} was made of (hashes differ)")
    return source
