"""A client that goes away: its request is aborted at once, whatever it was waiting for."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.api.conftest import ANSWER, BASE, Served
from tests.api.test_adapters import until

WITHIN_S = 0.5


async def send(served: Served, body: dict) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection with the request written to it."""
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    await writer.drain()
    return reader, writer


async def gone(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def assert_aborted(served: Served) -> None:
    await until(lambda: served.engine.aborted, WITHIN_S)
    assert served.engine.aborted == [served.engine.added[0].request_id]
    await until(lambda: not +served.store.leases, WITHIN_S)
    served.assert_quiet()


@pytest.mark.parametrize("model", [BASE, "support-fr"])
async def test_in_mid_stream(served, model):
    served.answer(ANSWER * 20, delay_s=0.01)
    reader, writer = await send(served, {"model": model, "prompt": "x", "stream": True, "max_tokens": 100})
    await reader.readuntil(b"data: ")
    await gone(writer)
    await assert_aborted(served)


@pytest.mark.parametrize("stream", [False, True])
async def test_between_two_tokens(served, stream):
    served.answer("the quick", hangs=True)
    _, writer = await send(served, {"model": BASE, "prompt": "x", "stream": stream})
    await until(lambda: served.engine.added)
    await asyncio.sleep(0.05)
    assert served.engine.aborted == []
    await gone(writer)
    await assert_aborted(served)


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(served, stream):
    served.answer("", hangs=True)
    _, writer = await send(served, {"model": BASE, "prompt": "x", "stream": stream})
    await until(lambda: served.engine.added)
    await gone(writer)
    await assert_aborted(served)


@pytest.mark.parametrize("stream", [False, True])
async def test_while_the_adapter_is_fetched(served, stream):
    gate = served.store.gates["support-fr"] = asyncio.Event()
    _, writer = await send(served, {"model": "support-fr", "prompt": "x", "stream": stream})
    await until(lambda: served.engine.added)
    await gone(writer)
    await assert_aborted(served)
    # the fetch goes on, and its end finds nothing to lease
    gate.set()
    await until(lambda: served.engine.ready_keys)
    assert served.store.leased == []


async def test_a_reader_that_stalls_is_aborted_when_it_leaves(served):
    """The server is stuck sending, not waiting for tokens."""
    served.answer(ANSWER * 4000, delay_s=0)
    served.engine.ready = type(served.engine.ready)(**{**as_dict(served.engine.ready), "max_model_len": 10**6})
    _, writer = await send(served, {"model": BASE, "prompt": "x", "stream": True, "max_tokens": 900_000})
    writer.transport.pause_reading()
    await until(lambda: served.engine.added)
    await asyncio.sleep(0.3)
    others = await served.client().completions.create(model="support-fr", prompt="x", max_tokens=2)
    assert others.choices[0].text
    writer.transport.abort()
    await until(lambda: served.engine.aborted, 2)


def as_dict(struct) -> dict:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


async def test_a_client_that_stays_is_not_aborted(served):
    served.answer(ANSWER, delay_s=0.005)
    client = served.client()
    for stream in (False, True):
        answer = await client.completions.create(model=BASE, prompt="x", max_tokens=100, stream=stream)
        if stream:
            async for _ in answer:
                pass
    assert served.engine.aborted == []
    served.assert_quiet()


async def test_leaving_the_clients_stream_early_aborts(served):
    served.answer(ANSWER, delay_s=0.005, hangs=True)
    stream = await served.client().completions.create(model=BASE, prompt="x", max_tokens=100, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await assert_aborted(served)
