"""A small web server on loopback: files with ETag, Last-Modified, ranges, conditions, and answers made up by tests."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

MODIFIED = "Wed, 21 Oct 2026 07:28:00 GMT"
Headers = dict[str, str]


@dataclass
class Request:
    method: str
    path: str
    headers: Headers
    """by lower-case name"""


Answer = tuple[int, Headers, bytes]


@dataclass
class WebServer:
    """`files` by path; `special` by path: a function that answers a request in place of the file, or None for it."""

    files: dict[str, bytes] = field(default_factory=dict)
    special: dict[str, Callable[[Request], Answer | None]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    """headers that are left out, lower case"""
    requests: list[Request] = field(default_factory=list)
    scheme: str = "http"
    port: int = 0
    drip_s: float = 0.0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)
    """the open connections"""

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def asked(self, text: str, method: str = "") -> list[Request]:
        return [request for request in self.requests if text in request.path and method in request.method]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, many requests."""
        self.writers.add(writer)
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
                }
                request = Request(method, path, headers)
                self.requests.append(request)
                status, answered, body = self._answer(request)
                await self._send(request, status, answered, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    def _answer(self, request: Request) -> Answer:
        made_up = self.special.get(request.path, lambda _: None)(request)
        if made_up is not None:
            return made_up
        content = self.files.get(request.path)
        return (404, {}, b"nothing") if content is None else file_answer(request, content)

    async def _send(self, request: Request, status: int, headers: Headers, body: bytes, writer) -> None:
        headers = {"Content-Length": str(len(body)), **headers}
        lines = [f"{name}: {value}" for name, value in headers.items() if name.lower() not in self.hidden]
        writer.write("\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode("latin-1"))
        if request.method != "HEAD":
            for start in range(0, len(body), 1 if self.drip_s else 1 << 16):
                writer.write(body[start : start + (1 if self.drip_s else 1 << 16)])
                await writer.drain()
                await asyncio.sleep(self.drip_s)
            if int(headers.get("Content-Length", len(body))) != len(body):
                raise ConnectionError("a body of another length than said: the connection ends")
        await writer.drain()


def file_answer(request: Request, content: bytes) -> Answer:
    """What a web server says of a file."""
    etag = f'"{hashlib.sha1(content).hexdigest()}"'
    headers = {"ETag": etag, "Last-Modified": MODIFIED}
    if (
        request.headers.get("if-match", etag) != etag
        or request.headers.get("if-unmodified-since", MODIFIED) != MODIFIED
    ):
        return 412, {}, b""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if not asked:
        return 200, headers, content
    start, stop = int(asked[1]), int(asked[2]) + 1
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return 206, headers, content[start:stop]


@asynccontextmanager
async def web_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[WebServer]:
    """A server on a free port of 127.0.0.1, on the running loop."""
    running = WebServer(scheme="https" if tls else "http")
    server = await asyncio.start_server(running.serve, "127.0.0.1", 0, ssl=tls)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()
        for writer in list(running.writers):
            writer.transport.abort()
        await asyncio.sleep(0.02)  # their handlers end
