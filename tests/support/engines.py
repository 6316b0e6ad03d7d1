"""Real vLLM engines, one after the other in one process: tasks as JSON in, a result or an error each as JSON out.

Sharing the process saves the import and most of the start. Of each task: `engine` (arguments of vllm.LLM), `prompts`
(token ids), `max_tokens`, and optionally `images` (prompts more: a text, and the size of an image of noise),
`sampling`, `lora` (folder of an adapter), `reload` (folder of new weights),
`metrics`, `distributions`. Of each result: `tokens`, `logprobs` of those tokens and of the prompt's, or `error`; where
asked for, `distributions` of the next token behind each of the prompt's but the last, over the whole vocabulary.
"""

import json
import os
import sys
import traceback


def generate(engine, task: dict) -> dict:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"temperature": 0, "max_tokens": task["max_tokens"], "ignore_eos": True, "logprobs": 0}
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    prompts += [_with_image(**prompt) for prompt in task.get("images", [])]
    lora = LoRARequest("adapter", 1, task["lora"]) if "lora" in task else None
    if task.get("distributions"):
        options["prompt_logprobs"] = -1
    sampling = SamplingParams(**options | task.get("sampling", {}))
    outputs = engine.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    result = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [_of_tokens(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs],
        "prompt_logprobs": [_of_tokens(o.prompt_token_ids[1:], (o.prompt_logprobs or [])[1:]) for o in outputs],
    }
    if task.get("distributions"):
        result["distributions"] = [[_whole(step) for step in o.prompt_logprobs[1:]] for o in outputs]
    return result


def _with_image(text: str, size: list[int]) -> dict:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return {"prompt": text, "multi_modal_data": {"image": Image.fromarray(noise)}}


def _whole(step: dict) -> list[float]:
    """Log-probabilities of a step in the order of the vocabulary."""
    return [step[token].logprob for token in range(len(step))]


def _of_tokens(tokens, logprobs) -> list[float]:
    return [step[token].logprob for token, step in zip(tokens, logprobs or (), strict=False)]


def allocate_intermediate_tensors(worker) -> None:
    """What vLLM's worker does while it profiles a GPU and, as of 0.32, forgets on a CPU: later stages then die."""
    runner = worker.model_runner
    if runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def run(task: dict) -> dict:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = None
    try:
        engine = LLM(**{"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64, **task["engine"]})
        if task["engine"].get("pipeline_parallel_size", 1) > 1:
            engine.collective_rpc(allocate_intermediate_tensors)
        result = generate(engine, task)
        if "reload" in task:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": task["reload"]})
            engine.reset_prefix_cache()
            result["reloaded"] = generate(engine, task)
        if "metrics" in task:
            result["metrics"] = {m.name: getattr(m, "value", None) for m in engine.get_metrics()}
        return result
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()  # also after a refused start: what it left would break the next engine


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    tasks, out = json.loads(sys.stdin.read()), sys.argv[1]
    results = []
    for task in tasks:
        try:
            results.append(run(task))
        except Exception:
            results.append({"error": traceback.format_exc()})
        with open(out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
