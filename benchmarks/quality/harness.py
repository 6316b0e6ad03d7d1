"""How do dense and compressed checkpoints do at lm-eval's tasks, through transformers and through vLLM?

    python -m benchmarks.quality.harness MODEL OUT [OUT ...] --engine hf --engine vllm --limit 500

`import fermisvd` is all that lm-eval's own `hf` model needs to load a compressed folder; `vllm` needs none.
Tasks: those of tasks/ here; `zero_shot` is six of lm-eval's own, on local rows. Run from the repository's root, with
the shared data beside it. All is in float32. Metrics and their standard errors are added to
benchmarks/results/harness-MODEL.json, a row a folder and engine, where MODEL is --name or the first folder's. Rows that
are there are skipped; a record of another limit or another lm-eval is refused.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import lm_eval  # pyright: ignore[reportMissingImports]: the extra [eval] is not among the tools of tests
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

import fermisvd  # noqa: F401  (registers the quantizer with transformers)
from benchmarks.records import RESULTS, command_line, new_record, write_record
from fermisvd_convert.loading import resolve_device

TASKS = {
    "zero_shot": {"piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai"},
    "adjunct_island": {"adjunct_island"},
}
FOLDER = Path(__file__).parent / "tasks"
LONGEST = 2048  # tokens; no row of these tasks is near it
RESAMPLED = 100  # times, for the standard error of LAMBADA's perplexity; accuracies' are by formula


def evaluate(model: Path, engine: str, tasks: list[str], manager: TaskManager, limit: int | None) -> dict[str, dict]:
    """By task: metrics and their standard errors, `acc` and `acc_stderr`."""
    length = min(LONGEST, json.loads((model / "config.json").read_text())["max_position_embeddings"])
    options = {"pretrained": str(model), "dtype": "float32"}
    lengths = {"max_length": length} if engine == "hf" else {"max_model_len": length, "enforce_eager": True}
    found = lm_eval.simple_evaluate(
        model=engine,
        model_args=options | lengths,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        batch_size=16 if engine == "hf" else "auto",
        device=str(resolve_device("auto")),
        bootstrap_iters=RESAMPLED,
    )
    assert found is not None
    return {task: plain(found["results"][task]) for task in found["configs"]}


def plain(metrics: dict) -> dict[str, float]:
    """lm-eval's "acc,none" and "acc_stderr,none" as acc and acc_stderr; what else it tells is dropped."""
    return {key.removesuffix(",none"): value for key, value in metrics.items() if key.endswith(",none")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--engine", action="append", choices=("hf", "vllm"))
    parser.add_argument("--task", action="append", choices=TASKS, dest="tasks")
    parser.add_argument("--name", help="the record's MODEL")
    parser.add_argument("--limit", type=int, help="at most so many rows of a task, the first ones")
    arguments = parser.parse_args()
    name, wanted = f"harness-{arguments.name or arguments.models[0].name}", arguments.tasks or ["zero_shot"]
    record = new_record(command_line(), {"limit": arguments.limit, "lm_eval": lm_eval.__version__, "dtype": "float32"})
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier and earlier["protocol"] != record["protocol"]:
        raise SystemExit(f"results/{name}.json is of another limit or another lm-eval; move it away")
    rows = earlier.get("rows", {})
    manager = TaskManager(include_path=str(FOLDER))
    for engine in arguments.engine or ["hf"]:
        for model in arguments.models:
            row, start = rows.setdefault(f"{model.name}, {engine}", {}), time.perf_counter()
            missing = [task for task in wanted if not TASKS[task] <= row.keys()]
            if not missing:
                continue
            found = evaluate(model, engine, missing, manager, arguments.limit)
            row.update(found)
            write_record(name, record | {"rows": rows})
            shown = ", ".join(f"{task} {each['acc']:.3f} ± {each['acc_stderr']:.3f}" for task, each in found.items())
            print(f"{model.name}, {engine}: {shown}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
