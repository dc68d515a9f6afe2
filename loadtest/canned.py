"""A server whose answers are known: for the load test's own tests, and for what the generator itself costs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

Body = dict[str, Any]
Script = Callable[[Body], tuple[int, AsyncIterator[bytes]]]  # a request's body -> status, pieces of the answer's


def event(fields: Body) -> bytes:
    """As server-sent."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def paced(first_s: float, gap_s: float, tokens_per_event: int = 1) -> Script:
    """Answers of `max_tokens` tokens: the first event after `first_s`, the others each `gap_s` after the one before.

    Each event's text is when it was written (`time.perf_counter`), so that a client's stamps can be checked.
    """

    async def pieces(body: Body) -> AsyncIterator[bytes]:
        due = time.perf_counter() + first_s
        left = body["max_tokens"]
        while left > 0:
            await asyncio.sleep(due - time.perf_counter())
            number = min(tokens_per_event, left)
            left -= number
            due += gap_s
            choice = {"index": 0, "text": f"{time.perf_counter():.7f};", "token_ids": [7] * number}
            yield event({"choices": [choice | {"finish_reason": None if left else "length"}]})
        usage = {"prompt_tokens": len(body.get("prompt", ())), "completion_tokens": body["max_tokens"]}
        yield event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"

    return lambda body: (200, pieces(body))


async def start_canned(script: Script, port: int = 0) -> asyncio.Server:
    """Listen on 127.0.0.1; chunked answers, one a connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = [line[15:] for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
            status, pieces = script(json.loads(await reader.readexactly(int(length))))
            fields = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked"
            writer.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{fields}\r\n\r\n".encode())
            async for piece in pieces:
                if piece:  # a chunk of no bytes would be the last
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the script or the client hung up
        finally:
            writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", port, backlog=4096)


def port_of(server: asyncio.Server) -> int:
    """Where it listens."""
    port: int = server.sockets[0].getsockname()[1]
    return port
