"""Do FermiGrad's ranks need less healing than uniform ones to reach the same loss (the paper's open question)?

    python -m benchmarks.quality.healing stdlib-2m

Both starts have the same parameters, whitening and separate groups, neither refit nor healed; each is healed from the
start for so many steps (the rate's schedule belongs to the number). Results: benchmarks/results/healing-MODEL.json.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.quality.table import EVALUATION_WINDOWS, PROTOCOL, models
from benchmarks.records import new_record, write_record
from fermisvd import load_model
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import teach
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.heal import heal_checkpoint
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of

STEPS, STEP_TOKENS = (0, 32, 64, 128, 256), 2048
SAMPLES = 2048  # windows; the longest run goes through the seven eighths that are trained on a little over once


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="stdlib-2m")
    parser.add_argument("--remove", type=float, default=0.4)
    arguments = parser.parse_args()
    rows: dict[str, dict[int, dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = models(Path(scratch))[arguments.model]
        text = [str(path) for path in model["calibration"]]
        windows = windows_of(
            load_tokenizer(model["path"]), str(model["evaluation"]), 256, EVALUATION_WINDOWS, bos=False
        )
        taught = teach(load_model(model["path"]), windows, BATCH_SIZE)
        print("| ranks | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |\n|---" + "|---" * len(STEPS) + "|")
        for ranks in ("uniform", "fermigrad"):
            out, rows[ranks] = Path(scratch) / ranks, {}
            options = {**PROTOCOL, "ranks": ranks, "groups": "separate", "heal_steps": 0, "refit": False}
            convert(str(model["path"]), out, arguments.remove, calibration=text, work=Path(scratch) / "w", **options)
            for steps in STEPS:
                healed = out
                if steps:
                    healed = Path(scratch) / f"{ranks}-{steps}"
                    settings = {"samples": SAMPLES, "sequence_length": 256, "teacher": str(model["path"]), "bos": False}
                    heal_checkpoint(out, healed, text=text, steps=steps, step_tokens=STEP_TOKENS, **settings)
                rows[ranks][steps] = evaluate(load_model(healed), windows, taught).as_dict()
            cells = [f"{row['perplexity']:.3f} ({row['kl']:.4f})" for row in rows[ranks].values()]
            print(f"| {ranks} | " + " | ".join(cells) + " |", flush=True)
    protocol = {**PROTOCOL, "remove": arguments.remove, "healing_samples": SAMPLES, "windows": EVALUATION_WINDOWS}
    record = new_record(f"python -m benchmarks.quality.healing {arguments.model}", protocol)
    write_record(f"healing-{arguments.model}", record | {"rows": rows})


if __name__ == "__main__":
    main()
