"""Frames on their own: the bytes of a stream, and what becomes of it when its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from server.api.choices import Part
from server.api.sse import DONE, Frames, SseResponse, guarded
from server.errors import EngineDead
from server.text.output import Delta

ENVELOPE = {"id": 'a"b', "object": "x", "created": 5, "model": "m"}


def chunks(data: bytes) -> list[dict]:
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    if events[-1] == "data: [DONE]":
        events.pop()
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("has_token_ids", [False, True])
def test_every_frame_is_json_with_the_same_envelope(is_chat, has_usage, has_token_ids):
    frames = Frames(ENVELOPE, is_chat=is_chat, has_usage=has_usage, has_token_ids=has_token_ids)
    text = 'quote " back \\ new\nline\x00 🙂 \x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'
    deltas = [Delta(text, [3]), Delta("", [4]), Delta("", [], "stop", "END")]
    data = frames.start(0, [1, 2]) + b"".join(frames.part(Part(0, delta)) for delta in deltas)
    data += (frames.usage({"total_tokens": 9}) if has_usage else b"") + DONE
    assert data.endswith(DONE)
    assert data.decode().splitlines() == data.decode().split("\n")[:-1], "no frame is torn at another line end"
    got = chunks(data)
    for chunk in got:
        assert {key: chunk[key] for key in ENVELOPE} == ENVELOPE
    choices = [choice for chunk in got for choice in chunk["choices"]]
    said = [choice["delta"].get("content", "") if is_chat else choice["text"] for choice in choices]
    assert "".join(said) == text
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "END")
    assert [chunk.get("usage", "absent") for chunk in got] == (
        [None] * (len(got) - 1) + [{"total_tokens": 9}] if has_usage else ["absent"] * len(got)
    )
    token_ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    assert token_ids == ([3, 4] if has_token_ids else [])
    prompt_ids = [part["prompt_token_ids"] for part in [*got, *choices] if "prompt_token_ids" in part]
    assert prompt_ids == ([[1, 2]] if has_token_ids else [])


async def test_a_stream_that_is_stuck_in_sending_is_closed_with_its_client():
    """At once, and not when the garbage collector comes by: closing it is what aborts the request."""
    closed = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"frame"
        finally:
            closed.append(True)

    frames = endless()  # a reference of our own keeps the collector away
    sent = []

    async def send(message) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()  # a full socket

    async def receive() -> dict:
        while len(sent) < 3:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    await SseResponse(frames, {})({"type": "http"}, receive, send)
    assert closed == [True]
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 2


async def test_a_connection_that_breaks_in_sending():
    """Servers of the newer protocol raise OSError."""
    closed = []

    async def frames() -> AsyncGenerator[bytes, None]:
        try:
            yield b"frame"
            yield b"frame"
        finally:
            closed.append(True)

    async def send(message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    async def receive() -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    await SseResponse(frames(), {})({"type": "http"}, receive, send)
    assert closed == [True]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(EngineDead("It stopped."), "engine_dead", "It stopped."), (KeyError("secret"), "internal_error", "failed")],
)
async def test_an_error_becomes_the_last_event(error, code, words):
    async def frames() -> AsyncGenerator[bytes, None]:
        yield b"data: {}\n\n"
        raise error

    data = b"".join([frame async for frame in guarded(frames())])
    assert data.endswith(DONE)
    told = chunks(data)[-1]["error"]
    assert told["code"] == code
    assert words in told["message"]
    assert b"secret" not in data
