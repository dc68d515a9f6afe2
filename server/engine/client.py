"""The engine as the API sees it: the `Engine` protocol, and `AsyncEngine`, in its own process."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

from adapters_store.ref import AdapterRef
from server.engine.messages import (
    AdapterFailed,
    AdapterReady,
    AddRequest,
    DropAdapter,
    EngineFailed,
    EngineReady,
    FromEngine,
    PinAdapter,
    PrefetchAdapter,
    RequestError,
    RequestOutput,
    SetWeight,
    Shutdown,
    StepOutputs,
    StepStats,
    ToEngine,
)
from server.engine.process import EngineProcess, LaunchSpec, describe_exit
from server.engine.progress import Progress
from server.engine.residents import Residents
from server.engine.streams import Streams, Taker
from server.engine.transport import ClientTransport
from server.errors import ConfigError, EngineDead

DEFAULT_CORE = "server.engine.start:build_core"
EXIT_GRACE_S = 5.0  # an engine that said it failed has this long to exit
SETTLE_S = 0.05  # after the exit: this long without a message, and there are no more

logger = logging.getLogger(__name__)


class EngineStartError(ConfigError):
    """The engine could not start; the message is its own."""


class Engine(Protocol):
    """What the API needs of an engine. Used from one event loop."""

    died: asyncio.Event
    """set when the engine has ended by itself; the server then turns red and exits non-zero"""
    residents: Residents
    """which images are on the device, as far as the engine has told"""

    @property
    def ready(self) -> EngineReady: ...

    @property
    def is_alive(self) -> bool:
        """Whether new requests are taken."""

    @property
    def last_stats(self) -> StepStats: ...

    @property
    def silent_s(self) -> float:
        """Seconds since the engine last said anything. Beyond a second or two: a long step, or stuck."""

    @property
    def stuck_s(self) -> float:
        """Seconds that requests have been running without a step that ended, whatever the engine says; else 0."""

    @property
    def num_open(self) -> int:
        """Streams whose terminal output has not come: zero means drained."""

    def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs, the last of them terminal. Sent at the first `__anext__`.

        Outputs that came while the reader was busy are merged into one. Leaving early aborts the request,
        in the same turn of the event loop; wrap it in contextlib.aclosing. An engine's death is an output
        with finish_reason "error" here; EngineDead is raised only for requests that come after it.
        """

    def divert(self, request_id: str, take: Taker) -> None:
        """Offer an open request's further outputs, but the last, to `take` while the reader of generate() waits.

        What it declines comes through generate() as before, and so does what it raises.
        """

    def abort(self, request_id: str) -> None:
        """End an open request; its stream goes on to its terminal output. Unknown ids do nothing."""

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        """The image behind `key` is on disk. Does nothing once the engine is dead, as the next."""

    def adapter_failed(self, key: str, status: int, code: str, message: str) -> None:
        """The image behind `key` will not come."""

    def pin_adapter(self, ref: AdapterRef) -> None:
        """Load this image and keep it on the device; `residents` tells when it is there or has failed."""

    def drop_adapter(self, image_key: str) -> None:
        """Let this image go, pinned or not, as soon as nothing uses it."""

    def prefetch_adapter(self, ref: AdapterRef, tier: Literal["host", "device"]) -> None:
        """Bring this image there without a request; `residents` tells when it is there or has failed."""

    def set_weight(self, name: str, weight: float) -> None:
        """The share of the adapter's requests when several adapters have work; 1 is everyone's."""

    async def close(self) -> None:
        """End open requests and the engine. May be called twice."""


class AsyncEngine:
    """An engine in its own process.

        start() ──▶ alive ──close()──▶ closing ──exit──▶ ended
                      └──exit, EngineFailed, garbage on the socket──▶ ended, `died` set

    `core` is the dotted path of the core's factory; it gets start()'s config as JSON bytes.
    """

    def __init__(self, core: str = DEFAULT_CORE, *, start_timeout_s: float = 600.0) -> None:
        self.died = asyncio.Event()
        self.residents = Residents()
        self.end_reason: str | None = None  # set when it has ended; for the log, not for clients
        self.exit_code: int | None = None
        self._core = core
        self._start_timeout_s = start_timeout_s
        self._streams = Streams(self._send, refusal="The engine has not started.")
        self._last_stats = StepStats()
        self._heard_s = time.monotonic()
        self._progress = Progress()
        self._is_delivering = False
        self._is_closing = False
        self._ready: EngineReady | None = None
        self._process: EngineProcess | None = None  # this and what follows: set by start()
        self._transport: ClientTransport
        self._started: asyncio.Future[EngineReady]
        self._receiver: asyncio.Task[None]
        self._watcher: asyncio.Task[None]

    @property
    def ready(self) -> EngineReady:
        if self._ready is None:
            raise EngineDead("The engine has not started.")
        return self._ready

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._streams.is_admitting

    @property
    def last_stats(self) -> StepStats:
        return self._last_stats

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._heard_s

    @property
    def stuck_s(self) -> float:
        return self._progress.stuck_s

    @property
    def num_open(self) -> int:
        return len(self._streams.open_ids)

    async def start(self, config: object) -> None:
        """Start the process and wait until it serves. Once per object. Raises EngineStartError.

        `config` is anything msgspec writes as JSON. The calling thread must outlive the engine (see
        EngineProcess).
        """
        assert self._process is None, "an AsyncEngine starts once"
        self._started = asyncio.get_running_loop().create_future()
        self._transport = ClientTransport()
        spec = LaunchSpec(
            core=self._core,
            config=msgspec.Raw(msgspec.json.encode(config)),
            endpoints=self._transport.endpoints,
            parent_pid=os.getpid(),
        )
        try:
            self._process = EngineProcess(spec)
        except OSError as error:
            self._transport.close()
            raise EngineStartError(f"the engine process could not be started: {error}") from error
        self._receiver = asyncio.create_task(self._receive(), name="engine receiver")
        self._watcher = asyncio.create_task(self._watch(self._process), name="engine watcher")
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self._ready = await self._started
        except TimeoutError:
            raise EngineStartError(f"the engine was not ready within {self._start_timeout_s:g} s") from None
        finally:
            if self._ready is None:
                await self.close()

    def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """See Engine. Raises EngineDead here when it is known, else at the first `__anext__`."""
        self._streams.check()
        return self._streams.stream(request)

    def divert(self, request_id: str, take: Taker) -> None:
        self._streams.divert(request_id, take)

    def abort(self, request_id: str) -> None:
        self._streams.abort(request_id)

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        self._send(AdapterReady(key, ref))

    def adapter_failed(self, key: str, status: int, code: str, message: str) -> None:
        self._send(AdapterFailed(key, status, code, message))

    def pin_adapter(self, ref: AdapterRef) -> None:
        self._send(PinAdapter(ref))

    def drop_adapter(self, image_key: str) -> None:
        self._send(DropAdapter(image_key))

    def prefetch_adapter(self, ref: AdapterRef, tier: Literal["host", "device"]) -> None:
        self._send(PrefetchAdapter(ref, tier))

    def set_weight(self, name: str, weight: float) -> None:
        self._send(SetWeight(name, weight))

    async def close(self, timeout_s: float = 10.0) -> None:
        """Ask the engine to abort everything and exit; kill it after `timeout_s`, or if this is cancelled."""
        if self._process is None:
            return
        can_answer = self._ready is not None and self.end_reason is None and self.exit_code is None
        self._is_closing = True
        self._streams.refuse("The server is shutting down.")
        try:
            if can_answer:
                self._transport.send(Shutdown())
                await asyncio.wait({self._watcher}, timeout=timeout_s)
            self._process.kill()
            await asyncio.wait({self._watcher}, timeout=EXIT_GRACE_S)
        finally:
            self._process.kill()
            self._receiver.cancel()
            self._watcher.cancel()
            self._end("closed")
            self._transport.close()

    def _send(self, message: ToEngine) -> None:
        if self.is_alive:
            self._transport.send(message)

    async def _receive(self) -> None:
        """Task: read messages for as long as the process may have sent any."""
        try:
            while True:
                message = await self._transport.receive()
                self._heard_s = time.monotonic()
                self._is_delivering = True
                await self._take(message)
                self._is_delivering = False
        except Exception as error:  # the process boundary: a message that can't be read, or a defect of ours
            logger.exception("the engine's messages can't be read")
            self._end(f"the engine's messages can't be read: {error}")
            self._kill()

    async def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self._last_stats = message.stats
                self._progress.take(message)
                self.residents.apply(message.slot_changes)
                await self._streams.deliver(message.outputs)
            case EngineReady():
                self._transport.seal()
                if self.exit_code is None and not self._started.done():
                    self._streams.admit()
                    self._started.set_result(message)
            case EngineFailed():
                self._end(message.message)
                asyncio.get_running_loop().call_later(EXIT_GRACE_S, self._kill)

    async def _watch(self, process: EngineProcess) -> None:
        """Task: notice the process's end, let what it had sent arrive, then end the streams."""
        self.exit_code = await process.wait()
        self._streams.refuse("The engine has stopped.")
        while True:
            heard_s = self._heard_s
            await asyncio.sleep(SETTLE_S)
            if self._receiver.done() or (self._heard_s == heard_s and not self._is_delivering):
                break
        self._end(describe_exit(self.exit_code))

    def _end(self, reason: str) -> None:
        """Ended, whatever the cause; the first reason stays. Every open stream gets its terminal event."""
        if self.end_reason is not None:
            return
        self.end_reason = reason
        self._streams.refuse("The engine has stopped.")
        self._streams.fail_all(
            RequestError(status=503, code="engine_dead", message="The engine stopped before this request ended.")
        )
        if not self._started.done():
            self._started.set_exception(EngineStartError(reason))
        elif not self._is_closing:
            logger.error("the engine has ended: %s", reason)
            self.died.set()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
