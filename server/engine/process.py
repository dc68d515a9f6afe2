"""The engine as a child process: what it is told at start, how its end is noticed. Linux (pidfd, prctl)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from server.engine.transport import Endpoints

_PR_SET_PDEATHSIG = 1
_IMPORT_ROOT = Path(__file__).resolve().parents[2]  # the folder that `server` is imported from


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process reads, as JSON, from its standard input."""

    core: str
    """dotted path of the core's factory, `package.module:function`; it gets `config` as JSON bytes"""
    config: msgspec.Raw
    endpoints: Endpoints
    parent_pid: int


class EngineProcess:
    """A fresh interpreter (never a fork: CUDA and threads don't survive one) running server.engine.loop.

    Create it on a thread that lives as long as the engine shall: Linux sends the parent-death signal when
    the creating *thread* ends.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(msgspec.json.encode(spec))
            stdin.seek(0)
            # -P: the working directory, which anyone may have written to, is not on the import path
            command = [sys.executable, "-P", "-m", "server.engine.loop"]
            self._popen = subprocess.Popen(command, stdin=stdin, env=_environment())

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def wait(self) -> int:
        """Wait for the end; the exit status, negative for a signal."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return self._popen.wait()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._popen.kill()


def describe_exit(code: int) -> str:
    """The exit status in words."""
    if code >= 0:
        return f"the engine process exited with status {code}; its log says why"
    hint = " (out of memory, or killed by hand)" if code == -signal.SIGKILL else ""
    return f"the engine process was ended by {signal.Signals(-code).name}{hint}"


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends, even within a step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    exit_if_orphaned(parent_pid)  # it may have ended before the call above


def exit_if_orphaned(parent_pid: int) -> None:
    """Exit non-zero if this process's parent is not `parent_pid` (any more)."""
    if os.getppid() != parent_pid:
        raise SystemExit("multilora engine: the server that started this engine is gone")


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    if _IMPORT_ROOT.name not in ("site-packages", "dist-packages"):  # those are found without help
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_IMPORT_ROOT), env.get("PYTHONPATH"))))
    return env
