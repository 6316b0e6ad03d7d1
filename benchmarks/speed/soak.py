"""Does a real server of a compressed model stand load and faults as one of the dense model does?

    python -m benchmarks.speed.soak [--requests 10000]

1. 200 concurrent clients, mixed prompt lengths, some cancelled mid-stream: every answer against the same request alone.
2. Memory of all server processes over --requests short requests.
3. Malformed requests, and clients that disconnect while an answer streams.
4. SIGTERM with requests in flight, for the compressed and the dense model, with and without vLLM's --shutdown-timeout.

The demo model in pivga form with 20 % removed, float32. Exit code 0 only if nothing is wrong.
Results: benchmarks/results/soak.json.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.records import command_line, new_record, vllm_versions, write_record
from tests.support import DEMO_MODEL, ROOT
from tests.support.server import Server, serve
from tests.support.stdlib_text import write_texts

CLIENTS, LENGTHS, NEW_TOKENS = 200, (4, 16, 60, 150, 400), 32
OPTIONS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64", "--served-model-name", "model")
# Batches of other sizes take other GEMM kernels, which add in another order: log-probabilities move in float32, too.
TOLERANCE = 1e-3
PATIENCE = 30  # seconds


def body(prompt: list[int], **more) -> dict:
    return {"model": "model", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True} | more


async def complete(session: aiohttp.ClientSession, request: dict) -> dict:
    async with session.post("/v1/completions", json=request) as response:
        response.raise_for_status()
        return (await response.json())["choices"][0]


async def cancel_while_streaming(
    session: aiohttp.ClientSession, request: dict, chunks: int = 3, tokens: int = 110
) -> None:
    """Reads a few chunks of a stream, then drops the connection."""
    async with session.post("/v1/completions", json=request | {"stream": True, "max_tokens": tokens}) as response:
        async for _ in response.content:
            chunks -= 1
            if not chunks:
                response.close()
                return


def answer_of(choice: dict) -> tuple[list[str], list[float]]:
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]


def compare(alone: tuple, together: tuple) -> tuple[bool, float]:
    """Are the tokens equal, and how far are the log-probabilities apart up to the first other token (included)."""
    (tokens, logprobs), (others, other_logprobs) = alone, together
    split = next((i for i in range(len(tokens)) if tokens[i] != others[i]), len(tokens) - 1)
    return tokens == others, max(
        abs(a - b) for a, b in zip(logprobs[: split + 1], other_logprobs[: split + 1], strict=True)
    )


async def concurrent_clients(session: aiohttp.ClientSession, prompts: list[list[int]]) -> dict:
    requests = [body(prompt, logprobs=0) for prompt in prompts]
    alone = [answer_of(await complete(session, request)) for request in requests]
    generator, cancelled, gaps, different = random.Random(0), 0, [], 0

    async def client(number: int) -> None:
        nonlocal cancelled, different
        for i in generator.sample(range(len(prompts)), 5):
            if generator.random() < 0.2:
                await cancel_while_streaming(session, requests[i])
                cancelled += 1
                continue
            same, gap = compare(alone[i], answer_of(await complete(session, requests[i])))
            gaps.append(gap)
            different += not same

    begin = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return {
        "clients": CLIENTS,
        "prompt_tokens": LENGTHS,
        "answers": len(gaps),
        "cancelled_mid_stream": cancelled,
        "answers_with_other_tokens": different,
        "largest_logprob_gap": max(gaps),
        "tolerance": TOLERANCE,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def resident_megabytes(server: Server) -> float:
    parent = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) / 1e6


async def many_requests(session: aiohttp.ClientSession, server: Server, prompts: list[list[int]], total: int) -> dict:
    """Short requests, 64 at a time; memory after each tenth."""
    generator, samples, begin = random.Random(0), [], time.perf_counter()
    for _ in range(10):
        gate = asyncio.Semaphore(64)

        async def one() -> None:
            async with gate:  # noqa: B023
                prompt = generator.choice(prompts)
                await complete(session, body(prompt[: generator.randint(2, 16)], max_tokens=generator.randint(1, 8)))

        await asyncio.gather(*(one() for _ in range(total // 10)))
        samples.append(round(resident_megabytes(server), 1))
    seconds = time.perf_counter() - begin
    return {"requests": total, "seconds": round(seconds, 1), "resident_megabytes_after_each_tenth": samples}


MALFORMED = {
    "no JSON": b"{",
    "no prompt": {"model": "model", "max_tokens": 1},
    "unknown model": {"model": "other", "prompt": [1], "max_tokens": 1},
    "negative length": {"model": "model", "prompt": [1], "max_tokens": -1},
    "token outside the vocabulary": {"model": "model", "prompt": [10**6], "max_tokens": 1},
    "prompt too long": {"model": "model", "prompt": [1] * 600, "max_tokens": 1},
    "temperature of words": {"model": "model", "prompt": [1], "temperature": "hot"},
    "n of zero": {"model": "model", "prompt": [1], "n": 0},
    "unreadable schema": {"model": "model", "prompt": [1], "structured_outputs": {"json": "{"}},
}


async def malformed_requests(session: aiohttp.ClientSession) -> dict:
    statuses = {}
    for name, request in MALFORMED.items():
        data = request if isinstance(request, bytes) else json.dumps(request).encode()
        async with session.post("/v1/completions", data=data, headers={"Content-Type": "application/json"}) as response:
            statuses[name] = response.status
    return statuses


async def metric(session: aiohttp.ClientSession, name: str) -> float:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


async def running_requests(session: aiohttp.ClientSession) -> float:
    return await metric(session, "vllm:num_requests_running") + await metric(session, "vllm:num_requests_waiting")


async def disconnects(session: aiohttp.ClientSession, prompts: list[list[int]]) -> dict:
    before = await metric(session, "vllm:generation_tokens_total")
    await asyncio.gather(*(cancel_while_streaming(session, body(prompt[:16]), tokens=480) for prompt in prompts[:50]))
    for _ in range(30):
        if not await running_requests(session):
            break
        await asyncio.sleep(1)
    return {
        "clients": 50,
        "tokens_asked_for": 50 * 480,
        "tokens_generated": await metric(session, "vllm:generation_tokens_total") - before,
        "requests_left_running": await running_requests(session),
    }


async def terminate_under_load(session: aiohttp.ClientSession, server: Server, prompts: list[list[int]]) -> dict:
    """How requests in flight end when the server is told to: counts by outcome, and the server's exit."""

    async def one(prompt: list[int]) -> str:
        try:
            choice = await asyncio.wait_for(complete(session, body(prompt[:16], max_tokens=480, logprobs=0)), PATIENCE)
            return f"answered ({len(choice['logprobs']['tokens'])} tokens)"
        except TimeoutError:
            return f"no answer, client gives up after {PATIENCE} s"
        except aiohttp.ClientResponseError as error:
            return f"status {error.status}"
        except (aiohttp.ClientError, ConnectionError) as error:
            return type(error).__name__

    tasks = [asyncio.create_task(one(prompt)) for prompt in prompts[:50]]
    for _ in range(100):  # a request that has not reached the engine is not in flight
        if await running_requests(session) >= len(tasks):
            break
        await asyncio.sleep(0.05)
    begin = time.perf_counter()
    os.kill(server.process.pid, signal.SIGTERM)
    outcomes = Counter(await asyncio.gather(*tasks))
    try:
        code = await asyncio.to_thread(server.process.wait, PATIENCE)
    except subprocess.TimeoutExpired:
        code = None
    return {
        "in_flight": 50,
        "outcomes": dict(outcomes),
        "exit_code": code,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def client_session(server: Server) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        server.address, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    )


async def soak(server: Server, prompts: list[list[int]], requests: int) -> dict:
    async with client_session(server) as session:
        record: dict[str, Any] = {"concurrent_clients": await concurrent_clients(session, prompts)}
        print(record, flush=True)
        record["memory"] = await many_requests(session, server, prompts, requests)
        record["malformed"] = await malformed_requests(session)
        record["disconnects"] = await disconnects(session, prompts)
        after = answer_of(await complete(session, body(prompts[0], logprobs=0)))
        record["answers_afterwards"] = len(after[0]) == NEW_TOKENS
    return record


async def terminate_only(server: Server, prompts: list[list[int]]) -> dict:
    async with client_session(server) as session:
        await complete(session, body(prompts[0]))
        return await terminate_under_load(session, server, prompts)


def faults_of(record: dict) -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    load, memory = record["concurrent_clients"], record["memory"]["resident_megabytes_after_each_tenth"]
    return [
        what
        for what, wrong in {
            "log-probabilities under load are not those of single requests": load["largest_logprob_gap"] > TOLERANCE,
            "memory grew by more than 0.5 % over the second half": memory[-1] > 1.005 * memory[4],
            "a malformed request was not answered with 4xx": any(s // 100 != 4 for s in record["malformed"].values()),
            "requests of clients that left still run": record["disconnects"]["requests_left_running"] != 0,
            "requests of clients that left ran to their end": (
                record["disconnects"]["tokens_generated"] >= record["disconnects"]["tokens_asked_for"]
            ),
            "no answer afterwards": not record["answers_afterwards"],
            "SIGTERM with --shutdown-timeout does not answer the requests in flight": any(
                list(run["outcomes"]) != ["answered (480 tokens)"] for run in record["sigterm"] if run["options"]
            ),
            # without the option vLLM's own outcome varies from run to run, the dense model's as well
            "SIGTERM ends requests otherwise than with the dense model": any(
                ours["outcomes"] != dense["outcomes"]
                for ours, dense in zip(record["sigterm"][::2], record["sigterm"][1::2], strict=True)
                if ours["options"]
            ),
            "a server did not end after SIGTERM": any(run["exit_code"] is None for run in record["sigterm"]),
        }.items()
        if wrong
    ]


def main() -> None:
    from fermisvd_convert.convert import convert
    from fermisvd_convert.loading import load_tokenizer
    from fermisvd_convert.text import windows_of

    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--sigterm-only", action="store_true", help="print how requests end, write nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "soak-work")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(exist_ok=True)
    texts = write_texts(work)
    out = work / "pivga"
    if not out.exists():
        options = {"calibration": [str(texts["calibration"])], "sequence_length": 256, "ranks": "uniform"}
        convert(str(DEMO_MODEL), out, 0.2, work=work / "stages", **options)
    windows = windows_of(load_tokenizer(DEMO_MODEL), str(texts["validation"]), max(LENGTHS), CLIENTS)
    prompts = [window[: LENGTHS[i % len(LENGTHS)]].tolist() for i, window in enumerate(windows)]
    record: dict = {"sigterm": []}
    if not arguments.sigterm_only:
        with serve(out, work / "server.log", *OPTIONS) as server:
            record |= asyncio.run(soak(server, prompts, arguments.requests))
    for options in ((), ("--shutdown-timeout", "60")):
        for model in (out, DEMO_MODEL):
            with serve(model, work / "sigterm.log", *OPTIONS, *options) as server:
                ended = asyncio.run(terminate_only(server, prompts))
            record["sigterm"].append({"model": model.name, "options": options, **ended})
            print(record["sigterm"][-1], flush=True)
    if arguments.sigterm_only:
        return
    protocol = {"requests": arguments.requests, "clients": CLIENTS, "new_tokens": NEW_TOKENS, "options": OPTIONS}
    record = new_record(command_line(), protocol) | record | {"faults": faults_of(record)}
    record["versions"] |= vllm_versions()
    write_record("soak", record)
    print(json.dumps(record, indent=1))
    sys.exit(bool(record["faults"]))


if __name__ == "__main__":
    main()
