"""make demo: the main job on the demo model, as a new user would run it, with every step checked.

    python -m tests.support.demo [OUT] [--real]    --real: on SmolLM2, with settings for half an hour on two cores

Converts at 20 % removed to both forms, evaluates dense and compressed on held-back text, serves the pivga checkpoint
with `vllm serve` and asks it over the OpenAI API. Ends with one table; exit code 0 only if every check holds.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support import DEMO_MODEL
from tests.support.server import serve
from tests.support.smollm2 import smollm2
from tests.support.stdlib_text import write_texts

BIN = Path(sys.executable).parent
PROMPT = "def main():\n    parser = argparse.ArgumentParser("
REMOVE = "0.2"
LENGTH = ("--sequence-length", "256")


@dataclass(frozen=True)
class Story:
    """What the demo is told of. model: gives the dense folder; options: of `convert`; windows: of evaluation; served:
    options of `vllm serve`; gap: how far a served token's logit may be below the best of a forward in float32."""

    name: str
    model: Callable[[], Path]
    options: tuple[str, ...]
    windows: int
    served: tuple[str, ...]
    gap: float


# The server computes in bfloat16, whose steps are 0.06 to 0.125 at logits of 8 to 32
DEMO = Story("demo model", lambda: DEMO_MODEL, (), 96, (), gap=0.25)
# In float32, which every processor is fast at. A quarter of the windows, fewer steps, groups as they come, and neither
# distillation nor refit: what is left out takes longer than all the rest
REAL = Story(
    "SmolLM2",
    smollm2,
    (
        *("--samples", "64", "--gradient-samples", "64", "--steps", "24"),
        *("--groups", "separate", "--heal-steps", "0", "--no-refit"),
    ),
    32,
    ("--dtype", "float32", "--max-model-len", "2048"),
    gap=0.01,
)


def run(*arguments: object) -> str:
    print("$ fermisvd", *arguments, flush=True)
    command = [str(BIN / "fermisvd"), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def ask(address: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def logit_gaps(folder: Path, prompt: list[int], continuation: list[int]) -> list[float]:
    """How far each served token's logit is below the best one in Hugging Face's forward, 0 where it is the best."""
    import torch

    from fermisvd import load_model

    with torch.no_grad():
        logits = load_model(folder)(input_ids=torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    return (logits.max(-1).values - logits[torch.arange(len(continuation)), torch.tensor(continuation)]).tolist()


def check(holds: bool, what: str) -> None:
    print("ok  " if holds else "FAIL", what, flush=True)
    if not holds:
        raise SystemExit(1)


def tell(story: Story, out: Path) -> None:
    """The whole of it, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model, texts = story.model(), write_texts(out)
    rows: dict[str, dict] = {}
    evaluation = ["--text", texts["validation"], *LENGTH, "--windows", story.windows, "--json"]
    rows["dense"] = json.loads(run("evaluate", model, *evaluation))
    for form in ("svd", "pivga"):
        options = ["--remove", REMOVE, "--form", form, "--calibration", texts["calibration"], *LENGTH, *story.options]
        print(run("convert", model, out / form, *options, "--work", out / "work", "--overwrite"))
        rows[form] = json.loads(run("evaluate", out / form, "--reference", model, *evaluation))
    report = {form: json.loads((out / form / "fermisvd.json").read_text()) for form in ("svd", "pivga")}
    for form in report:
        check(report[form]["totals"]["removed"] >= float(REMOVE), f"{form}: at least {REMOVE} removed")
    check(rows["pivga"]["perplexity"] < rows["svd"]["perplexity"], "pivga beats svd at equal parameters")
    check(rows["pivga"]["perplexity"] < 1.5 * rows["dense"]["perplexity"], "pivga stays near dense")

    print("$ vllm serve", out / "pivga", flush=True)
    with serve(out / "pivga", out / "server.log", *story.served, limit=900) as server:
        address = server.address
        models = ask(address, "/v1/models")
        check(models["data"][0]["id"] == str(out / "pivga"), "/v1/models lists the checkpoint")
        body = {"model": str(out / "pivga"), "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        answer = ask(address, "/v1/completions", {**body, "return_token_ids": True})["choices"][0]
        gaps = logit_gaps(out / "pivga", answer["prompt_token_ids"], answer["token_ids"])
        print(f"greedy continuation: {answer['text']!r}")
        best = sum(gap == 0 for gap in gaps)
        print(f"{best} of {len(gaps)} tokens are Hugging Face's best, largest gap {max(gaps):.4f}")
        check(
            len(gaps) == 24 and max(gaps) < story.gap,
            f"greedy continuation equals Hugging Face's, up to ties within {story.gap}",
        )
        batch = {**body, "max_tokens": 64, "ignore_eos": True}
        begin = time.perf_counter()
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: ask(address, "/v1/completions", batch), range(32)))
        seconds = time.perf_counter() - begin
        tokens = sum(a["usage"]["completion_tokens"] for a in answers)
        check(tokens == 32 * 64, "32 concurrent completions answered in full")
        rows["pivga"]["tokens_per_second"] = tokens / seconds

    print_table(story.name, rows, report)


def print_table(name: str, rows: dict[str, dict], report: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}, {REMOVE} of the linear parameters removed")
    for column in ("", "linear parameters", "MB on disk", "perplexity", "KL to dense", "tokens/s served"):
        table.add_column(column, justify="right")
    for form, row in rows.items():
        some = report.get(form, report["svd"])
        which = "before" if form == "dense" else "after"
        table.add_row(
            form,
            f"{some['totals'][f'parameters_{which}']:,}",
            f"{some['bytes'][which] / 1e6:.2f}",
            f"{row['perplexity']:.3f}",
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=Path("demo-out"))
    parser.add_argument("--real", action="store_true", help="on SmolLM2")
    arguments = parser.parse_args()
    tell(REAL if arguments.real else DEMO, arguments.out.resolve())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    main()
