"""How do dense and compressed checkpoints do at lm-eval's tasks, through transformers and through vLLM?

    python -m benchmarks.quality.harness MODEL OUT [OUT ...] --engine hf --engine vllm

`import fermisvd` is all that lm-eval's own `hf` model needs to load a compressed folder; `vllm` needs none.
Tasks: the YAML files of tasks/ here, local. Run from the repository's root, with the shared data beside it. Results are
added to benchmarks/results/harness.json.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import lm_eval  # pyright: ignore[reportMissingImports]: the extra [eval] is not among the tools of tests
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

import fermisvd  # noqa: F401  (registers the quantizer with transformers)
from benchmarks.records import RESULTS, command_line, new_record, write_record

TASKS = ("adjunct_island", "arc_easy_local")
FOLDER = Path(__file__).parent / "tasks"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--engine", action="append", choices=("hf", "vllm"))
    parser.add_argument("--limit", type=int, default=1000)
    arguments = parser.parse_args()
    tasks = TaskManager(include_path=str(FOLDER), include_defaults=False)
    record = new_record(command_line(), {"limit": arguments.limit, "lm_eval": lm_eval.__version__})
    path = RESULTS / "harness.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    rows = earlier["rows"] if earlier.get("protocol") == record["protocol"] else {}
    print("| model, engine | " + " | ".join(TASKS) + " |\n|---" + "|---" * len(TASKS) + "|")
    for engine in arguments.engine or ["hf"]:
        for model in arguments.models:
            length = json.loads((model / "config.json").read_text())["max_position_embeddings"]
            options = {"pretrained": str(model), "dtype": "float32"}
            if engine == "vllm":
                options |= {"max_model_len": length, "enforce_eager": True}
            else:
                options |= {"max_length": length}
            found = lm_eval.simple_evaluate(
                model=engine,
                model_args=options,
                tasks=list(TASKS),
                task_manager=tasks,
                limit=arguments.limit,
                batch_size=16 if engine == "hf" else "auto",
                device="cpu",
                bootstrap_iters=0,
            )
            assert found is not None
            rows[f"{model.name}, {engine}"] = {task: found["results"][task]["acc,none"] for task in TASKS}
            values = rows[f"{model.name}, {engine}"].values()
            print(f"| {model.name}, {engine} | " + " | ".join(f"{value:.3f}" for value in values) + " |", flush=True)
            write_record("harness", record | {"rows": rows})


if __name__ == "__main__":
    main()
