"""One real `vllm serve`, compiled and with chunked prefill, asked in every way through the OpenAI client."""

import json
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from fermisvd.hf import load_model
from tests.support.reference import greedy
from tests.support.server import serve

pytest.importorskip("vllm")
from openai import APIStatusError, OpenAI

pytestmark = pytest.mark.vllm
LENGTH = 24


@pytest.fixture(scope="module")
def server(compressed, tmp_path_factory):
    """Prompts longer than 64 tokens take more than one step."""
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--max-num-batched-tokens", "64"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(compressed["pivga"], log, *options, "--served-model-name", "model") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def prompts(demo_text, demo_model):
    from fermisvd_convert.loading import load_tokenizer
    from fermisvd_convert.text import windows_of

    windows = windows_of(load_tokenizer(demo_model), str(demo_text["validation"]), 200, 8)
    return [window[: 200 - 24 * i].tolist() for i, window in enumerate(windows)]


@pytest.fixture(scope="module")
def expected(compressed, prompts):
    model = load_model(compressed["pivga"])
    return [greedy(model, ids, LENGTH) for ids in prompts]


def complete(client, prompt, **options):
    extra = {"ignore_eos": True} | options.pop("extra_body", {})
    return client.completions.create(
        model="model",
        prompt=prompt,
        **{"max_tokens": LENGTH, "temperature": 0} | options,
        extra_body=extra,
    )


def metric(server, name: str) -> float:
    lines = urllib.request.urlopen(f"{server.address}/metrics").read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}(_total)?\{{", line))


def test_models(client):
    assert [model.id for model in client.models.list()] == ["model"]


def test_chunked_prefill_and_logprobs(client, prompts, expected):
    """Concurrent prompts, most of them longer than a step takes; top log-probabilities as in Hugging Face's forward."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda ids: complete(client, ids, logprobs=2), prompts))
    compared = 0
    for answer, reference in zip(answers, expected, strict=True):
        logprobs = answer.choices[0].logprobs
        split = next((i for i, margin in enumerate(reference["margins"]) if margin < 1e-3), LENGTH)
        assert logprobs.token_logprobs[:split] == pytest.approx(reference["logprobs"][:split], abs=2e-3)
        compared += split
        gaps = [sorted(top.values(), reverse=True) for top in logprobs.top_logprobs[:split]]
        assert [a - b for a, b, *_ in gaps] == pytest.approx(reference["margins"][:split], abs=4e-3)
    assert compared > 0.75 * LENGTH * len(prompts)  # what near ties leave differs by processor: the model is made here


def test_prefix_caching(server, client, prompts):
    first = complete(client, prompts[1]).choices[0].text
    hits = metric(server, "vllm:prefix_cache_hits")
    assert complete(client, prompts[1]).choices[0].text == first
    assert metric(server, "vllm:prefix_cache_hits") > hits


def test_streaming(client, prompts):
    whole = complete(client, prompts[2]).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(client, prompts[2], stream=True)]
    assert len(pieces) > 2 and "".join(pieces) == whole


def test_several_choices(client, prompts):
    """No seed: a request that has one kills the engine of vLLM 0.32 on a CPU, whatever the model."""
    choices = complete(client, prompts[3], n=3, temperature=0.9).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.text for choice in choices}) == 3


def test_structured_output(client, prompts):

    def constrained(**constraint) -> str:
        extra = {"structured_outputs": constraint, "ignore_eos": False}
        return complete(client, prompts[4], max_tokens=60, extra_body=extra).choices[0].text

    assert re.fullmatch("[0-9]{4} or [a-f]{3}", constrained(regex="[0-9]{4} or [a-f]{3}"))
    assert constrained(choice=["yes", "no"]) in ("yes", "no")


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": -1}, {"prompt": [10**6]}, {"prompt": [1] * 600}, {"n": 0}, {"model": "other"}, {"prompt": None}],
    ids=lambda options: f"{next(iter(options))}",
)
def test_malformed_request(client, options):
    with pytest.raises(APIStatusError) as caught:
        client.completions.create(**{"model": "model", "prompt": [1, 2], "max_tokens": 2} | options)
    assert 400 <= caught.value.status_code < 500
    assert complete(client, [1, 2, 3], max_tokens=2).usage.completion_tokens == 2


def test_client_that_disconnects(server, client, prompts):
    """Its request is dropped, and the others go on."""
    before = metric(server, "vllm:generation_tokens")
    other = threading.Thread(target=complete, args=(client, prompts[6]))
    other.start()
    stream = complete(client, prompts[5][:4], max_tokens=250, n=16, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    other.join(60)
    assert not other.is_alive()
    deadline = time.time() + 20
    while metric(server, "vllm:num_requests_running") and time.time() < deadline:
        time.sleep(0.2)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:generation_tokens") - before < 16 * 250, "it ran to its end for nobody"


def test_draft_of_its_own_parent(demo_model, compressed, prompts, tmp_path):
    """The command of docs/serving.md: the parent's greedy answers, drafted by the compressed model."""
    draft = {"method": "draft_model", "model": str(compressed["pivga"]), "num_speculative_tokens": 4}
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", "model"]
    with serve(demo_model, tmp_path / "log", *options, "--speculative-config", json.dumps(draft)) as server:
        client = OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120)
        answers = [complete(client, ids, logprobs=0).choices[0].logprobs.token_logprobs for ids in prompts[:3]]
        assert metric(server, "vllm:spec_decode_num_accepted_tokens") > 0
    parent = load_model(demo_model)
    for logprobs, ids in zip(answers, prompts, strict=False):
        assert logprobs == pytest.approx(greedy(parent, ids, LENGTH)["logprobs"], abs=2e-3)
