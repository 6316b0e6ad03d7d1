"""The whole conversion, top to bottom: calibrate, decompose, choose ranks, fix the gauge, write, heal, measure."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fermisvd.bits import ranked_within
from fermisvd.budget import RankedGroup, compressed, stored_in_groups
from fermisvd.decomposition import Decomposition
from fermisvd.files import read_headers
from fermisvd.hf import auto_class
from fermisvd.running import distributed
from fermisvd_convert.card import write_card
from fermisvd_convert.checks import check_out
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.memory import writing_bytes
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.output import Place, claimed, complete, list_files, move_into_place, unfinished
from fermisvd_convert.places import real_path
from fermisvd_convert.preflight import check_room, prepare
from fermisvd_convert.record import GroupRow, Record, group_rows, totals, versions
from fermisvd_convert.stages.bits import choose_bits
from fermisvd_convert.stages.calibration import calibrate
from fermisvd_convert.stages.decomposition import FactorsOf, decompose
from fermisvd_convert.stages.evaluation import evaluate_compressed, evaluate_dense
from fermisvd_convert.stages.healing import heal_factors
from fermisvd_convert.stages.joining import join
from fermisvd_convert.stages.ranks import IdealRanks, choose_ranks
from fermisvd_convert.stages.refit import refit_groups
from fermisvd_convert.stages.rescaling import rescale_groups
from fermisvd_convert.stages.serving import check_served
from fermisvd_convert.stages.structure import Structure, find_structure
from fermisvd_convert.stages.teacher import ask_teacher
from fermisvd_convert.text import recorded_names
from fermisvd_convert.writer import weight_bytes, write_checkpoint, write_config

logger = logging.getLogger("fermisvd")


def convert(model: str | Path, out: str | Path, remove: float | None = None, **options: Any) -> Record:
    """Compress `model` (folder or hub id) into the new folder `out`; returns the record that `out`/fermisvd.json holds.

    remove: fraction of the parameters of the decoder blocks' linear layers, unless `bytes` is given; options: those of
    ConvertOptions by name, which are the command line's. `out` appears whole or not at all.
    Started by torchrun, the processes share the work; `out` and `work` must be folders that they all see.
    Raises FermiSVDError for bad input, naming it.
    """
    prepared = prepare(str(model), real_path(out), ConvertOptions.named(remove=remove, **options))
    with at_work(prepared) as (conversion, place):
        structure = find_structure(conversion)
        conversion = check_room(conversion, structure.groups)
        check_served(conversion, structure.groups)
        statistics = calibrate(conversion, structure.groups)
        before = evaluate_dense(conversion)
        decomposition = decompose(conversion, statistics, structure.groups)
        taught = ask_teacher(conversion)
        ideal = choose_ranks(conversion, structure.groups, decomposition, taught)
        ranked = ranked_within(conversion.budget, conversion.bits, ideal.groups, ideal.ranks)
        ranked = join(conversion, ranked, decomposition, taught)
        factors_of = refit_groups(conversion, compressed(ranked), decomposition, taught)
        factors_of = rescale_groups(conversion, compressed(ranked), decomposition, factors_of, taught)
        ranked = choose_bits(conversion, ranked, factors_of, decomposition)
        with unfinished(place) as folder:
            rows = group_rows(ranked, decomposition.sigma) if distributed.this_process() == 0 else []
            write(conversion, folder, stored_in_groups(ranked), factors_of, decomposition, rows)
            healing = heal_factors(conversion, folder, taught)
            with complete(place):
                after = evaluate_compressed(conversion, folder)
                if distributed.this_process():
                    return distributed.received()  # the first process has the record, and OUT
                with distributed.alone():
                    record = record_of(conversion, folder, structure, ideal, rows, before, after, healing)
                    publish(conversion, place, folder, record)
        return distributed.from_first(record)


@contextmanager
def at_work(conversion: Conversion) -> Iterator[tuple[Conversion, Place]]:
    """The processes are there, and OUT and the work directory are this conversion's alone."""
    with (
        distributed.process_group(conversion.device) as device,
        claimed(conversion.out) as place,
        conversion.workspace.locked(),
    ):
        source, folder = conversion.source.name, conversion.workspace.folder
        check_out(conversion.out, source, folder, conversion.options.overwrite)  # with what was put back
        yield replace(conversion, device=device), distributed.from_first(place)


def provenance(conversion: Conversion, rows: Sequence[GroupRow]) -> dict[str, Any]:
    """Of which model, how, and how much: what record and config.json both say. JSON-able."""
    return {
        "model": conversion.source.title,
        "revision": conversion.source.revision,
        "model_sha256": conversion.key,
        "settings": conversion.recorded_settings(),
        "totals": totals(rows).model_dump(),
        "versions": versions(),
    }


def record_of(
    conversion: Conversion,
    folder: Path,
    structure: Structure,
    ideal: IdealRanks,
    rows: Sequence[GroupRow],
    before: dict[str, Any],
    after: dict[str, Any],
    healing: dict[str, Any] | None,
) -> Record:
    """What this conversion did. folder: the written checkpoint; before, after: the evaluations."""
    source, text = conversion.source, conversion.text
    perplexity = {"before": before["perplexity"], "after": after["perplexity"], "tokens": after["tokens"]}
    return Record.model_validate(
        {
            **provenance(conversion, rows),
            "calibration_text": text.record(recorded_names(conversion.options.calibration)),
            "groups": rows,
            "left_dense": structure.left_dense,
            "why_dense": structure.why,
            "left_out": {"tensors": source.left_out, "files": conversion.left_files},
            "trace": {"groups": [group.name for group in ideal.groups], "steps": ideal.trace},
            "choices": conversion.choices,
            "healing": healing,
            "perplexity": perplexity,
            "bytes": {"before": weight_bytes(source.headers), "after": weight_bytes(read_headers(folder))},
            "seconds": conversion.seconds,
        }
    )


@timed("write")
def write(
    conversion: Conversion,
    folder: Path,
    ranked: Sequence[RankedGroup],
    factors_of: FactorsOf,
    decomposition: Decomposition,
    rows: Sequence[GroupRow],
) -> None:
    """All weights into a new folder, each process its part of the files, and the config.

    ranked: groups that are not stored as they were; factors_of: of those that do not stay dense; rows: of the record,
    which the first process has.
    """
    cast, device = conversion.options.dtype != "auto", conversion.device
    workers = conversion.workers(writing_bytes(conversion.size, conversion.options.weights))
    conversion.workspace.wait_for_all()  # factors of joined groups are the first's
    write_checkpoint(
        conversion.source, folder, ranked, factors_of, decomposition, conversion.storage, cast, device, workers
    )
    if distributed.this_process() == 0:
        write_config(conversion.source, folder, ranked, conversion.storage, provenance(conversion, rows))
    distributed.wait_for_all()


def publish(conversion: Conversion, place: Place, folder: Path, record: Record) -> None:
    """Add card and record to a finished checkpoint, and move it to OUT."""
    write_card(record, folder, conversion.source.folder, auto_class(conversion.source.parsed).__name__)
    # apart, so that the same settings give the same files, however long it took
    (folder / "timing.json").write_text(json.dumps(conversion.seconds, indent=1) + "\n", encoding="utf-8")
    record.files = list_files(folder)
    record.write(folder)
    move_into_place(place, conversion.options.overwrite)
