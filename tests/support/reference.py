"""What an engine should answer: greedy continuations by a Hugging Face model, and how to compare with them."""

import torch


@torch.no_grad()
def greedy(model, ids: list[int], length: int) -> dict:
    """Greedy continuation: tokens, their log-probabilities, how far each is ahead of the next best, the prompt's."""
    tokens = list(ids)
    result = {"tokens": [], "logprobs": [], "margins": []}
    for _ in range(length):
        logprobs = model(input_ids=torch.tensor([tokens])).logits.float().log_softmax(-1)[0]
        best = logprobs[-1].topk(2)
        tokens.append(best.indices[0].item())
        result["tokens"].append(tokens[-1])
        result["logprobs"].append(best.values[0].item())
        result["margins"].append((best.values[0] - best.values[1]).item())
    prompt = torch.tensor(ids[1:], dtype=torch.long)
    result["prompt_logprobs"] = logprobs[torch.arange(len(prompt)), prompt].tolist()
    return result


def assert_agrees(served: dict, expected: list[dict], tie: float = 1e-3, tolerance: float = 2e-3) -> None:
    """The same tokens and log-probabilities for every prompt.

    Where the two best tokens lie within `tie`, either is right, and what follows is not compared.
    """
    assert "error" not in served, served["error"]
    compared = 0
    for i, reference in enumerate(expected):
        ours = served["tokens"][i]
        split = next((t for t in range(len(ours)) if ours[t] != reference["tokens"][t]), len(ours))
        if split < len(ours):
            margin = reference["margins"][split]
            assert margin < tie, f"prompt {i}, token {split}: {ours} against {reference['tokens']}, margin {margin}"
        compared += split
        for name in ("logprobs", "prompt_logprobs"):
            if served[name][i]:
                pairs = zip(served[name][i], reference[name], strict=True)
                gaps = [abs(a - b) for a, b in list(pairs)[: split if name == "logprobs" else None]]
                assert max(gaps, default=0) < tolerance, f"prompt {i}: {name} differ by {max(gaps)}"
    total = sum(len(reference["tokens"]) for reference in expected)
    assert compared > 0.9 * total, f"only {compared} of {total} tokens could be compared"
