"""`vllm serve` on a free loopback port, for tests, demo and benchmarks."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

VLLM = [
    sys.executable,
    "-m",
    "vllm.entrypoints.cli.main",
]  # its script may not be there, as where it was unpacked by hand


@dataclass
class Server:
    """address: http://host:port; log: everything it printed."""

    address: str
    process: subprocess.Popen
    log: Path


@contextmanager
def serve(folder: Path, log: Path, *options: str, limit: float = 300) -> Iterator[Server]:
    """Yields when healthy; the server and all its processes are stopped at the end, also when interrupted.

    Raises SystemExit with the end of the log if the server ends by itself or is not healthy after `limit` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*VLLM, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(server, limit)
        yield server
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            finally:  # also when interrupted a second time
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_healthy(server: Server, limit: float) -> None:
    begin = time.time()
    while time.time() - begin < limit:
        if server.process.poll() is not None:
            raise SystemExit(f"vllm serve ended with {server.process.returncode}:\n{server.log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"vllm serve not healthy after {limit:.0f} s:\n{server.log.read_text()[-3000:]}")
