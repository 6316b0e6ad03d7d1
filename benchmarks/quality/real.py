"""What does a real language model lose by compression, and by what a user would pick instead, at the same size?

    python -m benchmarks.quality.real                              # SmolLM2 (make smollm2), all that is missing
    python -m benchmarks.quality.real MODEL --method default --remove 0.2 --scratch FOLDER

Rows are ways of compression, depth pruning, width pruning (with and without the healing that compression has), and
rounding to 8 and 4 bits; perplexity and KL to the dense model on WikiText-2's validation split and on C4, parameters of
the decoder blocks' linear layers, and bytes of the whole model's weights. Calibrated on the beginning of WikiText-2's
training split; `healed for 1,000 steps` takes 1,024 windows of that and of Wikipedia instead, and `mixed calibration`
as many windows as others of web, encyclopedia, code and chat in equal parts. Texts are the shared ones beside the
repository. Results are kept in benchmarks/results/real-MODEL.json, cell by cell; a cell that is there is
skipped, unless --fresh is given or --keep has no model of it yet. With --keep FOLDER every model is kept there, by the
cell's name, for benchmarks.quality.harness and for `vllm serve`. With --scratch stages of conversions are kept too.
"""

import argparse
import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.cells import begin, folder_of, kept, put
from benchmarks.quality.depth_pruning import least_influential, without_blocks
from benchmarks.quality.pruning import heal_pruned, linear_parameters
from benchmarks.quality.real_setting import (
    CALIBRATION,
    MORE_SAMPLES,
    MORE_TEXT,
    TEXT,
    Setting,
    Size,
    add_arguments,
    said,
    setting_of,
)
from benchmarks.quality.rounding import round_linear
from benchmarks.quality.table import METHODS
from benchmarks.quality.width_pruning import prune_width
from benchmarks.records import new_record
from fermisvd import HealingSettings
from fermisvd.compress import set_aside
from fermisvd_convert.convert import convert
from fermisvd_convert.heal import heal_checkpoint
from fermisvd_convert.loading import load_tokenizer
from tests.support import SHARED
from tests.support.stdlib_text import write_texts

REMOVALS = (0.1, 0.2, 0.3, 0.4)
MORE_STEPS = 1000
UNHEALED = {"heal_steps": 0, "refit": False}
LARGE_SAMPLES, LARGE_STEPS = 512, HealingSettings(steps=128, step_tokens=2048)  # the default until 2026-11-27
HEALED_IN_LARGE_STEPS = "healed in large steps"
CONVERTED = {name: options for name, options in METHODS.items() if name != "pivga, uniform, joint"} | {
    "default, neither refitted nor healed": UNHEALED,
    "default, rescaled, neither refitted nor healed": UNHEALED | {"rescale": True},
    f"default, {HEALED_IN_LARGE_STEPS}": {
        "heal_samples": LARGE_SAMPLES,
        "heal_steps": LARGE_STEPS.steps,
        "heal_step_tokens": LARGE_STEPS.step_tokens,
    },
}
MIXED = "default, mixed calibration"
WEB_APART = 500_000  # characters of C4's beginning, which is evaluated on, that are no calibration
HEALED_LONGER = f"healed for {MORE_STEPS:,} steps"
ROUNDED = {"int8, rounded to nearest": 8, "int4, rounded to nearest": 4}

Made = tuple[PreTrainedModel, Size]
Maker = Callable[..., Made]  # of a setting and a folder for a checkpoint, and of the fraction to remove if there is one


def as_it_is(setting: Setting, out: Path) -> Made:
    model = setting.dense
    return model, setting.size(linear_parameters(model), setting.dense_bytes(model))


def rounded(setting: Setting, out: Path, bits: int) -> Made:
    model = setting.load()
    parameters = linear_parameters(model)
    others = setting.dense_bytes(model) - parameters * setting.stored.itemsize
    return model, setting.size(parameters, others + round_linear(model, bits))


def mixture(setting: Setting) -> list[Path]:
    """Calibration texts of four kinds. Chat goes through the model's template; code is the standard library's."""
    web = setting.scratch / "web.txt"
    web.write_text((TEXT / "c4.txt").read_text(encoding="utf-8")[WEB_APART:], encoding="utf-8")
    code = write_texts(setting.scratch)["calibration"]
    return [web, TEXT / "wikipedia.txt", code, SHARED / "chat" / "glaive_toolcall_en_demo.json"]


def converted(
    setting: Setting, out: Path, remove: float, options: dict, longer: bool = False, mixed: bool = False
) -> Made:
    """Written to `out` by `fermisvd convert`; longer: then by `fermisvd heal`; mixed: calibrated on `mixture`."""
    first, cut = setting.scratch / "unhealed" if longer else out, {"sequence_length": setting.length, "bos": False}
    made = convert(
        str(setting.folder),
        first,
        remove,
        calibration=[str(path) for path in (mixture(setting) if mixed else CALIBRATION)],
        samples=setting.samples,
        gradient_samples=setting.samples,
        work=setting.scratch / "work",
        overwrite=True,
        **cut,
        **options,
    )
    size = setting.size(made.totals.parameters_after, made.bytes.after)
    if longer:
        texts, teacher = [str(path) for path in MORE_TEXT], str(setting.folder)
        heal_checkpoint(first, out, text=texts, steps=MORE_STEPS, samples=MORE_SAMPLES, teacher=teacher, **cut)
    return setting.load(out), size


def shallower(setting: Setting, remove: float) -> LlamaForCausalLM:
    return without_blocks(setting.dense, least_influential(setting.influence, remove))


def narrower(setting: Setting, remove: float) -> LlamaForCausalLM:
    return prune_width(setting.dense, setting.importance, remove)


def narrower_with_heads(setting: Setting, remove: float) -> LlamaForCausalLM:
    """Of kv heads about the fraction that is removed of all, and at least one."""
    heads = max(1, round(remove * setting.importance.heads.shape[1]))
    return prune_width(setting.dense, setting.importance, remove, heads)


def pruned(
    setting: Setting, out: Path, remove: float, prune: Callable[[Setting, float], LlamaForCausalLM], healing: str
) -> Made:
    """healing: none, that of `convert` by default or in large steps, or that of `fermisvd heal` on more text; each with
    its windows to decide on."""
    model = prune(setting, remove)
    if healing == HEALED_LONGER:
        taught, held = setting.taught_more, -(-len(setting.taught_more) // 8)
        heal_pruned(model, taught[:-held], taught[-held:], HealingSettings(steps=MORE_STEPS), setting.stored)
    elif healing:
        large = healing == HEALED_IN_LARGE_STEPS
        aside, training = set_aside(setting.taught_to_heal[: LARGE_SAMPLES if large else None])
        heal_pruned(model, training, aside, LARGE_STEPS if large else HealingSettings(), setting.stored)
    return model, setting.size(linear_parameters(model), setting.dense_bytes(model))


PRUNED = {
    "depth pruning": shallower,
    "width pruning, MLP": narrower,
    "width pruning, MLP and heads": narrower_with_heads,
}
ONCE: dict[str, Maker] = {
    "dense": as_it_is,
    **{name: partial(rounded, bits=bits) for name, bits in ROUNDED.items()},
}
BY_REMOVAL: dict[str, Maker] = {
    **{name: partial(converted, options=options) for name, options in CONVERTED.items()},
    f"default, {HEALED_LONGER}": partial(converted, options=UNHEALED, longer=True),
    MIXED: partial(converted, options={}, mixed=True),
    **{
        f"{name}, {healing}".removesuffix(", "): partial(pruned, prune=prune, healing=healing)
        for name, prune in PRUNED.items()
        for healing in ("", "healed", HEALED_IN_LARGE_STEPS, HEALED_LONGER)
    },
}


def measure(
    setting: Setting, methods: list[str], removals: list[float], fresh: bool = False, keep: Path | None = None
) -> None:
    """Fill the record cell by cell: first those of the dense model's size, then by removal. keep: the folder for
    models."""
    wanted = {name: make for name, make in ONCE.items() if name in methods}
    for remove in removals:
        for name in methods:
            if name in BY_REMOVAL:
                wanted[f"{name} | {remove}"] = partial(BY_REMOVAL[name], remove=remove)
    begin(name_of(setting), new_results(setting), list(wanted) if fresh else [])
    for key, make in wanted.items():
        out = keep / folder_of(key) if keep else setting.scratch / "out"
        if key in (kept(name_of(setting)) or {"cells": {}})["cells"] and (keep is None or out.is_dir()):
            continue
        start = time.perf_counter()
        shutil.rmtree(out, ignore_errors=True)
        model, size = make(setting, out)
        seconds = {"seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}
        if keep and not out.is_dir():
            save(setting, model, out)
        found = setting.quality(model)
        put(name_of(setting), new_results(setting), key, size | found | seconds)
        print(f"{key}: {said(found)}, {size['removed']:.2%} removed, {size['bytes']:,} bytes", flush=True)


def save(setting: Setting, model: PreTrainedModel, folder: Path) -> None:
    """A model without compressed layers as an ordinary folder, whole or not at all: in the dense model's type where
    that holds every number, and in its own where it does not, as where weights were rounded."""
    exact = all(torch.equal(tensor, tensor.to(setting.stored).to(tensor)) for tensor in model.state_dict().values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        made = Path(scratch) / "model"
        (copy.deepcopy(model).to(setting.stored) if exact else model).save_pretrained(made)  # pyright: ignore
        load_tokenizer(setting.folder).save_pretrained(made)
        made.rename(folder)


def command(setting: Setting) -> str:
    """That fills the record; which cells of it a run filled does not matter."""
    sizes = f"--samples {setting.samples} --sequence-length {setting.length}"
    most = f" --windows {setting.windows}" if setting.windows else ""
    return f"python -m benchmarks.quality.real models/{setting.folder.name} {sizes}{most}"


def name_of(setting: Setting) -> str:
    return f"real-{setting.folder.name}"


def new_results(setting: Setting) -> dict:
    longer = [[path.name for path in MORE_TEXT], MORE_SAMPLES, MORE_STEPS]
    return new_record(command(setting), setting.protocol(longer_healing=longer, methods=CONVERTED)) | {"cells": {}}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--method", choices=[*ONCE, *BY_REMOVAL], action="append", dest="methods")
    parser.add_argument("--remove", type=float, choices=REMOVALS, action="append", dest="removals")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--keep", type=Path, help="folder for the models themselves")
    parser.add_argument("--fresh", action="store_true", help="measure anew what is there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    methods, removals = arguments.methods or [*ONCE, *BY_REMOVAL], arguments.removals or list(REMOVALS)
    with setting_of(arguments) as setting:
        measure(setting, methods, removals, arguments.fresh, arguments.keep)


if __name__ == "__main__":
    main()
