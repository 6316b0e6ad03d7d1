"""Are vLLM's greedy tokens those of Hugging Face's forward, in float32?

    python -m benchmarks.speed.parity models/smollm2 models/real/default-0.2 models/real/default-svd-form-0.2

Each model answers maths problems and role play from the shared data, as many of each, through vLLM's engine in a
process of its own. Then Hugging Face's forward of prompt and answer says for each token whether
it is the likeliest, and how far its logit is below that of the likeliest. Results: benchmarks/results/parity-NAME.json.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.records import command_line, new_record, vllm_versions, write_record
from benchmarks.speed.prompts import KINDS, LONGEST, prompts_of
from benchmarks.speed.speculative import NEW_TOKENS, PROMPTS, in_own_process
from fermisvd import load_model
from fermisvd_convert.loading import load_tokenizer


@torch.no_grad()
def gaps_of(folder: Path, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """Of each answer's tokens: the likeliest token's logit less its own, 0 where it is the likeliest."""
    model, found = load_model(folder), []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        found.append((logits.max(dim=1).values - taken).tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=PROMPTS // len(KINDS), help="of each kind")
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.models:
        tokenizer = load_tokenizer(folder)
        prompts = [ids for kind in KINDS for ids in prompts_of(kind, tokenizer, arguments.prompts)]
        answers, _ = in_own_process(folder, None, prompts)
        gaps = gaps_of(folder, prompts, answers)
        flat = [gap for answer in gaps for gap in answer]
        rows.append(
            {
                "model": folder.name,
                "answers": len(gaps),
                "answers_of_likeliest_tokens": sum(not any(answer) for answer in gaps),
                "tokens": len(flat),
                "likeliest_tokens": sum(gap == 0 for gap in flat),
                "largest_gap": max(flat),
            }
        )
        print(rows[-1], flush=True)
    protocol = {"prompts": arguments.prompts, "longest": LONGEST, "new_tokens": NEW_TOKENS}
    record: dict = new_record(command_line(), protocol) | {"rows": rows}
    record["versions"] |= vllm_versions()
    write_record(f"parity-{arguments.models[0].name}", record)


if __name__ == "__main__":
    main()
