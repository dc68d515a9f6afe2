"""The two one-way sockets between API and engine: ZMQ PUSH/PULL over ipc, msgpack-tagged structs, no pickle.

    API process (asyncio)                               engine process (blocking)
    ClientTransport.send    ──── to_engine.sock ───▶ EngineTransport.receive   AddRequest, Abort, …
    ClientTransport.receive ◀── from_engine.sock ─── EngineTransport.send      StepOutputs, EngineFailed, …

The sockets live in a folder of mode 0700 and are unlinked once both processes are connected, so nobody else
can reach them and a killed server leaves nothing behind.

Bounds. Each direction holds at most 2 x MAX_QUEUED messages (one side's send queue, the other's receive
queue) and what fits the kernel's socket buffer between them. A full queue towards the API means that its
event loop stands still: the engine's `send` then blocks, so it stops stepping instead of growing. A full
queue towards the engine (a step that takes very long) keeps the rest in the API process, in order: one
AddRequest and one Abort per open request, so the API's bound on open requests bounds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from server.engine.messages import FromEngine, ToEngine
from server.errors import ConfigError

MAX_QUEUED = 1000  # messages per socket: ZMQ's high-water mark
MAX_RECEIVED = 1024  # messages taken at once, so that a flood of them can't hold up a step
LAST_WORDS_S = 2.0  # how long a closing engine waits for its last messages to leave


class Endpoints(msgspec.Struct, frozen=True):
    """Addresses of the two sockets. The API process binds, the engine connects."""

    to_engine: str
    from_engine: str


class ClientTransport:
    """The API process's side. All calls come from one event loop. Raises ConfigError on a too long TMPDIR."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="multilora-"))  # mode 0700
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._context = zmq.asyncio.Context()
        self._watcher: asyncio.AbstractEventLoop | None = None  # the event loop, while it watches the inbox
        self._receiver: asyncio.Future[None] | None = None  # who waits for a message
        try:
            self.endpoints = Endpoints(self._address("to_engine.sock"), self._address("from_engine.sock"))
            self._outbox = self._context.socket(zmq.PUSH)
            # Not pyzmq's asyncio socket: that costs as much as the tokens of five streams, with every step's message.
            inbox: Any = self._context.socket(zmq.PULL, socket_class=zmq.Socket)  # type: ignore[arg-type]
            self._inbox: zmq.Socket[bytes] = inbox
            self._outbox.set_hwm(MAX_QUEUED)
            self._inbox.set_hwm(MAX_QUEUED)
            self._outbox.bind(self.endpoints.to_engine)
            self._inbox.bind(self.endpoints.from_engine)
        except (ConfigError, zmq.ZMQError):
            self.close()
            raise

    async def receive(self) -> FromEngine:
        """The next message. Raises msgspec.MsgspecError for one that is not of this protocol. One caller at a time."""
        while True:
            try:
                return self._decoder.decode(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                await self._readable()

    async def _readable(self) -> None:
        """Wait for the socket's file descriptor, which tells of a message after a recv() that found none."""
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop()
            self._watcher.add_reader(self._inbox.fileno(), self._on_readable)
        self._receiver = asyncio.get_running_loop().create_future()
        try:
            await self._receiver
        finally:
            self._receiver = None

    def _on_readable(self) -> None:
        if self._receiver is None:
            self._unwatch()  # or the event loop would spin for as long as nobody receives
        elif not self._receiver.done():
            self._receiver.set_result(None)

    def _unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.remove_reader(self._inbox.fileno())
            self._watcher = None

    def send(self, message: ToEngine) -> None:
        """Send at once, or behind what is already waiting for room; never blocks, keeps the order."""
        sent = self._outbox.send(self._encoder.encode(message))
        assert isinstance(sent, asyncio.Future)
        if sent.done():
            sent.result()  # raises what went wrong

    def seal(self) -> None:
        """Unlink the sockets: the connections stay, and no other process can make one."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Close at once; what was not sent is dropped. May be called twice."""
        self._unwatch()
        self._context.destroy(linger=0)
        self.seal()

    def _address(self, name: str) -> str:
        path = self._folder / name
        if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(
                f"{path}: too long for a socket (at most {zmq.IPC_PATH_MAX_LEN} bytes); set TMPDIR to a shorter folder"
            )
        return f"ipc://{path}"


class EngineTransport:
    """The engine's side: blocking, and used by the engine's main thread only."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        self._inbox.set_hwm(MAX_QUEUED)
        self._outbox.set_hwm(MAX_QUEUED)
        # In this order: EngineReady through the second proves to the API that the first is connected too.
        self._inbox.connect(endpoints.to_engine)
        self._outbox.connect(endpoints.from_engine)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """What has arrived, in order, at most MAX_RECEIVED; waits up to `timeout_s` for the first message."""
        if timeout_s > 0 and not self._inbox.poll(math.ceil(timeout_s * 1000)):
            return []
        messages: list[ToEngine] = []
        with contextlib.suppress(zmq.Again):
            while len(messages) < MAX_RECEIVED:
                messages.append(self._decoder.decode(self._inbox.recv(zmq.NOBLOCK)))
        return messages

    def send(self, message: FromEngine) -> None:
        """Send; blocks while the API process has not read the 2 x MAX_QUEUED messages before it."""
        self._outbox.send(self._encoder.encode(message))

    def close(self) -> None:
        """Close, once the last messages have left or LAST_WORDS_S have passed."""
        self._context.destroy(linger=int(LAST_WORDS_S * 1000))
