"""A real server in its own processes, for measurements: start, wait until it serves, find its memory, stop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    url: str
    pid: int
    start_s: float  # from the command to the first healthy answer

    def memory_bytes(self) -> dict[str, int]:
        """Resident bytes by process: api, engine, worker."""
        found = {"api": resident_bytes(self.pid)}
        for child in _children(self.pid):
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "server.engine.loop" in command:
                found["engine"] = resident_bytes(child)
            elif "adapters_store.worker" in command:
                found["worker"] = resident_bytes(child)
        return found


@contextmanager
def running_server(
    model: Path, adapters: Path, cache: Path, *flags: str, log: Path | None = None
) -> Iterator[RunningServer]:
    """`multilora serve` on a free port; ended by SIGTERM, and killed if that does not do it."""
    port = free_port()
    command = [
        sys.executable, "-m", "server", "serve", "--model", str(model), "--adapters", str(adapters),
        "--cache-dir", str(cache), "--port", str(port), "--served-model-name", "base", *flags,
    ]  # fmt: skip
    started = time.monotonic()
    output = log.open("wb") if log else subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if log else subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url)
        yield RunningServer(url, process.pid, time.monotonic() - started)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no VmRSS")


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode} before it served")
        try:
            if httpx.get(f"{url}/health", timeout=1.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not healthy within {START_TIMEOUT_S:g} s")


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
