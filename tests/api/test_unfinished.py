"""Requests that don't finish: bodies that stop coming, heads that don't end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import pytest

from server.api import body as body_module
from server.api.protocol import MAX_HEAD_BYTES
from server.api.service import ApiLimits
from tests.api.conftest import ANSWER, BASE, Served, serve
from tests.api.test_adapters import until

GOOD = json.dumps({"model": BASE, "prompt": "x"}).encode()
WITHIN_S = 5


async def connect(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = served.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


def head(path: str = "/v1/completions", *, length: int | None = len(GOOD), more: bytes = b"") -> bytes:
    framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%b\r\n%b\r\n" % (
        path.encode(),
        framing,
        more,
    )


def of_size(num_bytes: int) -> bytes:
    """A head of so many bytes."""
    pad = num_bytes - len(head(more=b"x-pad: \r\n"))
    return head(more=b"x-pad: %b\r\n" % (b"a" * pad))


async def response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict]:
    async with asyncio.timeout(WITHIN_S):
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(status.split()[1]), headers, json.loads(await reader.readexactly(int(headers["content-length"])))


async def assert_closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), WITHIN_S) == b""


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("length", [500, None])
async def test_draining_cuts_a_body_that_has_not_arrived(tokenizer, adapters_dir, path, length, caplog):
    caplog.set_level(logging.INFO, "multilora.access")
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(has_access_log=True)) as server:
        reader, writer = await connect(server)
        writer.write(
            head(path, length=length, more=b"x-request-id: mine\r\n") + (b"" if length is None else b'{"model":')
        )
        await until(lambda: server.state.door._bounds)
        server.state.door.close()
        status, headers, error = await response(reader)
        assert (status, error["error"]["code"]) == (503, "overloaded")
        assert headers["x-request-id"] == "mine" and headers["connection"] == "close"
        assert int(headers["retry-after"]) > 0
        await assert_closed(reader)
        await asyncio.wait_for(server.state.door.until_empty(), WITHIN_S)
        writer.close()
        (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "multilora.access"]
        assert line["status"] == 503 and line["id"] == "mine"


async def test_a_body_that_stops_coming(served, monkeypatch):
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.3)
    reader, writer = await connect(served)
    writer.write(head() + GOOD[:9])
    status, headers, error = await response(reader)
    assert (status, error["error"]["code"]) == (408, "request_timeout")
    assert headers["connection"] == "close" and headers["x-request-id"]
    await assert_closed(reader)
    writer.close()
    assert served.engine.added == [] and served.state.door.num_inside == 0


async def test_a_body_that_comes_slowly_is_waited_for(served, monkeypatch):
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.5)
    reader, writer = await connect(served)
    writer.write(head())
    for start in range(0, len(GOOD), 4):
        await asyncio.sleep(0.1)
        writer.write(GOOD[start : start + 4])
    assert (await response(reader))[0] == 200
    writer.close()


@pytest.mark.parametrize("piece", [1 << 20, 1000])
async def test_a_head_up_to_the_bound_and_not_beyond_on_one_connection(served, piece):
    """The count starts anew for each request; a body is none of it."""
    reader, writer = await connect(served)
    large = json.dumps({"model": BASE, "prompt": "x", "user": "u" * 3 * MAX_HEAD_BYTES}).encode()
    requests = [of_size(MAX_HEAD_BYTES) + GOOD, head(length=len(large)) + large, of_size(MAX_HEAD_BYTES - 1) + GOOD]
    for data in requests:
        for start in range(0, len(data), piece):
            writer.write(data[start : start + piece])
            await writer.drain()
        status, _, answer = await response(reader)
        assert status in (200, 400), answer  # 400: `user` may be bounded, which is another matter
    writer.write(of_size(MAX_HEAD_BYTES + 1) + GOOD)
    status, headers, error = await response(reader)
    assert (status, error["error"]["code"]) == (431, "headers_too_large")
    assert str(MAX_HEAD_BYTES) in error["error"]["message"] and headers["connection"] == "close"
    await assert_closed(reader)
    writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * 70_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        b"GET / HTTP/1.1\r\na" + b"a" * 70_000,
        b"GET / HTTP/1.1\r\na: " + b"b" * 2_000_000,
    ],
)
async def test_heads_that_do_not_end(guarded, data):
    reader, writer = await connect(guarded)
    writer.write(data)
    assert (await response(reader))[0] == 431
    await assert_closed(reader)
    writer.close()


async def test_a_head_too_large_after_a_request_under_way(served):
    """The first is answered, and nothing else."""
    served.answer(ANSWER, delay_s=0.02)
    reader, writer = await connect(served)
    writer.write(head() + GOOD)
    await until(lambda: served.engine.added)
    writer.write(of_size(2 * MAX_HEAD_BYTES))
    status, _, answer = await response(reader)
    assert status == 200 and answer["choices"][0]["text"]
    await assert_closed(reader)
    writer.close()
    assert len(served.engine.added) == 1


async def test_trailers_are_bounded_too(served):
    reader, writer = await connect(served)
    writer.write(head(length=None) + b"%x\r\n%b\r\n0\r\n" % (len(GOOD), GOOD) + b"a: " + b"b" * 2 * MAX_HEAD_BYTES)
    await assert_closed(reader)
    writer.close()
    await until(lambda: not served.state.door.num_inside)
    assert served.engine.added == []
