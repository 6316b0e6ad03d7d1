"""What is each open point of FermiGrad and its calibration worth, changed by itself?

    python -m benchmarks.quality.ablations temperature            # one table; no name: all of them
    python -m benchmarks.quality.ablations groups --model stdlib-2m --remove 0.4

Perplexity at --remove (0.3) of the linear parameters removed, the protocol of table.py here; everything but the
named option is the converter's default, without refit and healing, so that the ranks' own worth shows. Results go to
benchmarks/results/ablations-MODEL.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.quality.table import EVALUATION_WINDOWS, PROTOCOL, defaults, models
from benchmarks.records import RESULTS, new_record, write_record
from fermisvd import load_model
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

SEPARATE = {"groups": "separate", "refit": False, "rescale": False, "heal_steps": 0}
ABLATIONS: dict[str, dict[str, dict]] = {
    "temperature": {f"T = {t}": {"temperature": t} for t in (0.001, 0.003, 0.01, 0.03, 0.1)},
    "constraint": {"projection": {}}
    | {
        f"penalty, growth {growth}": {"constraint": "penalty", "penalty_growth": growth}
        for growth in (1.001, 1.01, 1.03, 1.1)
    },
    "minimum_rank": {f"r_min = {r}": {"minimum_rank": r} for r in (1, 4, 8, 16, 32)},
    "gradient_samples": {f"{n} windows": {"gradient_samples": n} for n in (16, 64, 256, 1024)},
    "samples": {f"{n} windows": {"samples": n} for n in (16, 64, 256, 1024)},
    "steps": {f"{n} steps": {"steps": n} for n in (32, 64, 128, 256)},
    "groups": {name: {"groups": name} for name in ("separate", "joint", "auto")},
    "count": {f"counted in {count}": {"count": count} for count in ("pivga", "svd")},
    "count, svd form": {f"counted in {count}": {"form": "svd", "count": count} for count in ("svd", "pivga")},
    "whitening": {name: {"whitening": name} for name in ("input", "kfac")},
    "refit": {"without": {}, "with": {"refit": True}, "and rescaled": {"refit": True, "rescale": True}},
    "healing": {
        "without": {},
        "128 steps": {"heal_steps": 128, "heal_step_tokens": 2048},
        "refit, 128 steps": {"refit": True, "heal_steps": 128, "heal_step_tokens": 2048},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(ABLATIONS))
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--remove", type=float, default=0.3)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - ABLATIONS.keys():
        parser.error(f"no ablation {min(unknown)}; there are {', '.join(ABLATIONS)}")
    protocol = {**PROTOCOL, **SEPARATE, "evaluation_windows": EVALUATION_WINDOWS, "defaults": defaults()}
    record = new_record("python -m benchmarks.quality.ablations", json.loads(json.dumps(protocol)))
    out = RESULTS / f"ablations-{arguments.model}.json"
    earlier = json.loads(out.read_text()) if out.exists() else {}
    tables = earlier["tables"] if earlier.get("protocol") == record["protocol"] else {}
    with tempfile.TemporaryDirectory() as scratch:
        found = models(Path(scratch))
        if arguments.model not in found:
            parser.error(f"no model {arguments.model} here; there are {', '.join(found)}")
        model = found[arguments.model]
        windows = windows_of(
            load_tokenizer(model["path"]), str(model["evaluation"]), 256, EVALUATION_WINDOWS, bos=False
        )
        for name in arguments.names:
            print(f"\n| {name}, {arguments.model}, {arguments.remove:.0%} | perplexity | seconds |\n|---|---|---|")
            for label, options in ABLATIONS[name].items():
                made = convert(
                    str(model["path"]),
                    Path(scratch) / "out",
                    arguments.remove,
                    calibration=[str(path) for path in model["calibration"]],
                    work=Path(scratch) / "work",
                    overwrite=True,
                    **{**PROTOCOL, **SEPARATE, **options},
                )
                perplexity = evaluate(load_model(Path(scratch) / "out"), windows).perplexity
                seconds = made.seconds["ranks"]
                print(f"| {label} | {perplexity:.3f} | {seconds:.0f} |", flush=True)
                tables.setdefault(f"{name} | {arguments.remove}", {})[label] = {
                    "perplexity": perplexity,
                    "ranks_seconds": seconds,
                    "removed": made.totals.removed,
                }
                write_record(f"ablations-{arguments.model}", record | {"tables": tables})


if __name__ == "__main__":
    main()
