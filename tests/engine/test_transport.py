"""The sockets: what goes in comes out, in order, bounded, and nothing but this protocol gets through."""

from __future__ import annotations

import asyncio
import pickle
import stat
import tempfile
import threading
import time
import typing
from pathlib import Path

import msgspec
import pytest
import zmq

from adapters_store.ref import AdapterRef
from server.engine.messages import (
    Abort,
    AdapterFailed,
    AdapterReady,
    DropAdapter,
    EngineFailed,
    EngineReady,
    FromEngine,
    PinAdapter,
    PrefetchAdapter,
    RequestError,
    RequestOutput,
    SetWeight,
    Shutdown,
    StepOutputs,
    StepStats,
    ToEngine,
)
from server.engine.transport import MAX_QUEUED, MAX_RECEIVED, ClientTransport, Endpoints, EngineTransport
from server.errors import ConfigError
from tests.engine.scripted_core import make_request

REF = AdapterRef(
    name="support-fr",
    version="v",
    digest="d",
    image_key="k",
    image_path="/images/k",
    data_offset=4096,
    data_bytes=1 << 33,
    checksum="c",
    max_rank=16,
    sites=("0.q_proj", "1.q_proj"),
)
TO_ENGINE: list[ToEngine] = [
    make_request("r1", [1, 2, 3], pending="key"),
    AdapterReady("key", REF),
    AdapterFailed("key", 404, "adapter_not_found", "no such adapter"),
    Abort(["r1", "r2"]),
    PinAdapter(REF),
    DropAdapter("image"),
    PrefetchAdapter(REF, "host"),
    SetWeight("support-fr", 0.5),
    Shutdown(),
]
FROM_ENGINE: list[FromEngine] = [
    EngineReady(
        manifest_path="m",
        max_model_len=8192,
        vocab_size=49152,
        eos_token_ids=(2, 0),
        num_kv_blocks=10,
        block_size=16,
        adapter_bytes=1 << 31,
        weights_bytes=1 << 40,
        facts=(("KV blocks", "10"),),
    ),
    StepOutputs(
        outputs=[
            RequestOutput(request_id="r1", token_ids=[5, 6], num_cached_tokens=3, phases={"host": 0.25}),
            RequestOutput(request_id="r2", finish_reason="error", error=RequestError(503, "x", "y", 7)),
        ],
        stats=StepStats(num_running=2, running_adapters=("support-fr",), kv_usage=0.5),
    ),
    EngineFailed("out of memory"),
]


@pytest.fixture
async def client():
    transport = ClientTransport()
    yield transport
    transport.close()


@pytest.fixture
async def engine(client):
    transport = EngineTransport(client.endpoints)
    yield transport
    transport.close()


async def receive(engine: EngineTransport, count: int) -> list[ToEngine]:
    """`count` messages, or what came of them within 5 s; the client's loop runs meanwhile."""
    messages: list[ToEngine] = []
    deadline_s = time.monotonic() + 5
    while len(messages) < count and time.monotonic() < deadline_s:
        messages += await asyncio.to_thread(engine.receive, 0.1)
    return messages


async def test_every_message_arrives_as_it_was_sent(client, engine):
    assert {type(m) for m in TO_ENGINE} == set(typing.get_args(ToEngine))
    assert {type(m) for m in FROM_ENGINE} == set(typing.get_args(FromEngine))
    for to_engine in TO_ENGINE:
        client.send(to_engine)
    for from_engine in FROM_ENGINE:
        engine.send(from_engine)
    assert await receive(engine, len(TO_ENGINE)) == TO_ENGINE
    assert [await client.receive() for _ in FROM_ENGINE] == FROM_ENGINE


async def test_more_messages_than_the_sockets_hold_wait_in_order_without_blocking(client, engine):
    count = 3 * MAX_QUEUED
    started_s = time.monotonic()
    for i in range(count):
        client.send(Abort([str(i)]))
    assert time.monotonic() - started_s < 2
    received: list[ToEngine] = []
    while len(received) < count:
        batch = engine.receive(0.01)
        assert len(batch) <= MAX_RECEIVED
        received += batch
        await asyncio.sleep(0)  # the client's loop passes on what waited
    assert received == [Abort([str(i)]) for i in range(count)]


async def test_the_engine_waits_for_a_server_that_reads_nothing(client):
    messages = [EngineFailed(f"{i} {'x' * 4096}") for i in range(3 * MAX_QUEUED)]
    sent = []

    def send_all():
        engine = EngineTransport(client.endpoints)
        for message in messages:
            engine.send(message)
            sent.append(message)
        engine.close()

    thread = threading.Thread(target=send_all, daemon=True)
    thread.start()
    await asyncio.sleep(0.3)
    assert MAX_QUEUED <= len(sent) < len(messages), "the queue towards the API has no bound"
    assert [await client.receive() for _ in messages] == messages
    thread.join(5)
    assert not thread.is_alive()


async def test_receive_waits_no_longer_than_asked(engine):
    started_s = time.monotonic()
    assert engine.receive(0.05) == []
    assert 0.04 < time.monotonic() - started_s < 1
    assert engine.receive(0.0) == []


async def test_only_this_user_reaches_the_sockets_and_nothing_stays_on_disk(client, engine):
    path = Path(client.endpoints.to_engine.removeprefix("ipc://"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    client.send(Abort(["before"]))
    assert await receive(engine, 1) == [Abort(["before"])]
    client.seal()
    assert not path.parent.exists()
    client.send(Abort(["after"]))
    engine.send(EngineFailed("after"))
    assert await receive(engine, 1) == [Abort(["after"])]
    assert await client.receive() == EngineFailed("after")


async def test_a_folder_too_deep_for_a_socket_is_refused_with_what_to_do(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        ClientTransport()
    assert list(deep.iterdir()) == []


class Bomb:
    """Pickled, it touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


async def test_a_pickle_on_the_socket_is_refused_unread(client, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with zmq.Context() as context, tempfile.TemporaryDirectory() as folder:
        to_client, to_engine = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
        to_client.connect(client.endpoints.from_engine)
        to_engine.bind(f"ipc://{folder}/to_engine.sock")
        engine = EngineTransport(Endpoints(f"ipc://{folder}/to_engine.sock", client.endpoints.from_engine))
        to_client.send(bomb)
        to_engine.send(bomb)
        with pytest.raises(msgspec.MsgspecError):
            await client.receive()
        with pytest.raises(msgspec.MsgspecError):
            await receive(engine, 1)
        engine.close()
    assert not (tmp_path / "exploded").exists()
