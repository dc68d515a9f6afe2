"""Server-sent events of a stream: frames encoded from prepared pieces, no model objects per token."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters_store.errors import AdapterError
from server.api.disconnect import ClientGone, until_gone
from server.api.errors import body_of, error_body
from server.errors import ServerError
from server.text.output import Delta

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode

logger = logging.getLogger(__name__)


class Frames:
    """The frames of one stream. Every chunk has the same id, created and model.

    data: {"id":...,"choices":[{"index":0,  "delta":{"content":"..."}   ,"finish_reason":null}]}
          └──────────── head ────────────┘ └─ text, by endpoint ─┘ └────────── tail ─────────┘
    """

    def __init__(self, envelope: Mapping[str, object], *, is_chat: bool, has_usage: bool, has_token_ids: bool) -> None:
        """`envelope` is id, object, created, model; `has_usage` says whether a usage chunk ends the stream."""
        self._is_chat = is_chat
        self._has_token_ids = has_token_ids
        self._open = b"data: " + _encode(envelope)[:-1]
        self._head = self._open + b',"choices":[{"index":0,'
        self._before, self._after = (b'"delta":{"content":', b"}") if is_chat else (b'"text":', b"")
        self._null_usage = b',"usage":null' if has_usage else b""

    def start(self, prompt_ids: list[int]) -> bytes:
        """What comes before any text: the role of a chat, the prompt's ids if asked for."""
        ids = b',"prompt_token_ids":' + _encode(prompt_ids) if self._has_token_ids else b""
        if self._is_chat:
            role = self._head + b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            return role + ids + self._null_usage + b"}\n\n"
        return self._choice(b'"text":""', b"null", ids) if ids else b""

    def delta(self, delta: Delta) -> bytes:
        """The text of one event; nothing when it has none (and no ids are asked for)."""
        if not delta.text and not (self._has_token_ids and delta.token_ids):
            return b""
        ids = b',"token_ids":' + _encode(delta.token_ids) if self._has_token_ids else b""
        return self._choice(self._before + _encode(delta.text) + self._after, b"null", ids)

    def end(self, delta: Delta, usage: Mapping[str, object] | None) -> bytes:
        """The finish chunk, the usage chunk if asked for, [DONE]."""
        last = b'"delta":{}' if self._is_chat else b'"text":""'
        frames = self._choice(last, _encode(delta.finish_reason), b',"stop_reason":' + _encode(delta.stop_reason))
        if self._null_usage:
            frames += self._open + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"
        return frames + DONE

    def _choice(self, text: bytes, finish_reason: bytes, more: bytes) -> bytes:
        tail = b',"logprobs":null,"finish_reason":' + finish_reason + more + b"}]"
        return self._head + text + tail + self._null_usage + b"}\n\n"


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
                await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for frame in self._frames:
            if frame:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
