"""A client that goes away: its request is aborted at once, whatever it was waiting for."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.conftest import ANSWER, BASE, Served
from tests.api.test_adapters import until

WITHIN_S = 0.5


async def send(
    served: Served, body: dict, *, has_small_buffers: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection with the request written to it. Small segments keep the server's buffers small too."""
    host, port = served.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if has_small_buffers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 24)
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
    served.answer("", finish_reason="length", hangs=True)
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


async def num_ended(served: Served) -> dict[str, float]:
    """How many requests ended, by reason, as /metrics tells."""
    async with served.http() as http:
        text = (await http.get("/metrics")).text
    return {
        sample.labels["finished_reason"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:request_success_total" and sample.value
    }


@pytest.mark.parametrize("resets", [False, True])
async def test_a_reader_that_stalls_and_leaves_is_an_abort_though_the_engine_had_ended_it(served, resets):
    """It counts what the client took, not whether the engine was faster: with the last part untaken, an abort."""
    num_clients = 4
    served.answer(ANSWER * 200, delay_s=0, tokens_per_event=100)
    served.engine.ready = type(served.engine.ready)(**{**as_dict(served.engine.ready), "max_model_len": 10**6})
    body = {"model": BASE, "prompt": "x", "stream": True, "max_tokens": 100_000, "logprobs": 20}
    writers = []
    for _ in range(num_clients):
        _, writer = await send(served, body, has_small_buffers=True)
        writer.transport.pause_reading()
        writers.append(writer)
    await until(lambda: len(served.engine.ended) == num_clients, 20)
    assert await num_ended(served) == {}
    for writer in writers:
        writer.transport.abort() if resets else writer.close()
    await until(lambda: not +served.store.leases)
    until_s = asyncio.get_running_loop().time() + 10
    while sum((await num_ended(served)).values()) < num_clients and asyncio.get_running_loop().time() < until_s:
        await asyncio.sleep(0.01)
    assert await num_ended(served) == {"abort": num_clients}
    assert served.engine.aborted == []  # there was nothing left to abort


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


async def test_a_reader_that_stalls_gets_in_few_frames_what_came_meanwhile_and_every_token_counts(served):
    """Nothing more is written to a connection whose buffer is full: what comes is merged until it has room again."""
    served.answer(ANSWER * 1000, delay_s=0)
    served.engine.ready = type(served.engine.ready)(**{**as_dict(served.engine.ready), "max_model_len": 10**6})
    body = {"model": BASE, "prompt": "x", "stream": True, "max_tokens": 900_000, "return_token_ids": True}
    reader, writer = await send(served, body, has_small_buffers=True)
    writer.transport.pause_reading()
    await until(lambda: served.engine.ended, 20)
    writer.transport.resume_reading()
    data = await asyncio.wait_for(reader.readuntil(b"data: [DONE]"), 20)
    lines = [line for line in data.splitlines() if line.startswith(b"data: {")]
    choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
    token_ids = [token_id for choice in choices for token_id in choice.get("token_ids", ())]
    assert token_ids == served.scripts[""].token_ids
    assert len(lines) < len(token_ids) * 0.9
    writer.close()
    async with served.http() as http:
        text = (await http.get("/metrics")).text
    (told,) = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total{")]
    assert float(told.rsplit(" ", 1)[1]) == len(token_ids)
