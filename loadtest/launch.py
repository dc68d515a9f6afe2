"""Any server as a child process: started with a command, waited for until it answers, stopped with all its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

STOP_S = 30.0
_SHOWN_BYTES = 2000  # of the log, in an error


@contextmanager
def launched(
    command: Sequence[str], url: str, log: Path, env: Mapping[str, str] | None = None, timeout_s: float = 900.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Until GET url/health is 200. Errors: RuntimeError with the end of the log if that does not come to be.

    The server is the head of its own process group, and at the end the whole group is: first asked, then killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, url, log, timeout_s)
            yield process
        finally:
            _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode} before it served:\n{_end_of(log)}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server was not healthy within {timeout_s:g} s:\n{_end_of(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def _end_of(log: Path) -> str:
    return log.read_bytes()[-_SHOWN_BYTES:].decode("utf-8", "replace")
