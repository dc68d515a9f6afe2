"""The compiler process and its client. Parsing and compiling happen there, never in the API or the engine.

`python -m adapters_store.worker MANIFEST` reads jobs from stdin and writes results to stdout, one at a time,
each a 4-byte big-endian length and a msgpack message. It ends at the end of stdin or with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from adapters_store.child import IMPORT_ROOT, LENGTH_BYTES, end_with_parent, frame, read_frame, take_replies
from adapters_store.compile.base import BaseWeights
from adapters_store.compile.job import CompileJob, CompileResult, run_job
from adapters_store.disk_threads import give_way
from adapters_store.errors import AdapterError, AdapterUnavailable, adapter_error, reason_of
from adapters_store.inspect import AdapterReport, InspectJob, run_inspection
from adapters_store.manifest import BaseManifest, read_manifest

log = logging.getLogger(__name__)

NICENESS = 19
"""a compile takes what the engine's steps leave of the same cores"""
KEPT_BYTES = 128 << 20
"""of memory that the compiler process keeps between jobs, at most; larger pieces are given back at once"""


class JobFailed(msgspec.Struct, frozen=True, tag=True):
    """The job's AdapterError, as it crosses the process boundary."""

    code: str
    message: str


class JobDone(msgspec.Struct, frozen=True, tag=True):
    """The job's result."""

    result: CompileResult | AdapterReport


Job = CompileJob | InspectJob
_REPLY: msgspec.msgpack.Decoder[JobDone | JobFailed] = msgspec.msgpack.Decoder(JobDone | JobFailed)


# --- client ----------------------------------------------------------------------------------------------


class CompileWorker:
    """Runs compile jobs, one at a time, in one warm child process, which is started anew when it died."""

    def __init__(self, manifest_path: Path, *, timeout_s: float = 300.0) -> None:
        self._manifest_path = manifest_path
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._running: asyncio.Task[CompileResult | AdapterReport] | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the child, so that the first job finds it warm."""
        async with self._turn:
            await self._ensure_started()

    async def compile(self, job: CompileJob) -> CompileResult:
        """Run one job; AdapterUnavailable when the child died over it or took longer than the timeout.

        A caller that is cancelled while it waits for its turn leaves the queue. A job that has begun
        runs to its end: its image is then on disk for the next who asks.
        """
        result = await self._exchange_in_turn(job)
        assert isinstance(result, CompileResult)
        return result

    async def inspect(self, job: InspectJob) -> AdapterReport:
        """Report on an adapter, in a turn of its own between compiles, with the same bounds."""
        result = await self._exchange_in_turn(job)
        assert isinstance(result, AdapterReport)
        return result

    async def close(self) -> None:
        """End the child: by the end of its input, and by force when it is still at work."""
        self._is_closed = True
        if self._running is not None and not self._running.done():
            await self._kill()
            await asyncio.wait({self._running})
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 2.0)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _exchange_in_turn(self, job: Job) -> CompileResult | AdapterReport:
        async with self._turn:
            if self._running is not None:
                await asyncio.wait({self._running})
            self._running = asyncio.create_task(self._exchange(job))
            self._running.add_done_callback(_retrieve)
            return await asyncio.shield(self._running)

    async def _exchange(self, job: Job) -> CompileResult | AdapterReport:
        process = await self._ensure_started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                process.stdin.write(frame(msgspec.msgpack.encode(job)))
                await process.stdin.drain()
                length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
                reply = _REPLY.decode(await process.stdout.readexactly(length))
        except TimeoutError:
            await self._kill()
            _clear(job)
            raise AdapterUnavailable(
                f"compiling adapter {job.version.name} took longer than {self._timeout_s:g} s"
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            code = await process.wait()
            _clear(job)
            log.warning("the compiler process ended (exit status %s) over adapter %s", code, job.version.name)
            raise AdapterUnavailable(
                f"the compiler process ended (exit status {code}) over adapter {job.version.name}; try again"
            ) from error
        if isinstance(reply, JobFailed):
            raise adapter_error(reply.code, reply.message)
        return reply.result

    async def _ensure_started(self) -> asyncio.subprocess.Process:
        if self._is_closed:
            raise AdapterUnavailable("the server is shutting down")
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "adapters_store.worker", str(self._manifest_path)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
            )
        return self._process

    async def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _clear(job: Job) -> None:
    """Take away what a child that has ended left of a job; its disk may be short of room."""
    if isinstance(job, CompileJob):
        job.delete_temporary()


def _retrieve(task: asyncio.Task[CompileResult | AdapterReport]) -> None:
    """Look at the outcome of a job whose caller has left, or asyncio complains that nobody did."""
    if not task.cancelled():
        task.exception()


def _environment() -> dict[str, str]:
    """The child must find this package wherever it was started from, and needs no pool of BLAS threads.

    It keeps the memory of one job for the next (glibc): fresh pages cost as much as the work on them.
    """
    path = os.pathsep.join(filter(None, (str(IMPORT_ROOT), os.environ.get("PYTHONPATH"))))
    kept = {"MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES), "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES)}
    return os.environ | kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


# --- child -----------------------------------------------------------------------------------------------


def main() -> None:
    """Serve jobs from stdin until it ends."""
    end_with_parent(os.getppid())
    # a Ctrl-C in the terminal is the parent's to handle. A session would keep it away too, but between sessions Linux
    # shares the processors evenly: niceness counts within one
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    give_way(NICENESS)
    replies = take_replies()
    manifest, base = read_manifest(Path(sys.argv[1])), BaseWeights()
    while (message := read_frame(sys.stdin.buffer)) is not None:
        reply = _run(message, manifest, base)
        replies.write(frame(msgspec.msgpack.encode(reply)))


def _run(message: bytes, manifest: BaseManifest, base: BaseWeights) -> JobDone | JobFailed:
    job = msgspec.msgpack.decode(message, type=Job)
    try:
        if isinstance(job, InspectJob):
            return JobDone(run_inspection(job, manifest))
        return JobDone(run_job(job, manifest, base))
    except AdapterError as error:
        return JobFailed(error.code, error.message)
    except (OSError, MemoryError) as error:
        why = f"adapter {job.version.name} can't be compiled now: {reason_of(error)}"
        return JobFailed(AdapterUnavailable.code, why)
    except Exception as error:  # the process boundary: a fault of ours costs one adapter, not the compiler
        logging.getLogger(__name__).exception("compiling adapter %s", job.version.name)
        return JobFailed(AdapterError.code, f"compiling adapter {job.version.name} failed: {error!r}")


if __name__ == "__main__":
    main()
