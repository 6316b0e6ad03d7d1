"""How many tokens are accepted when a model's compressed form drafts for it, by FermiGrad's and uniform ranks?

    python -m benchmarks.speed.speculative [MODEL]

For each fraction removed the parent is compressed (kept in --work), then served with the result as its draft, greedily,
in float32 on held-back text of the demo model's kind. Greedy tokens must equal the parent's own. Prints the table of
docs/serving.md. Results: benchmarks/results/speculative-MODEL.json.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.records import command_line, new_record, vllm_versions, write_record
from tests.support import DEMO_MODEL, ROOT

FRACTIONS = (0.2, 0.4, 0.6)
RANKS = ("uniform", "fermigrad")
SPECULATIVE_TOKENS = 4
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 64, 64, 64


def generate(model: str, draft: str | None, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, float]]:
    """Greedy tokens, and vLLM's counters of drafted and accepted tokens. Runs in a process of its own."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.v1.metrics.reader import Counter

    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": SPECULATIVE_TOKENS}
    engine = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        disable_log_stats=False,
        speculative_config=speculative if draft else None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    metrics = {
        m.name: float(m.value) for m in engine.get_metrics() if "spec_decode" in m.name and isinstance(m, Counter)
    }
    return [list(o.outputs[0].token_ids) for o in outputs], metrics


def in_own_process(
    model: Path, draft: Path | None, prompts: list[list[int]]
) -> tuple[list[list[int]], dict[str, float]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(generate, str(model), draft and str(draft), prompts).result()


def drafted(model: Path, draft: Path, prompts: list[list[int]], parent: list[list[int]]) -> dict:
    """What the draft is worth, and how many answers are the parent's own."""
    tokens, metrics = in_own_process(model, draft, prompts)
    drafts, accepted = (metrics[f"vllm:spec_decode_num_{x}"] for x in ("drafts", "accepted_tokens"))
    return {
        "acceptance_length": 1 + accepted / drafts,
        "drafts": drafts,
        "answers_equal_to_the_parents": sum(a == b for a, b in zip(tokens, parent, strict=True)),
        "answers": len(parent),
    }


def main() -> None:
    from fermisvd_convert.convert import convert
    from fermisvd_convert.loading import load_tokenizer
    from fermisvd_convert.text import windows_of
    from tests.support.stdlib_text import write_texts

    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=DEMO_MODEL, type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "speculative-work")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    texts = write_texts(arguments.work)
    windows = windows_of(load_tokenizer(arguments.model), str(texts["validation"]), PROMPT_LENGTH, PROMPTS)
    prompts = [window.tolist() for window in windows]

    parent, _ = in_own_process(arguments.model, None, prompts)
    rows = []
    for ranks in RANKS:
        for remove in FRACTIONS:
            out = arguments.work / f"{arguments.model.name}-{ranks}-{remove:.0%}"
            if not out.exists():
                calibration = [str(texts["calibration"])]
                convert(
                    str(arguments.model),
                    out,
                    remove,
                    ranks=ranks,
                    groups="joint",
                    whitening="input",
                    heal_steps=0,
                    refit=False,
                    calibration=calibration,
                    sequence_length=256,
                    work=arguments.work / "stages",
                )
            rows.append({"ranks": ranks, "remove": remove} | drafted(arguments.model, out, prompts, parent))
            print(rows[-1], flush=True)
    protocol = {
        "model": arguments.model.name,
        "speculative_tokens": SPECULATIVE_TOKENS,
        "prompts": PROMPTS,
        "prompt_tokens": PROMPT_LENGTH,
        "new_tokens": NEW_TOKENS,
    }
    record: dict = new_record(command_line(), protocol) | {"rows": rows}
    record["versions"] |= vllm_versions()
    write_record(f"speculative-{arguments.model.name}", record)
    print(table(rows))


def table(rows: list[dict]) -> str:
    lines = ["| ranks | " + " | ".join(f"{f:.0%} removed" for f in FRACTIONS) + " |", "|---|" + "---|" * len(FRACTIONS)]
    for ranks in RANKS:
        lengths = [row["acceptance_length"] for row in rows if row["ranks"] == ranks]
        lines.append(f"| {ranks} | " + " | ".join(f"{length:.2f}" for length in lengths) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
