"""How many tokens are accepted when a real model's compressed forms draft for it, on maths problems and in chat?

    python -m benchmarks.speed.drafts models/smollm2 models/real/default-0.2 models/real/default-0.4

vLLM serves the parent, greedily and in float32, with each folder as its draft (benchmarks.speed.speculative). Prompts
are the shared ones, through the chat template. Results: benchmarks/results/drafts-MODEL.json.
"""

import argparse
from pathlib import Path

from benchmarks.records import command_line, new_record, vllm_versions, write_record
from benchmarks.speed.prompts import KINDS, LONGEST, prompts_of
from benchmarks.speed.speculative import NEW_TOKENS, PROMPTS, SPECULATIVE_TOKENS, drafted, in_own_process
from fermisvd_convert.loading import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each kind")
    arguments = parser.parse_args()
    tokenizer, rows = load_tokenizer(arguments.model), []
    for kind in KINDS:
        prompts = prompts_of(kind, tokenizer, arguments.prompts)
        parent, _ = in_own_process(arguments.model, None, prompts)
        for draft in arguments.drafts:
            rows.append({"prompts": kind, "draft": draft.name} | drafted(arguments.model, draft, prompts, parent))
            print(rows[-1], flush=True)
    protocol = {
        "model": arguments.model.name,
        "speculative_tokens": SPECULATIVE_TOKENS,
        "prompts": arguments.prompts,
        "longest": LONGEST,
        "new_tokens": NEW_TOKENS,
    }
    record: dict = new_record(command_line(), protocol) | {"rows": rows}
    record["versions"] |= vllm_versions()
    write_record(f"drafts-{arguments.model.name}", record)


if __name__ == "__main__":
    main()
