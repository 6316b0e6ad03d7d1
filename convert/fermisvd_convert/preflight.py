"""Before the long work: what is to be done is looked up, and what cannot end well is refused.

The parts: places (checks.py), the model (source.py), the text (text.py), memory.py, space.py;
docs/refusals.md lists all refusals.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fermisvd.bits import check_room_for_bits
from fermisvd.compress import RANK_RULES
from fermisvd.errors import OptionError
from fermisvd.files import INDEX_NAME, check_name
from fermisvd.groups import LinearGroup
from fermisvd.precision import compute_type, width_of
from fermisvd.running import distributed
from fermisvd_convert.checks import check_out
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.loading import resolve_device, window_length
from fermisvd_convert.memory import model_sizes, passes_that_fit
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.places import OURS, real_path
from fermisvd_convert.source import Source, folder_name, open_source
from fermisvd_convert.space import check_space, out_bytes, work_bytes
from fermisvd_convert.stages.calibration import statistics_of
from fermisvd_convert.stages.decomposition import decomposition_of
from fermisvd_convert.stages.rank_file import ranks_from_file
from fermisvd_convert.tables import settings_line
from fermisvd_convert.text import CalibrationText, TextError, calibration_text, check_vocabulary
from fermisvd_convert.workspace import Workspace
from fermisvd_convert.writer import copied_files, storage_type

logger = logging.getLogger("fermisvd")


def prepare(model: str, out: Path, options: ConvertOptions) -> Conversion:
    """The conversion of a folder or hub id: its model and its text are there and fit each other.

    Raises FermiSVDError naming what does not fit.
    """
    folder = real_path(options.work or out.parent / OURS / "stages" / folder_name(model))
    workspace = Workspace(folder)
    for name in (*options.calibration, options.ranks):
        check_name(Path(name))
    _ = options.budget, options.bits  # which say where their fraction is none
    check_out(out, model, folder, options.overwrite)
    device = resolve_device(options.device)
    source = open_source(model, options.revision, options.trust_remote_code)
    storage = storage_type(options.dtype, source)
    options, text = settled(options, source, device)
    left_files = left_out_files(source)
    say_what_is_left_out(source, left_files)
    conversion = Conversion(options, out, source, "", text, storage, workspace, left_files, device)
    logger.info("%s: %s", source.title, settings_line(conversion.recorded_settings()))
    return with_key(conversion)


@timed("check")
def with_key(conversion: Conversion) -> Conversion:
    """All weights are read once: they are finite, and this is their hash."""
    cast = None if conversion.options.dtype == "auto" else conversion.storage
    return replace(conversion, key=conversion.source.check_values(cast))


def settled(options: ConvertOptions, source: Source, device: str) -> tuple[ConvertOptions, CalibrationText]:
    """The calibration text, and the options with what depends on model, text and device settled: sequence_length, the
    windows that there are, whether groups are refitted and rescaled, the type of the passes.

    Raises TextError if the text does not do.
    """
    length = window_length(options.sequence_length, source.context_length())
    to_heal_on = options.windows_to_heal_on(length)
    asked = max(options.samples, options.gradient_samples, to_heal_on if options.heal_samples else 0)
    text = calibration_text(
        source.tokenizer(),
        options.calibration,
        max(asked, to_heal_on),
        length,
        bos=options.bos,
        skip_bad_rows=options.skip_bad_rows,
    )
    there = len(text.windows)
    if there < asked:
        logger.warning("the text gives %d windows of %d tokens; more were asked for", there, length)
    check_vocabulary(text.windows, source.vocabulary, source.folder)
    if (options.healing.steps or options.refits or options.rescales) and min(there, options.samples) < 2:
        raise TextError(
            f"one calibration window of {length} tokens leaves none to train on; give more text or --samples, or pass "
            f"--heal-steps 0 --no-refit{' --no-rescale' if options.rescale else ''}"
        )
    known = {
        "sequence_length": length,
        "samples": min(options.samples, there),
        "gradient_samples": min(options.gradient_samples, there),
        "heal_samples": min(to_heal_on, there) or None,
        "refit": options.refits,
        "rescale": options.rescales,
        "bos": text.bos,
        "compute": str(compute_type(options.compute, device, width_of(source.parsed))).removeprefix("torch."),
    }
    return options.model_copy(update=known), text


@timed("calibrate")
def check_room(conversion: Conversion, groups: Sequence[LinearGroup]) -> Conversion:
    """The conversion with its limits of memory. Raises FermiSVDError if ranks, weights, memory or disks do not do."""
    options, source = conversion.options, conversion.source
    source.check_linear_layers(groups)
    fitted = groups
    if options.ranks not in RANK_RULES:
        fitted = ranks_from_file(Path(options.ranks), list(groups), options.groups)[0]
    conversion.budget.check(fitted)
    if conversion.bits:
        check_room_for_bits(conversion.budget, conversion.bits, fitted)
    text, item = conversion.windows.numel(), conversion.compute.itemsize
    size = model_sizes(source.headers, list(groups), source.vocabulary, text, item, conversion.device)
    processes = distributed.process_count()
    needed = options
    if options.ranks in RANK_RULES and conversion.budget.holds_all(fitted):  # then no such step runs
        needed = options.model_copy(update={"ranks": "uniform", "groups": "separate", "refit": False, "rescale": False})
    passes, limits = distributed.from_first(
        passes_that_fit(size, needed, conversion.length, conversion.device, processes)
    )
    windows = min(passes.windows, passes.calibrated)
    if windows < options.batch_size:
        logger.warning("memory has room for passes of %d windows: a batch takes several", windows)
    if passes.parts > 1:
        if options.weights != "auto" and options.healing.steps:
            raise OptionError(
                f"--weights {options.weights}: the model is divided among {processes} processes to fit memory, and "
                "healing through a grid is not; give --heal-steps 0"
            )
        logger.warning("memory has no room for the whole model: its blocks are divided among %d processes", processes)
    conversion = replace(conversion, limits=limits, passes=passes, size=size)
    decomposition = decomposition_of(conversion, statistics_of(conversion))
    needed = {
        conversion.out: out_bytes(conversion, groups),
        conversion.workspace.folder: work_bytes(conversion, decomposition, groups),
    }
    check_space(needed)
    return conversion


def left_out_files(source: Source) -> tuple[str, ...]:
    """Files of MODEL that OUT will not have, but for the model's own weights."""
    own = {info.file.name for info in source.headers.values()} | {INDEX_NAME}
    return tuple(name for path in copied_files(source.folder)[1] if (name := path.as_posix()) not in own)


def say_what_is_left_out(source: Source, files: Sequence[str]) -> None:
    """A line each for tensors and files of MODEL that OUT will not have."""
    for kind, names in (("tensors that are no parameters of the model", source.left_out), ("files", files)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            logger.warning("%s: not copied to OUT: %d %s: %s", source.folder, len(names), kind, shown)
