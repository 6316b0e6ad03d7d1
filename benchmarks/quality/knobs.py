"""Is a default that was tuned on models of 0.3 to 11 million parameters wrong for a real one?

    python -m benchmarks.quality.knobs                                # SmolLM2 (make smollm2), all that is missing
    python -m benchmarks.quality.knobs --only "steps 128" --only "as it is" --remove 0.2

One change at a time from the default, with --remove (0.3) removed, neither refitted nor healed but where healing is
what changes. Model, texts and windows are those of benchmarks.quality.real. Results are kept in
benchmarks/results/knobs-MODEL.json, cell by cell; a cell that is there is skipped.
"""

import argparse
import time

import torch

from benchmarks.cells import begin, kept, put
from benchmarks.quality.real import REMOVALS, UNHEALED, converted
from benchmarks.quality.real_setting import Setting, add_arguments, said, setting_of
from benchmarks.records import new_record

KNOBS: dict[str, dict] = {
    "as it is": {},
    **{f"steps {steps}": {"steps": steps} for steps in (32, 128)},
    **{f"learning rate {rate}": {"learning_rate": rate} for rate in (0.01, 0.04)},
    **{f"temperature {t}": {"temperature": t} for t in (0.003, 0.03)},
    **{f"minimum rank {rank}": {"minimum_rank": rank} for rank in (8, 32)},
    **{f"{groups} groups": {"groups": groups} for groups in ("separate", "joint")},
    **{f"ranks in steps of {align}": {"align": align} for align in (1, 32)},
    "whitened by inputs alone": {"whitening": "input"},
    "rescaled": {"rescale": True},
}
HEALING_KNOBS: dict[str, dict] = {
    "healed": {},
    **{f"healed for {steps} steps": {"heal_steps": steps} for steps in (256, 1024)},
    "healed in 128 steps of 2,048 tokens": {"heal_steps": 128, "heal_step_tokens": 2048},
    **{f"healed at rate {rate}": {"heal_learning_rate": rate} for rate in (0.25, 1.0)},
    "healed, rescaled before": {"rescale": True},
}
ALL = {name: UNHEALED | options for name, options in KNOBS.items()} | HEALING_KNOBS


def measure(setting: Setting, removals: list[float], names: list[str]) -> None:
    """Fill the record cell by cell."""
    record = f"knobs-{setting.folder.name}"
    fresh = new_record("python -m benchmarks.quality.knobs", setting.protocol(methods=ALL)) | {"cells": {}}
    begin(record, fresh)
    for remove in removals:
        for name in names:
            key = f"{name} | {remove}"
            if key in (kept(record) or fresh)["cells"]:
                continue
            start = time.perf_counter()
            model, size = converted(setting, setting.scratch / "out", remove, ALL[name])
            seconds = {"seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}
            quality = setting.quality(model)
            put(record, fresh, key, size | quality | seconds)
            print(f"{key}: {said(quality)}, {seconds['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--only", choices=ALL, action="append")
    parser.add_argument("--remove", type=float, choices=REMOVALS, action="append", dest="removals")
    arguments = parser.parse_args()
    with setting_of(arguments) as setting:
        measure(setting, arguments.removals or [0.3], arguments.only or list(ALL))


if __name__ == "__main__":
    main()
