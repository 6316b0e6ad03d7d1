"""What is kept and what is lost when calibration text and evaluation text do not match?

    python -m benchmarks.quality.calibration

The five-kinds model, 30 % removed, calibrated on each kind alone and on all five in equal parts; whitening and ranks
only, neither refitted nor healed. Log-perplexity over dense on held-back text of each kind. Results:
benchmarks/results/calibration.json.
"""

import math
import tempfile
from pathlib import Path

from benchmarks.quality.table import PROTOCOL
from benchmarks.records import new_record, write_record
from fermisvd import load_model
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import windows_of
from tests.support import ROOT
from tests.support.kinds import KINDS, write_kinds

REMOVE, WINDOWS = 0.3, 32
OPTIONS = {
    **PROTOCOL,
    "samples": 128,
    "gradient_samples": 128,
    "steps": 32,
    "groups": "separate",
    "refit": False,
    "heal_steps": 0,
}


def main() -> None:
    path = ROOT / "models" / "kinds-11m"
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        texts = write_kinds(Path(scratch) / "kinds")
        tokenizer, dense = load_tokenizer(path), load_model(path)
        windows = {k: windows_of(tokenizer, str(texts[k]["validation"]), 256, WINDOWS, bos=False) for k in KINDS}
        before = {kind: evaluate(dense, windows[kind]).perplexity for kind in KINDS}
        print("| calibrated on | " + " | ".join(KINDS) + " |\n|---" + "|---" * len(KINDS) + "|")
        print("| dense perplexity | " + " | ".join(f"{p:.2f}" for p in before.values()) + " |")
        for name, chosen in {**{kind: [kind] for kind in KINDS}, "all five": list(KINDS)}.items():
            convert(
                str(path),
                Path(scratch) / "out",
                REMOVE,
                calibration=[str(texts[kind]["calibration"]) for kind in chosen],
                work=Path(scratch) / "work",
                overwrite=True,
                **OPTIONS,
            )
            small = load_model(Path(scratch) / "out")
            rows[name] = {k: math.log(evaluate(small, windows[k]).perplexity / before[k]) for k in KINDS}
            print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in rows[name].values()) + " |", flush=True)
    protocol = {**OPTIONS, "remove": REMOVE, "evaluation_windows": WINDOWS}
    record = new_record("python -m benchmarks.quality.calibration", protocol)
    write_record("calibration", record | {"dense": before, "lost": rows})


if __name__ == "__main__":
    main()
