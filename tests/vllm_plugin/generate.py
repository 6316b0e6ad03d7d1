"""Greedy tokens of a real vLLM engine, in a process of its own: settings as JSON in, tokens as JSON out."""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    task = json.loads(sys.stdin.read())
    engine = LLM(**task["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    parameters = SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    with open(task["out"], "w") as file:
        json.dump([list(o.outputs[0].token_ids) for o in outputs], file)


if __name__ == "__main__":
    main()
