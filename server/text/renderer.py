"""Adapters' own chat templates, rendered in a child process with a bound on time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

import msgspec

from adapters_store.child import IMPORT_ROOT, LENGTH_BYTES, MAX_FRAME_BYTES, frame
from adapters_store.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from server.errors import BadRequest
from server.text.render_worker import (
    MAX_RENDER_BYTES,
    NotCompiled,
    OutOfMemory,
    Refused,
    Rendered,
    RenderJob,
    Reply,
    TooLong,
)
from server.text.templates import ChatTemplateError
from server.text.turns import Turns

MAX_RENDER_S = 2.0
_START_TIMEOUT_S = 20.0
_LAST_WORDS_S = 1.0
_KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit statuses that are not the template's fault
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "PYTHONPATH")  # no secret of the server's environment

logger = logging.getLogger(__name__)


class TextTooLong(Exception):
    """The rendering has more characters than allowed: `num_chars`."""

    def __init__(self, num_chars: int) -> None:
        super().__init__(num_chars)
        self.num_chars = num_chars


class TemplateRenderer:
    """Renders one chat at a time, in one warm child process, started at the first and anew after a breach.

    Of one event loop between its first rendering and `close`.
    """

    def __init__(self) -> None:
        self._turns = Turns()
        self._process: asyncio.subprocess.Process | None = None
        self._running: set[asyncio.Task[str]] = set()

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def render(self, adapter: str, where: str, job: RenderJob) -> str:
        """The text of `job`, whose template stands `where`. Other adapters' jobs go first if `adapter` is slow.

        Raises ChatTemplateError when the template refuses the messages, TextTooLong; AdapterInvalid when it
        is broken, AdapterTooLarge when it takes more time or memory than it may, AdapterUnavailable when the
        child was killed; Overloaded when too many wait.
        """
        message = _encoded(job)
        await self._turns.take(adapter)
        # in a task of its own: a caller who leaves must not leave half an exchange behind
        task = asyncio.create_task(self._one_turn(where, message))
        self._running.add(task)
        task.add_done_callback(self._retrieve)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End the child, also when it is at work. A later rendering starts another."""
        await self._kill()
        if self._running:
            await asyncio.wait(self._running)

    async def _one_turn(self, where: str, message: bytes) -> str:
        try:
            return await self._exchange(where, message)
        finally:
            self._turns.give_back()

    async def _exchange(self, where: str, message: bytes) -> str:
        process = await self._ensure_started()
        try:
            async with asyncio.timeout(MAX_RENDER_S):
                reply = msgspec.json.decode(await _ask(process, message), type=Reply)
        except TimeoutError:
            await self._kill()
            logger.warning("%s took longer than %g s to render", where, MAX_RENDER_S)
            raise AdapterTooLarge(
                f"{where}: rendering a chat takes longer than {MAX_RENDER_S:g} s, the limit"
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError) as error:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _LAST_WORDS_S)  # its own status says why it ended
            await self._kill()
            raise _ended(where, process.returncode) from error
        if reply.is_last:
            await self._kill()
        return _text_of(reply, where)

    async def _ensure_started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                # -P: the working directory, which anyone may have written to, is not on the import path
                *(sys.executable, "-P", "-m", "server.text.render_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, not the child's
            )
            async with asyncio.timeout(_START_TIMEOUT_S):
                await _read_frame(process)  # empty: it is ready
        except (OSError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
            await self._kill()
            raise AdapterUnavailable("the process that renders adapters' chat templates does not start") from error
        return process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _retrieve(self, task: asyncio.Task[str]) -> None:
        """Forget a turn that is over, and look at its outcome, or asyncio complains when its caller has left."""
        self._running.discard(task)
        if not task.cancelled():
            task.exception()


async def _ask(process: asyncio.subprocess.Process, message: bytes) -> bytes:
    assert process.stdin is not None
    process.stdin.write(frame(message))
    await process.stdin.drain()
    return await _read_frame(process)


async def _read_frame(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a reply of {length} bytes (limit {MAX_FRAME_BYTES})")
    return await process.stdout.readexactly(length)


def _encoded(job: RenderJob) -> bytes:
    # JSON, not msgpack: a template's variables may be integers of any size
    try:
        message = msgspec.json.encode(job)
    except RecursionError:
        raise BadRequest("'chat_template_kwargs' is nested too deeply", param="chat_template_kwargs") from None
    if len(message) > MAX_FRAME_BYTES:
        raise BadRequest(
            f"the messages and 'chat_template_kwargs' have {len(message)} bytes; an adapter's own chat template "
            f"takes at most {MAX_FRAME_BYTES}",
            param="messages",
        )
    return message


def _text_of(reply: Reply, where: str) -> str:
    match reply.outcome:
        case Rendered(text):
            return text
        case TooLong(num_chars):
            raise TextTooLong(num_chars)
        case Refused(message):
            raise ChatTemplateError(message)
        case NotCompiled(message):
            raise AdapterInvalid(f"{where}: {message}")
        case OutOfMemory():
            raise AdapterTooLarge(
                f"{where}: rendering a chat takes more memory than {MAX_RENDER_BYTES >> 20} MiB, the limit"
            )


def _ended(where: str, status: int | None) -> AdapterInvalid | AdapterUnavailable:
    """The error for a child that ended over a job."""
    logger.warning("the process that renders chat templates ended (exit status %s) over %s", status, where)
    if status in _KILLED_FROM_OUTSIDE:
        return AdapterUnavailable(f"{where}: the process that rendered it was killed; try again")
    return AdapterInvalid(f"{where}: rendering a chat ends the process that does it (exit status {status})")


def _environment() -> dict[str, str]:
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(IMPORT_ROOT), env.get("PYTHONPATH"))))
    return env
