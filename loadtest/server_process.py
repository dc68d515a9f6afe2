"""A real server in its own processes, for measurements: start, wait until it serves, find its memory, stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0
_SHOWN_CHARS = 2000  # of the log, in an error


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    url: str
    pid: int
    start_s: float  # from the command to the first healthy answer

    def memory_bytes(self) -> dict[str, int]:
        """Resident bytes by process: api, engine, worker."""
        return {name: resident_bytes(child) for name, child in _processes(self.pid).items()}


@contextmanager
def running_server(
    model: Path,
    adapters: Path,
    cache: Path,
    *flags: str,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """`multilora serve` on a free port; ended by SIGTERM, and killed if that does not do it.

    `env`: more of its environment.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "server", "serve", "--model", str(model), "--adapters", str(adapters),
        "--cache-dir", str(cache), "--port", str(port), "--served-model-name", "base", *flags,
    ]  # fmt: skip
    started = time.monotonic()
    output = log.open("wb") if log else subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT if log else subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, log)
        yield RunningServer(url, process.pid, time.monotonic() - started)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def process_times(pid: int) -> dict[str, float]:
    """CPU seconds so far by process: api, engine, worker."""
    return {name: _cpu_s(child) for name, child in _processes(pid).items()}


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no VmRSS")


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = f":\n{log.read_text(errors='replace')[-_SHOWN_CHARS:]}" if log else ""
            raise RuntimeError(f"the server ended with status {process.returncode} before it served{said}")
        try:
            if httpx.get(f"{url}/health", timeout=1.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not healthy within {START_TIMEOUT_S:g} s")


def _processes(pid: int) -> dict[str, int]:
    """The server's process ids by name: api, engine, worker."""
    found = {"api": pid}
    for child in _children(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if "server.engine.loop" in command:
            found["engine"] = child
        elif "adapters_store.worker" in command:
            found["worker"] = child
    return found


def _cpu_s(pid: int) -> float:
    """Of all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
