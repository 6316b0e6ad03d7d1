"""What does a real language model lose by compression, and by what a user would pick instead, at the same size?

    python -m benchmarks.quality.real                              # SmolLM2 (make smollm2), all that is missing
    python -m benchmarks.quality.real MODEL --method default --remove 0.2 --samples 128 --scratch FOLDER

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
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.cells import folder_of, kept, locked, put, same_protocol
from benchmarks.quality.depth_pruning import block_influence, least_influential, without_blocks
from benchmarks.quality.pruning import heal_pruned, linear_parameters
from benchmarks.quality.rounding import round_linear
from benchmarks.quality.table import METHODS, defaults
from benchmarks.quality.width_pruning import Importance, importance, prune_width
from benchmarks.records import new_record, write_record
from fermisvd import HealingSettings, load_model
from fermisvd.compress import set_aside
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import Taught, teach
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.heal import heal_checkpoint
from fermisvd_convert.loading import load_tokenizer, resolve_device
from fermisvd_convert.text import calibration_text, windows_of
from tests.support import SHARED
from tests.support.smollm2 import FOLDER
from tests.support.stdlib_text import write_texts

REMOVALS = (0.1, 0.2, 0.3, 0.4)
TEXT = SHARED / "text"
CALIBRATION = (TEXT / "wikitext2.train.txt",)
MORE_TEXT, MORE_SAMPLES, MORE_STEPS = (*CALIBRATION, TEXT / "wikipedia.txt"), 1024, 1000
EVALUATION = {"wikitext2": (TEXT / "wikitext2.valid.txt", 128), "c4": (TEXT / "c4.txt", 64)}  # windows of each
UNHEALED = {"heal_steps": 0, "refit": False}  # refit asks for 404 losses of SmolLM2
CONVERTED = {name: options for name, options in METHODS.items() if name != "pivga, uniform, joint"} | {
    "default, neither refitted nor healed": UNHEALED,
    "default, rescaled, neither refitted nor healed": UNHEALED | {"rescale": True},
}
MIXED = "default, mixed calibration"
WEB_APART = 500_000  # characters of C4's beginning, which is evaluated on, that are no calibration
HEALED_LONGER = f"healed for {MORE_STEPS:,} steps"
ROUNDED = {"int8, rounded to nearest": 8, "int4, rounded to nearest": 4}

Size = dict[str, float]  # parameters of the decoder blocks' linear layers, the fraction removed, bytes of all weights
Made = tuple[PreTrainedModel, Size]
Maker = Callable[..., Made]  # of a setting and a folder for a checkpoint, and of the fraction to remove if there is one


@dataclass(frozen=True)
class Setting:
    """The dense model, and what is measured of it once. samples, length: calibration windows and their tokens; windows:
    most of an evaluation text."""

    folder: Path
    scratch: Path
    samples: int
    length: int
    windows: int | None

    @property
    def protocol(self) -> dict:
        """JSON-able."""
        return json.loads(
            json.dumps(
                {
                    "model": self.folder.name,
                    "samples": self.samples,
                    "sequence_length": self.length,
                    "bos": False,
                    "calibration": [path.name for path in CALIBRATION],
                    "evaluation": {name: (path.name, self.count(n)) for name, (path, n) in EVALUATION.items()},
                    "longer_healing": [[path.name for path in MORE_TEXT], MORE_SAMPLES, MORE_STEPS],
                    "methods": CONVERTED,
                    "defaults": defaults(),
                }
            )
        )

    def count(self, windows: int) -> int:
        return min(windows, self.windows or windows)

    def load(self, folder: Path | None = None) -> LlamaForCausalLM:
        """A model of a folder, the dense one by default, in float32 on the machine's device."""
        model = load_model(folder or self.folder).to(resolve_device("auto"))  # pyright: ignore[reportArgumentType]
        assert isinstance(model, LlamaForCausalLM)
        return model

    @cached_property
    def dense(self) -> LlamaForCausalLM:
        return self.load()

    @cached_property
    def stored(self) -> torch.dtype:
        """The type that the model's weights are kept in."""
        dtype = AutoConfig.from_pretrained(self.folder).dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def evaluation(self) -> dict[str, Taught]:
        """By text: windows, and what the dense model makes of them."""
        tokenizer, found = load_tokenizer(self.folder), {}
        for name, (path, windows) in EVALUATION.items():
            ids = windows_of(tokenizer, str(path), self.length, self.count(windows), bos=False)
            found[name] = teach(self.dense, ids, BATCH_SIZE)
        return found

    @cached_property
    def taught(self) -> Taught:
        """Of the calibration windows, which are those of `convert`."""
        return self._taught(CALIBRATION, self.samples)

    @cached_property
    def taught_more(self) -> Taught:
        """Of the windows of the longer healing, which are those of `heal_checkpoint`."""
        return self._taught(MORE_TEXT, MORE_SAMPLES)

    def _taught(self, texts: tuple[Path, ...], samples: int) -> Taught:
        names = [str(path) for path in texts]
        text = calibration_text(load_tokenizer(self.folder), names, samples, self.length, bos=False)
        return teach(self.dense, text.windows, BATCH_SIZE)

    @cached_property
    def influence(self) -> torch.Tensor:
        return block_influence(self.dense, self.taught.windows)

    @cached_property
    def importance(self) -> Importance:
        return importance(self.dense, self.taught.windows)

    def size(self, parameters: int, all_bytes: int) -> Size:
        return {
            "parameters": parameters,
            "removed": 1 - parameters / linear_parameters(self.dense),
            "bytes": all_bytes,
        }

    def dense_bytes(self, model: PreTrainedModel) -> int:
        """Of a model without compressed layers, as it is stored; tied weights once."""
        return sum(parameter.numel() for parameter in model.parameters()) * self.stored.itemsize


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
    """healing: none, that of `convert`, or that of `fermisvd heal` on more text; each with its windows to decide on."""
    model = prune(setting, remove)
    if healing == "healed":
        aside, training = set_aside(setting.taught)
        heal_pruned(model, training, aside, HealingSettings().steps, setting.stored)
    elif healing:
        taught, held = setting.taught_more, -(-len(setting.taught_more) // 8)
        heal_pruned(model, taught[:-held], taught[-held:], MORE_STEPS, setting.stored)
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
        for healing in ("", "healed", HEALED_LONGER)
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
    begin(setting, list(wanted) if fresh else [])
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
        found = {name: evaluate(model, t.windows, t).as_dict() for name, t in setting.evaluation.items()}
        put(name_of(setting), new_results(setting), key, size | found | seconds)
        shown = ", ".join(f"{name} {row['perplexity']:.3f} (KL {row['kl']:.4f})" for name, row in found.items())
        print(f"{key}: {shown}, {size['removed']:.2%} removed, {size['bytes']:,} bytes", flush=True)


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
    return new_record(command(setting), setting.protocol) | {"cells": {}}


def begin(setting: Setting, forget: list[str]) -> None:
    """See that there is a record of this protocol, without the cells to `forget`. Raises SystemExit for a record of
    another protocol or other versions."""
    with locked(name_of(setting)):
        fresh = new_results(setting)
        record = kept(name_of(setting)) or fresh
        if not same_protocol(record, fresh):
            raise SystemExit(f"results/{name_of(setting)}.json is of another protocol or other versions; move it away")
        for key in forget:
            record["cells"].pop(key, None)
        write_record(name_of(setting), record)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--method", choices=[*ONCE, *BY_REMOVAL], action="append", dest="methods")
    parser.add_argument("--remove", type=float, choices=REMOVALS, action="append", dest="removals")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of every window")
    parser.add_argument("--windows", type=int, help="at most so many of an evaluation text")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--scratch", type=Path, help="folder to keep")
    parser.add_argument("--keep", type=Path, help="folder for the models themselves")
    parser.add_argument("--fresh", action="store_true", help="measure anew what is there")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        parser.error(f"{arguments.model}: not there; `make smollm2` makes SmolLM2")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    methods, removals = arguments.methods or [*ONCE, *BY_REMOVAL], arguments.removals or list(REMOVALS)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        folder = arguments.model.resolve()
        setting = Setting(folder, scratch, arguments.samples, arguments.sequence_length, arguments.windows)
        measure(setting, methods, removals, arguments.fresh, arguments.keep)


if __name__ == "__main__":
    main()
