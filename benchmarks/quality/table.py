"""How good are models compressed by each of several methods, with 10 to 50 % removed, in perplexity and KL?

    python -m benchmarks.quality.table                         # run what is missing
    python -m benchmarks.quality.table --only stories260K      # one model; --method and --remove name single cells

Results are kept in benchmarks/results/quality-MODEL.json, cell by cell; a cell is skipped next time, unless protocol
or version has changed, or --fresh is given. stories260K needs the shared data beside the repository, kinds-11m is
trained by tests.support.train; what is not there is left as it stands in the JSON. `make results` writes
docs/results.md from them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.cells import kept, locked, put, same_protocol
from benchmarks.records import new_record, write_record
from fermisvd import load_model
from fermisvd.decomposition import DAMPING, OUTPUT_DAMPING
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import teach
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.text import windows_of
from tests.support import DEMO_MODEL, ROOT, SHARED
from tests.support.kinds import KINDS, write_kinds
from tests.support.stdlib_text import write_texts

PLAIN = {"whitening": "input", "heal_steps": 0, "refit": False}
METHODS = {
    "svd, uniform, separate (SVD-LLM's rule)": {**PLAIN, "form": "svd", "ranks": "uniform", "groups": "separate"},
    "pivga, uniform, joint": {**PLAIN, "form": "pivga", "ranks": "uniform", "groups": "joint"},
    "FermiGrad as in the paper": {
        **PLAIN,
        "form": "pivga",
        "groups": "separate",
        "count": "svd",
        "constraint": "penalty",
        "steps": 150,
    },
    "default without healing": {"heal_steps": 0},
    "default": {},
    "default, svd form": {"form": "svd"},
}
REMOVALS = (0.1, 0.2, 0.3, 0.4, 0.5)
# without BOS, as the published tables were measured
PROTOCOL = {"samples": 256, "gradient_samples": 256, "sequence_length": 256, "align": 1, "bos": False}
EVALUATION_WINDOWS = 96
EVALUATION_CHARACTERS = 150_000
NAMES = ("stdlib-2m", "stories260K", "kinds-11m")


def models(folder: Path) -> dict[str, dict]:
    """Name -> path, calibration texts and evaluation text; only those that are here."""
    texts = write_texts(folder)
    found = {
        "stdlib-2m": {
            "path": DEMO_MODEL,
            "calibration": [texts["calibration"]],
            "evaluation": texts["validation"],
        }
    }
    text = SHARED / "text"
    if (SHARED / "checkpoints" / "stories260K").is_dir():
        cut = folder / "tinystories.valid.txt"
        cut.write_text((text / "tinystories.valid.txt").read_text(encoding="utf-8")[:EVALUATION_CHARACTERS])
        found["stories260K"] = {
            "path": SHARED / "checkpoints" / "stories260K",
            "calibration": [text / "tinystories.train.txt"],
            "evaluation": cut,
        }
    if (ROOT / "models" / "kinds-11m").is_dir() and SHARED.is_dir():
        kinds = write_kinds(folder / "kinds")
        mixed = folder / "kinds.validation.txt"
        parts = [kinds[kind]["validation"].read_text(encoding="utf-8")[:20_000] for kind in KINDS]
        mixed.write_text("\n\n".join(parts), encoding="utf-8")
        found["kinds-11m"] = {
            "path": ROOT / "models" / "kinds-11m",
            "calibration": [kinds[kind]["calibration"] for kind in KINDS],
            "evaluation": mixed,
        }
    return found


def defaults() -> dict:
    """The converter's own, by option."""
    options = ConvertOptions.named(remove=REMOVALS[0]).by_name()
    return {name: value for name, value in options.items() if name != "remove"}


def new_results() -> dict:
    protocol = {**PROTOCOL, "evaluation_windows": EVALUATION_WINDOWS, "methods": METHODS, "defaults": defaults()}
    protocol["constants"] = {"damping": DAMPING, "damping_of": "median", "output_damping": OUTPUT_DAMPING}
    protocol = json.loads(json.dumps(protocol))
    return new_record("python -m benchmarks.quality.table", protocol) | {"cells": {}}


def begin(name: str, forget: list[str]) -> None:
    """See that the model has a record of today's protocol and versions, without the cells to `forget`."""
    with locked(f"quality-{name}"):
        results, earlier = new_results(), kept(f"quality-{name}")
        if earlier and same_protocol(earlier, results):
            results = earlier
        elif earlier:
            write_record(f"quality-{name}-until-{results['date']}", earlier)
        for key in forget:
            results["cells"].pop(key, None)
        write_record(f"quality-{name}", results)


def measure(only: str | None, methods: list[str], removals: list[float], fresh: bool) -> None:
    """Fill the JSON cell by cell."""
    wanted = [(remove, method, f"{method} | {remove}") for remove in removals for method in methods]
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models(Path(scratch)).items():
            if only not in (None, name):
                continue
            begin(name, [key for _, _, key in wanted] if fresh else [])
            windows = windows_of(
                load_tokenizer(model["path"]), str(model["evaluation"]), 256, EVALUATION_WINDOWS, bos=False
            )
            dense = load_model(model["path"])
            taught = teach(dense, windows, BATCH_SIZE)
            if "dense" not in measured()[name]:
                put(f"quality-{name}", new_results(), "dense", evaluate(dense, windows).as_dict())
            for remove, method, key in wanted:
                if key in measured()[name]:
                    continue
                folder, start = Path(scratch) / "out", time.perf_counter()
                made = convert(
                    str(model["path"]),
                    folder,
                    remove,
                    calibration=[str(path) for path in model["calibration"]],
                    work=Path(scratch) / "work" / name,
                    overwrite=True,
                    **PROTOCOL,
                    **METHODS[method],
                )
                seconds = time.perf_counter() - start
                cell = {
                    **evaluate(load_model(folder), windows, taught).as_dict(),
                    "removed": made.totals.removed,
                    "seconds": round(seconds, 1),
                    "stage_seconds": made.seconds,
                }
                print(name, key, f"{cell['perplexity']:.3f}", f"{seconds:.0f} s", flush=True)
                put(f"quality-{name}", new_results(), key, cell)


def measured() -> dict[str, dict]:
    """Cells of every model that has a record."""
    return {name: record["cells"] for name in NAMES if (record := kept(f"quality-{name}"))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--method", choices=METHODS, action="append", dest="methods")
    parser.add_argument("--remove", type=float, choices=REMOVALS, action="append", dest="removals")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    measure(arguments.only, arguments.methods or list(METHODS), arguments.removals or list(REMOVALS), arguments.fresh)
