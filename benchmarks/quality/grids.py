"""How much is lost by factors in few bits, at how many bytes, beside a dense model in as few?

    python -m benchmarks.quality.grids                     # run what is missing, of the models that are here
    python -m benchmarks.quality.grids --only stdlib-2m --case "pivga, int8, 0.2"
    python -m benchmarks.quality.grids --only smollm2 --work FOLDER    # stages are kept there

Cases are a model in int8, fp8 or int4 as it is (rounded to nearest; with error feedback; that and healed), and factors
by the default command in each type, at fractions of the parameters removed, healed and not; and int4 and int8 mixed at
fractions of the bytes. Perplexity, KL to the dense
model, and bytes of the decoder blocks' linear layers as they are written. Texts and windows are those of
benchmarks.quality.table, of SmolLM2 those of benchmarks.quality.real on WikiText-2, with groups apart and FermiGrad in
steps of two windows; Hugging Face's forward dequantises, so activations are exact. Results:
benchmarks/results/grids-MODEL.json, case by case; a case that is there is skipped.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.cells import begin, kept, put
from benchmarks.quality.pruning import linear_parameters
from benchmarks.quality.real_setting import CALIBRATION, EVALUATION
from benchmarks.quality.rounding import round_linear
from benchmarks.quality.table import EVALUATION_WINDOWS, PROTOCOL, defaults, models
from benchmarks.records import new_record
from fermisvd import load_model
from fermisvd.files import read_headers
from fermisvd.format import read_config
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import Taught, teach
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of
from tests.support import SHARED
from tests.support.smollm2 import FOLDER

NAMES = ("stdlib-2m", "stories260K", "smollm2")
OWN = {"smollm2": {"samples": 512, "gradient_samples": 512, "groups": "separate", "step_tokens": 512}}
WINDOWS = {"smollm2": EVALUATION["wikitext2"][1]}  # of the evaluation text; of others EVALUATION_WINDOWS
SETTINGS = {**PROTOCOL, "align": None}  # ranks in steps that kernels like, as a user gets them
BITS = {"int8": 8, "int4": 4}
WIDE = {"int8": 0.6, "fp8": 0.6, "int4": 0.4}  # --bytes with which every layer stays dense, on the grid
UNHEALED = {"heal_steps": 0, "refit": False}
NEAREST, FEEDBACK = "dense, rounded to nearest", "dense, error feedback"
TYPES = ("auto", "int8", "fp8", "int4")
REMOVALS = (0.1, 0.2, 0.3, 0.4, 0.5)
MIXED, MIXED_REMOVAL = (0.25, 0.3, 0.35, 0.4, 0.45), 0.2  # --bytes; and --remove beside it

Made = tuple[PreTrainedModel, int]  # and bytes of the linear layers


class Place:
    """A model, and folders for what is made of it and for stages."""

    def __init__(self, name: str, model: dict, scratch: Path, work: Path):
        self.name, self.model, self.scratch, self.work = name, model, scratch, work
        self.dense = load_model(model["path"])

    def as_it_is(self) -> Made:
        return self.dense, 2 * linear_parameters(self.dense)

    def nearest(self, weights: str) -> Made:
        rounded = copy.deepcopy(self.dense)
        return rounded, round_linear(rounded, BITS[weights])

    def converted(self, **options) -> Made:
        out = self.scratch / "out"
        text = [str(path) for path in self.model["calibration"]]
        options = settings_of(self.name) | options
        convert(str(self.model["path"]), out, calibration=text, work=self.work, overwrite=True, **options)
        return load_model(out), layer_bytes(out)


def layer_bytes(folder: Path) -> int:
    """Of the tensors of a checkpoint's groups, biases aside, and of the weights that stayed as they were."""
    headers = read_headers(folder)
    members = set(read_config(folder).group_of())
    dense = [info for name, info in headers.items() if name.endswith("_proj.weight") and name[:-7] not in members]
    own = [info for name, info in headers.items() if name.rpartition(".")[0] in members and not name.endswith(".bias")]
    return sum(info.bytes for info in [*own, *dense])


def cases(place: Place) -> dict[str, Callable[[], Made]]:
    """Name -> what makes the model."""

    def ours(**options) -> Callable[[], Made]:
        return lambda: place.converted(**options)

    found: dict[str, Callable[[], Made]] = {"dense": place.as_it_is}
    for weights in BITS:
        found[f"{NEAREST}, {weights}"] = lambda weights=weights: place.nearest(weights)
    for weights, share in WIDE.items():
        dense = {"bytes": share, "weights": weights, "ranks": "uniform", "groups": "separate"}
        found[f"{FEEDBACK}, {weights}"] = ours(**dense, **UNHEALED)
        found[f"{FEEDBACK}, healed, {weights}"] = ours(**dense)
    for share in MIXED:
        mixed = {"bytes": share, "weights": "mixed"}
        found[f"bits and ranks, {share} of the bytes"] = ours(**mixed)
        found[f"bits and ranks, not healed, {share} of the bytes"] = ours(**mixed, **UNHEALED)
        removed = mixed | {"remove": MIXED_REMOVAL}
        found[f"bits, {MIXED_REMOVAL:.0%} removed, not healed, {share} of the bytes"] = ours(**removed, **UNHEALED)
    for remove in REMOVALS:
        for weights in TYPES:
            for form in ("pivga", "svd"):
                budget = {"remove": remove, "weights": weights, "form": form}
                found[f"{form}, {weights}, {remove}"] = ours(**budget)
                found[f"{form}, not healed, {weights}, {remove}"] = ours(**budget, **UNHEALED)
    return found


def settings_of(name: str) -> dict:
    return SETTINGS | OWN.get(name, {})


def windows_for(name: str) -> int:
    return WINDOWS.get(name, EVALUATION_WINDOWS)


def new_results(name: str) -> dict:
    own = {**settings_of(name), "evaluation_windows": windows_for(name)}
    protocol = {**own, "defaults": defaults(), "unhealed": UNHEALED}
    return new_record("python -m benchmarks.quality.grids", protocol) | {"cells": {}}


def here(scratch: Path) -> dict[str, dict]:
    """Name -> path, calibration texts and evaluation text of the models that are here."""
    found = {name: model for name, model in models(scratch).items() if name in NAMES}
    if FOLDER.is_dir() and SHARED.is_dir():
        found["smollm2"] = {"path": FOLDER, "calibration": CALIBRATION, "evaluation": EVALUATION["wikitext2"][0]}
    return found


def measure(only: str | None, wanted: list[str], work: Path | None) -> None:
    """Fill the records case by case."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in here(Path(scratch)).items():
            if only not in (None, name):
                continue
            (folder := Path(scratch) / name).mkdir()
            place, record = Place(name, model, folder, work or folder / "work"), f"grids-{name}"
            begin(record, new_results(name))
            text, tokenizer = str(model["evaluation"]), load_tokenizer(model["path"])
            taught: Taught = teach(
                place.dense, windows_of(tokenizer, text, 256, windows_for(name), bos=False), BATCH_SIZE
            )
            for case, make in cases(place).items():
                if (wanted and case not in wanted) or case in (kept(record) or {"cells": {}})["cells"]:
                    continue
                start = time.perf_counter()
                made, size = make()
                found = evaluate(made, taught.windows, taught).as_dict()
                seconds = round(time.perf_counter() - start, 1)
                put(record, new_results(name), case, {"bytes": size, **found, "seconds": seconds})
                print(name, case, f"{size:,} bytes", found, f"{seconds} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--case", action="append", dest="cases", default=[])
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if arguments.work and not arguments.only:
        parser.error("--work: of one model; name it by --only")
    measure(arguments.only, arguments.cases, arguments.work)
