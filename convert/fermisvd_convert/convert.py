"""The whole conversion, top to bottom: calibrate, decompose, choose ranks, fix the gauge, write, measure."""

import json
import logging
import platform
import time
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from fermisvd import distributed
from fermisvd.budget import Form, check_budget, kept_parameters, stays_dense
from fermisvd.compress import GroupsRule, Whitening, set_aside
from fermisvd.fermigrad import Constraint, FermiGradSettings
from fermisvd.files import INDEX_NAME, check_name, read_headers
from fermisvd.healing import HealingSettings
from fermisvd.hf import load_model
from fermisvd_convert import stages
from fermisvd_convert.card import write_card
from fermisvd_convert.checks import Count, Natural, Texts, check_options, check_out, checked
from fermisvd_convert.evaluate import evaluate_by_blocks
from fermisvd_convert.memory import Limits, check_memory, gated_bytes, limits, memory_of, model_sizes, needs
from fermisvd_convert.output import RECORD, claimed, complete, list_files, move_into_place, unfinished
from fermisvd_convert.places import OURS, real_path
from fermisvd_convert.report import calibration_name, group_rows, totals
from fermisvd_convert.rows import DEFAULT_DATASET
from fermisvd_convert.source import Source, folder_name, open_source, open_streamed, resolve_device, window_length
from fermisvd_convert.space import check_space, out_bytes, work_bytes
from fermisvd_convert.text import TextError, calibration_text, check_vocabulary
from fermisvd_convert.workspace import Workspace, settings_key
from fermisvd_convert.writer import copied_files, replace_tensors, storage_type, weight_bytes, write_checkpoint

logger = logging.getLogger("fermisvd")


@checked
def convert(
    model: str | Path,
    out: str | Path,
    remove: float,
    *,
    form: Form = "pivga",
    ranks: str | Path = "fermigrad",
    groups: GroupsRule = "auto",
    whitening: Whitening = "kfac",
    refit: bool | None = None,
    calibration: Texts = (DEFAULT_DATASET,),
    bos: bool = True,
    skip_bad_rows: bool = False,
    samples: Count = 256,
    gradient_samples: Count = 256,
    sequence_length: Count | None = None,
    batch_size: Count = 8,
    constraint: Constraint = "projection",
    temperature: Annotated[float, Field(ge=1e-6, le=1)] = 0.01,
    steps: Count = 64,
    minimum_rank: Count = 1,
    penalty_growth: Annotated[float, Field(ge=1)] = 1.03,
    plateau: Annotated[float, Field(ge=0)] = 0.0,
    count: Form | None = None,
    heal_steps: Natural = 128,
    align: Count | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    device: str = "auto",
    seed: Natural = 0,
    work: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    max_memory: Annotated[int, Field(ge=1)] | None = None,
) -> dict:
    """Compress `model` (folder or hub id) into the new folder `out`; returns the report that `out`/fermisvd.json holds.

    remove: fraction of the parameters of the decoder blocks' linear layers; bos, skip_bad_rows: as of text.windows_of;
    sequence_length: tokens a window, None for the model's context up to 2048; count: form whose parameters FermiGrad
    counts, None for `form`; heal_steps: of the closing distillation on the calibration windows; refit: None for only
    where there is none; align: step of the ranks, None for a power of two near k/64; work: where stages are kept and
    found again, None for .fermisvd/stages/<model> beside `out`; max_memory: bytes that no step may take more of.
    `out` appears whole or not at all.
    Started by torchrun, the processes share the work; `out` and `work` must be folders that they all see.
    Raises FermiSVDError for bad input, naming it.
    """
    model, ranks, out, seconds = str(model), str(ranks), real_path(out), {}
    workspace = Workspace(real_path(work or out.parent / OURS / "stages" / folder_name(model)))
    for name in (*calibration, ranks):
        check_name(Path(name))
    check_options(remove, temperature=temperature, penalty_growth=penalty_growth, plateau=plateau, steps=steps)
    check_out(out, model, workspace.folder, overwrite)
    device = resolve_device(device)
    source = open_source(model, revision, trust_remote_code)
    storage = storage_type(dtype, source)
    length = window_length(sequence_length, source.context_length())
    wanted = max(samples, gradient_samples)
    text = calibration_text(source.tokenizer(), calibration, wanted, length, bos=bos, skip_bad_rows=skip_bad_rows)
    windows, gradient_windows = text.windows[:samples], text.windows[:gradient_samples]
    if len(text.windows) < wanted:
        logger.warning("the text gives %d windows of %d tokens; more were asked for", len(text.windows), length)
    check_vocabulary(text.windows, source.vocabulary, source.folder)
    left_files = left_out_files(source)
    say_what_is_left_out(source, left_files)
    refit = heal_steps == 0 if refit is None else refit
    if (heal_steps or refit) and len(windows) < 2:
        raise TextError(
            f"one calibration window of {length} tokens leaves none to train on; give more text or --samples, or pass "
            "--heal-steps 0 --no-refit"
        )
    with _timed(seconds, "check"):
        source.check_values(None if dtype == "auto" else storage)
        key = source.key

    with distributed.processes(device) as device, claimed(out) as place, workspace.locked():
        check_out(out, model, workspace.folder, overwrite)  # with what was put back

        def load():
            return source.load(device)

        def stream():
            return source.stream(device, bounded=max_memory is not None)

        with _timed(seconds, "calibrate"):
            linear, others = stages.structure(workspace, key, groups, stream)
            source.check_linear_layers(linear)
            # what cannot end well is refused before the long work
            filed = ranks not in ("uniform", "fermigrad")
            fitted = stages.ranks_from_file(Path(ranks), linear, groups)[0] if filed else linear
            check_budget(fitted, kept_parameters(fitted, remove), form, align, minimum_rank)
            size = model_sizes(source.headers, linear, source.vocabulary, batch_size, length)
            room = memory_of(device, max_memory)
            shard = distributed.from_first(distributed.world() > 1 and gated_bytes(size) > room)
            parts = distributed.world() if shard else 1
            required = needs(size, form, ranks, groups, refit, heal_steps, remove, parts)
            if max_memory is not None or device.startswith("cuda"):
                check_memory(required, room)
            limit = limits(size, max_memory)
            statistics = stages.statistics_of(key, windows, whitening, batch_size, seed)
            decomposition = stages.Decomposition(workspace, source, statistics, device)
            needed = work_bytes(
                decomposition,
                linear,
                remove,
                storage,
                windows,
                limit,
                joins=groups == "auto",
                refits=refit,
                heals=heal_steps > 0,
            )
            check_space(
                {out: out_bytes(source, linear, remove, form, storage, dtype != "auto"), workspace.folder: needed}
            )
            stages.calibrate(workspace, statistics, linear, windows, batch_size, stream, limit, seed)
            before = workspace.json(
                f"dense-{settings_key(key, stages.windows_key(text.held_back))}",
                lambda: perplexity(workspace, stream(), text.held_back, batch_size, limit, "evaluate dense"),
            )
        if before["perplexity"] >= source.vocabulary:
            logger.warning(
                "%s: perplexity %.1f on the held-back text, no better than a guess among its %d tokens: the tokenizer, "
                "the text or the weights are not this model's",
                source.folder,
                before["perplexity"],
                source.vocabulary,
            )
        with _timed(seconds, "decompose"):
            decomposition.decompose(linear)
        # windows that decide between alternatives, neither refitted nor healed on; the report's are others again
        aside, training = set_aside(windows)
        with _timed(seconds, "ranks"):
            settings = FermiGradSettings(
                constraint=constraint,
                steps=steps,
                batch_size=batch_size,
                temperature=temperature,
                minimum_rank=minimum_rank,
                penalty_growth=penalty_growth,
                plateau=plateau,
                seed=seed,
            )
            linear, ideal, trace = stages.ideal_ranks(
                ranks,
                linear,
                groups,
                remove,
                form,
                lambda: stages.fermigrad(
                    decomposition, linear, gradient_windows, remove, form, count or form, settings, stream, shard
                ),
            )
            traced = [group.name for group in linear]
        choices: dict[str, list[dict]] = {}
        if ranks == "fermigrad" and form == "svd":
            with _timed(seconds, "jump"):
                ideal, choices["jump"] = stages.settle(
                    decomposition, linear, ideal, remove, align, minimum_rank, aside, batch_size, stream
                )
        chosen = stages.whole_ranks(linear, ideal, remove, form, align, minimum_rank)
        if groups == "auto" and ranks in ("uniform", "fermigrad"):
            with _timed(seconds, "groups"):
                linear, chosen, choices["groups"] = stages.join(
                    decomposition, linear, chosen, remove, form, align, minimum_rank, aside, batch_size, load
                )
        compressed = [(g, r) for g, r in zip(linear, chosen, strict=True) if not stays_dense(g, r, form)]
        if refit:
            with _timed(seconds, "refit"):
                factors_of, choices["refit"] = stages.refit_groups(
                    decomposition, compressed, training, aside, batch_size, load
                )
        else:
            factors_of = decomposition.truncated(dict(compressed))
        if distributed.rank():
            return distributed.from_first({})  # the first process writes
        rows = group_rows(linear, chosen, form, decomposition.sigma)
        report = {
            "model": source.title,
            "revision": source.revision,
            "model_sha256": key,
            "settings": {
                "remove": remove,
                "form": form,
                "ranks": Path(ranks).name,
                "groups": groups,
                "whitening": whitening,
                "refit": refit,
                "calibration": [calibration_name(c) for c in calibration],
                "bos": text.bos,
                "samples": len(windows),
                "gradient_samples": len(gradient_windows),
                "sequence_length": length,
                "batch_size": batch_size,
                "constraint": constraint,
                "temperature": temperature,
                "steps": steps,
                "minimum_rank": minimum_rank,
                "penalty_growth": penalty_growth,
                "plateau": plateau,
                "count": count or form,
                "heal_steps": heal_steps,
                "align": align or "auto",
                "dtype": str(storage).removeprefix("torch."),
                "seed": seed,
            },
            "calibration_text": text.record([calibration_name(c) for c in calibration]),
            "totals": totals(rows),
            "groups": rows,
            "left_dense": others,
            "left_out": {"tensors": list(source.left_out), "files": left_files},
            "versions": {name: version(name) for name in ("fermisvd", "torch", "transformers", "safetensors", "scipy")}
            | {"python": platform.python_version()},
            "trace": {"groups": traced, "steps": trace},
            "choices": choices,
        }
        with distributed.alone(), unfinished(place) as partial:

            def load_student():
                return load_model(partial, torch.float32, trust_remote_code=trust_remote_code).to(device)

            with _timed(seconds, "write"):
                provenance = {
                    name: report[name]
                    for name in ("model", "revision", "model_sha256", "settings", "totals", "versions")
                }
                write_checkpoint(
                    source,
                    partial,
                    compressed,
                    form,
                    factors_of,
                    storage,
                    dtype != "auto",
                    provenance,
                    device,
                )
            if heal_steps and compressed and len(training):
                with _timed(seconds, "heal"):
                    healing = HealingSettings(heal_steps, batch_size, seed=seed)
                    factors, report["healing"] = stages.heal_factors(
                        workspace, key, partial, storage, training, aside, healing, load, load_student
                    )
                    replace_tensors(partial, factors)
            with complete(place):
                with _timed(seconds, "evaluate"):
                    student = open_streamed(partial, device, trust_remote_code)
                    after = perplexity(workspace, student, text.held_back, batch_size, limit, "evaluate compressed")
                report["perplexity"] = {
                    "before": before["perplexity"],
                    "after": after["perplexity"],
                    "tokens": after["tokens"],
                }
                report["bytes"] = {"before": weight_bytes(source.headers), "after": weight_bytes(read_headers(partial))}
                write_card(report, partial, source.folder)
                # apart, so that the same settings give the same files, however long it took
                (partial / "timing.json").write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
                report["files"] = list_files(partial)
                (partial / RECORD).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                move_into_place(place, overwrite)
        return distributed.from_first(report | {"seconds": seconds})


def left_out_files(source: Source) -> list[str]:
    """Files of MODEL that OUT will not have, but for the model's own weights."""
    own = {info.file.name for info in source.headers.values()} | {INDEX_NAME}
    return [name for path in copied_files(source.folder)[1] if (name := path.as_posix()) not in own]


def say_what_is_left_out(source: Source, files: Sequence[str]) -> None:
    """A line each for tensors and files of MODEL that OUT will not have."""
    for kind, names in (("tensors that are no parameters of the model", source.left_out), ("files", files)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            logger.warning("%s: not copied to OUT: %d %s: %s", source.folder, len(names), kind, shown)


def perplexity(
    workspace: Workspace, model: nn.Module, windows: torch.Tensor, batch_size: int, limit: Limits, label: str
) -> dict:
    """Evaluation of a streamed model as JSON."""
    with workspace.hidden_states(limit.hidden_bytes) as hidden:
        return evaluate_by_blocks(model, windows, hidden, batch_size, label).as_dict()


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 2)
