"""Server-sent events of a stream: frames encoded from prepared pieces, no model objects per token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters_store.errors import AdapterError
from server.api.access_log import PLAIN_SEND
from server.api.choices import Part
from server.api.disconnect import ClientGone, until_gone
from server.api.errors import body_of, error_body
from server.api.logprobs import LogprobsFormat
from server.errors import ServerError

DONE = b"data: [DONE]\n\n"
_LINE_ENDS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\x85\u2028\u2029")  # str.splitlines' own

logger = logging.getLogger(__name__)


class Frames:
    """The frames of one stream. Every chunk has the same id, created and model.

    data: {"id":...,"choices":[{"index":0,  "delta":{"content":"..."}   ,"logprobs":null,"finish_reason":null}]}
          └──────────── head ────────────┘ └─ text, by endpoint ─┘ └────────────────── tail ─────────────────┘
    """

    def __init__(
        self,
        envelope: Mapping[str, object],
        *,
        is_chat: bool,
        has_usage: bool,
        has_token_ids: bool,
        logprobs: LogprobsFormat | None = None,
    ) -> None:
        """`envelope` is id, object, created, model; `has_usage` says whether a usage chunk ends the stream."""
        self._is_chat = is_chat
        self._has_token_ids = has_token_ids
        self._logprobs = logprobs
        self._open = b"data: " + _encode(envelope)[:-1]
        self._heads: dict[int, bytes] = {}  # by the choice's index
        self._before, self._after = (b'"delta":{"content":', b"}") if is_chat else (b'"text":', b"")
        self._null_usage = b',"usage":null' if has_usage else b""
        self._plain: dict[int, tuple[bytes, bytes, bytes]] = {}  # by the same: around text, around ids

    def start(self, index: int, prompt_ids: list[int]) -> bytes:
        """What comes before a choice's text: the role of a chat, the prompt's ids if asked for (a chat's once)."""
        is_told = self._has_token_ids and (index == 0 or not self._is_chat)
        ids = b',"prompt_token_ids":' + _encode(prompt_ids) if is_told else b""
        if self._is_chat:
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            return self._head(index) + role + ids + self._null_usage + b"}\n\n"
        return self._choice(index, b'"text":""', b"null", b"null", ids) if ids else b""

    def part(self, part: Part) -> bytes:
        """The text of one engine event, if it has any (or ids, or logprobs), and the finish chunk after the last."""
        delta, frames = part.delta, b""
        if delta.finish_reason is None and not part.scored:
            return self.plain(part.index, delta.text, delta.token_ids)
        if delta.text or (self._has_token_ids and delta.token_ids) or part.scored:
            text = self._before + _encode(delta.text) + self._after
            ids = b',"token_ids":' + _encode(delta.token_ids) if self._has_token_ids else b""
            frames = self._choice(part.index, text, self._scores(part), b"null", ids)
        if delta.finish_reason is None:
            return frames
        last = b'"delta":{}' if self._is_chat else b'"text":""'
        why = b',"stop_reason":' + _encode(delta.stop_reason)
        return frames + self._choice(part.index, last, b"null", _encode(delta.finish_reason), why)

    def plain(self, index: int, text: str, token_ids: list[int]) -> bytes:
        """The same for an event without an end and logprobs: what nearly all of them are."""
        if index not in self._plain:
            whole = self._choice(index, self._before + b"\0" + self._after, b"null", b"null", b"\0")
            before, after, end = whole.split(b"\0")
            self._plain[index] = before, after + b',"token_ids":' * self._has_token_ids, end
        before, after, end = self._plain[index]
        if self._has_token_ids:
            return b"".join((before, _encode(text), after, _encode(token_ids), end)) if text or token_ids else b""
        return b"".join((before, _encode(text), after, end)) if text else b""

    def usage(self, usage: Mapping[str, object]) -> bytes:
        """The usage chunk."""
        return self._open + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"

    def _head(self, index: int) -> bytes:
        if index not in self._heads:
            self._heads[index] = self._open + b',"choices":[{"index":%d,' % index
        return self._heads[index]

    def _scores(self, part: Part) -> bytes:
        if self._logprobs is None or not part.scored:
            return b"null"
        return _encode(self._logprobs.write(part.scored))

    def _choice(self, index: int, text: bytes, logprobs: bytes, finish_reason: bytes, more: bytes) -> bytes:
        tail = b',"logprobs":' + logprobs + b',"finish_reason":' + finish_reason + more + b"}]"
        return self._head(index) + text + tail + self._null_usage + b"}\n\n"


def _encode(value: object) -> bytes:
    """JSON without the line ends that JSON allows: clients that split a stream at those would tear the frame."""
    encoded = msgspec.json.encode(value)
    if encoded.isascii():
        return encoded
    for line_end, escaped in _LINE_ENDS:
        encoded = encoded.replace(line_end, escaped)
    return encoded


def error_frame(error: ServerError | AdapterError | None) -> bytes:
    """An error after the start of a stream, and its end. None is a defect of ours: its text stays here."""
    body = error_body(error) if error else body_of("The server failed.", "server_error", None, "internal_error")
    return b"data: " + body + b"\n\n" + DONE


async def guarded(frames: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`frames`, where an error becomes an error frame: the status has been sent already."""
    async with aclosing(frames):
        try:
            async for frame in frames:
                yield frame
        except (ServerError, AdapterError) as error:
            yield error_frame(error)
        except Exception:  # the process boundary
            logger.exception("a stream failed")
            yield error_frame(None)


class SseResponse(Response):
    """Sends `frames` until they end or the client is gone; then closes them, in the same turn of the event loop.

    starlette's own streaming response leaves a generator that is waiting at its yield to the garbage collector.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        self._frames = frames
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames):
            with suppress(ClientGone, OSError):  # OSError: how newer servers tell of a closed connection
                gone = asyncio.Event()
                await until_gone(receive, self._send(send, scope.get(PLAIN_SEND, send), gone), gone)

    async def _send(self, send: Send, plain_send: Send, gone: asyncio.Event) -> None:
        """The head through `send`; the frames through `plain_send`, since all middleware here is about heads."""
        start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for frame in self._frames:
            if frame:
                await plain_send({"type": "http.response.body", "body": frame, "more_body": True})
                if gone.is_set():  # whatever the engine has for it by now: who left before its end aborted
                    raise ClientGone
        await plain_send({"type": "http.response.body", "body": b"", "more_body": False})
