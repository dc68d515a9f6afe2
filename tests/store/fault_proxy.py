"""An HTTP/1.1 server on loopback that passes requests on to a real one, and does to chosen ones what networks do."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
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
    open_connections: int = 0
    connections: int = 0
    """since the start"""

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
            await self._answer(request, self._fault(target), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()

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
        writer.write(origin_form.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read() if request.method != "HEAD" else b""
        writer.close()
        return re.sub(rb"\r\nConnection: [^\r]*", b"", head, flags=re.I), body

    async def _send(self, kind: str, value: str, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
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
    proxy = FaultProxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
