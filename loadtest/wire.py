"""HTTP/1.1 for measurements: one request a connection, every arrival of bytes stamped, nothing parsed while it runs.

Stamps are taken where the event loop hands the bytes over. Chunks and events are taken apart afterwards, so that the
generator's own work neither delays the stamps of other streams nor takes the server's processor while it is measured.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_LENGTH = b"content-length:"


@dataclass(slots=True)
class Exchange:
    """One request on the wire; times by `time.perf_counter`."""

    due: float  # when it should have been sent
    begun: float = 0.0  # when connecting began
    sent: float = 0.0  # when the request was written
    ended: float = 0.0
    parts: list[tuple[float, bytes]] = field(default_factory=list)  # (when, what) arrived
    failure: str = ""  # of the transport

    @property
    def has_failed(self) -> bool:
        """By a glance: the transport failed, or the status isn't 200. An error within a stream is seen later."""
        return bool(self.failure) or not self.parts or self.parts[0][1][9:12] != b"200"


@dataclass(frozen=True)
class Target:
    """A server, its name resolved once."""

    host: str  # as in the Host header
    name: str  # as in a certificate
    address: str
    port: int
    tls: ssl.SSLContext | None
    prefix: str  # of every path

    def encode(self, path: str, body: bytes, api_key: str | None = None) -> bytes:
        """A POST, ready to be written."""
        fields = [
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {self.host}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if api_key:
            fields.append(f"Authorization: Bearer {api_key}")
        return "\r\n".join([*fields, "", ""]).encode() + body


def resolve(url: str) -> Target:
    """Errors: ValueError for what is no http or https address of a host that is known."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    port = port or (443 if parts.scheme == "https" else 80)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    try:
        address = str(ipaddress.ip_address(parts.hostname))
    except ValueError:
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ValueError(f"{url!r}: {error}") from None
        address = str(found[0][4][0])
    return Target(parts.netloc.rpartition("@")[2], parts.hostname, address, port, tls, parts.path.rstrip("/"))


async def exchange(target: Target, request: bytes, due: float, timeout_s: float) -> Exchange:
    """Send and receive all. Never raises for what the network does: `failure` says it."""
    done = Exchange(due)
    done.begun = time.perf_counter()
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(
                lambda: _Receiver(done, over),
                target.address,
                target.port,
                ssl=target.tls,
                server_hostname=target.name if target.tls else None,
            )
            done.sent = time.perf_counter()
            transport.write(request)
            await over
    except TimeoutError:
        done.failure = f"nothing more within {timeout_s:g} s"
    except OSError as error:
        done.failure = f"connection failed: {error.strerror or error}"
    finally:
        if transport is not None:
            transport.abort()
    done.ended = done.parts[-1][0] if done.parts and not done.failure else time.perf_counter()
    return done


class _Receiver(asyncio.Protocol):
    """Keeps what arrives and ends `over` with the answer's last byte, or with the connection."""

    def __init__(self, into: Exchange, over: asyncio.Future[None]) -> None:
        self._into, self._over = into, over
        self._missing: int | None = None  # bytes of a body of known length
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        self._into.parts.append((time.perf_counter(), data))
        if self._missing is not None:
            self._missing -= len(data)
        elif len(self._into.parts) == 1:
            self._look_for_length(data)
        self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        if self._tail == _LAST_CHUNK or (self._missing is not None and self._missing <= 0):
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and not self._over.done():
            self._into.failure = f"connection lost: {error}"
        self._end()

    def _look_for_length(self, data: bytes) -> None:
        """Where the head isn't whole in the first bytes, the end is the connection's."""
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(_LENGTH):
                self._missing = int(line[len(_LENGTH) :]) - len(body)

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
