"""An HTTP/1.1 server on loopback that passes requests on to a real one, and does to chosen ones what networks do."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

ERROR_BODY = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>secret-of-the-server</Message></Error>"
LISTING = (
    b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>%s</Key><Size>1</Size>"
    b"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
)
CODES = {403: b"AccessDenied", 404: b"NoSuchKey", 412: b"PreconditionFailed", 503: b"SlowDown", 500: b"InternalError"}


@dataclass
class Request:
    """One request as it came."""

    method: str
    target: str
    head: bytes


@dataclass
class FaultProxy:
    """`faults`: what to do to the next requests whose target has that text: [(text, fault), ...], each used once
    unless it is in `always`."""

    upstream: int
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    always: list[tuple[str, str]] = field(default_factory=list)
    admits: Callable[[str], bool] | None = None
    """of a bearer token; requests without an admitted one get 401, and the real server sees none"""
    open_connections: int = 0
    connections: int = 0
    """since the start"""
    tls: ssl.SSLContext | None = None
    _listener: asyncio.Server | None = None
    _plugs: list[socket.socket] = field(default_factory=list)

    async def listen(self) -> None:
        """Take connections, at the port of before if there was one."""
        self.refuse()
        self._listener = await asyncio.start_server(self.serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._listener.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Who connects is refused, until `listen`."""
        self._unplug()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def ignore(self) -> None:
        """Who connects gets no answer at all, until `listen`: the port's queue is full, and nobody takes any."""
        self.refuse()
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        plug.bind(("127.0.0.1", self.port))
        plug.listen(0)
        self._plugs = [plug]
        for _ in range(4):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", self.port))
            self._plugs.append(waiting)

    def _unplug(self) -> None:
        while self._plugs:
            self._plugs.pop().close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, text: str) -> int:
        """How many requests had `text` in their target."""
        return sum(text in request.target for request in self.requests)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        self.open_connections += 1
        try:
            self.connections += 1
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            request = Request(method, target, head)
            self.requests.append(request)
            fault = "" if self._is_admitted(request) else "status:401"
            await self._answer(request, fault or self._fault(target), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()

    def _is_admitted(self, request: Request) -> bool:
        if self.admits is None:
            return True
        token = re.search(rb"(?i)\r\nauthorization: bearer ([^\r]*)\r\n", request.head)
        return token is not None and self.admits(token[1].decode())

    def _fault(self, target: str) -> str:
        for index, (text, fault) in enumerate(self.faults):
            if text in target:
                del self.faults[index]
                return fault
        return next((fault for text, fault in self.always if text in target), "")

    async def _answer(self, request: Request, fault: str, writer: asyncio.StreamWriter) -> None:
        kind, _, value = fault.partition(":")
        if kind == "status":
            body = ERROR_BODY % CODES.get(int(value), b"Other")
            writer.write(
                b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (int(value), len(body), body)
            )
        elif kind == "redirect":
            writer.write(
                b"HTTP/1.1 302 X\r\nLocation: %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % value.encode()
            )
        elif kind == "listing":
            body = LISTING % value.encode()
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        elif kind == "hang":
            await asyncio.sleep(float(value))
        elif kind == "reset":
            writer.transport.abort()
        else:
            head, body = await self._ask(request)
            await self._send(kind, value, head, body, writer)
        await writer.drain()

    async def _ask(self, request: Request) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        origin_form = re.sub(rb"^(\S+) http://[^/ ]+", rb"\1 ", request.head)
        if self.admits is not None:
            origin_form = re.sub(rb"(?i)\r\nauthorization: [^\r]*", b"", origin_form)
        writer.write(origin_form.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read() if request.method != "HEAD" else b""
        writer.close()
        return re.sub(rb"\r\nConnection: [^\r]*", b"", head, flags=re.I), body

    async def _send(self, kind: str, value: str, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif kind == "whole":  # a store that knows no ranges
            head = re.sub(rb"(?i)\r\ncontent-range: [^\r]*", b"", head).replace(b" 206 ", b" 200 ", 1)
        elif kind == "etag":
            head = re.sub(rb"(?i)\r\netag: [^\r]*", b'\r\nETag: "' + value.encode() + b'"', head)
        writer.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        if kind == "cut":  # the connection ends in mid-body, in order
            writer.write(body[: int(value)])
        elif kind == "abort":  # the connection is reset in mid-body
            writer.write(body[: int(value)])
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
        elif kind == "drip":
            for index in range(len(body)):
                writer.write(body[index : index + 1])
                await writer.drain()
                await asyncio.sleep(float(value))
        else:
            writer.write(body)


@asynccontextmanager
async def fault_proxy(upstream: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultProxy]:
    """A proxy before a port of this machine, on the running loop."""
    proxy = FaultProxy(upstream, tls=tls)
    await proxy.listen()
    try:
        yield proxy
    finally:
        proxy.refuse()
