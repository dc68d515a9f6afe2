"""Each process killed at a random moment under load: every request ends, nothing is left, a restart goes on.

MULTILORA_KILL_ROUNDS=50 runs each as many times, with other moments.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time

import httpx
import pytest

from tests.e2e.tiny_server import END_S, Load, TinyServer, World, tiny_server, until_gone

ROUNDS = range(int(os.environ.get("MULTILORA_KILL_ROUNDS", "1")))
NUM_CLIENTS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """All adapters compiled, so that no server after this one has anything to compile."""
    world = World.make(tmp_path_factory.mktemp("kill"), num_adapters=4)
    with tiny_server(world) as server:
        ask_all(server, world)
        assert server.metric("multilora_adapter_compiles_total") == world.num_adapters
    return world


def ask_all(server: TinyServer, world: World) -> None:
    """Each model answers."""
    for name in world.names:
        body = {"model": name, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2, answer.text


async def killed_under_load(server: TinyServer, world: World, what: str, seed: int) -> Load:
    """The load's ends after `what` was killed at a random moment."""
    load = Load(server, world.names, seed)
    load.start(NUM_CLIENTS)
    await load.until_done(NUM_CLIENTS // 2)
    await asyncio.sleep(random.Random(seed).random() * 0.5)
    server.kill(what)
    await asyncio.sleep(0.5)
    await load.stop()
    return load


@pytest.mark.parametrize("seed", ROUNDS)
def test_the_engine_is_killed(world, seed):
    """Open streams end with an error event, new requests get 503, and the server exits non-zero."""
    with tiny_server(world) as server:
        pids = [server.pid(what) for what in ("engine", "worker")]
        load = asyncio.run(killed_under_load(server, world, "engine", seed))
        assert set(load.ends) == {"done", "error:engine_dead", "503:engine_dead"}, load.ends
        assert load.ends.total() == load.num_begun
        health = httpx.get(f"{server.url}/health", timeout=5)
        assert (health.status_code, health.json()["status"]) == (503, "engine_dead")
        assert server.exit_code == 1
        until_gone(pids)
        lines = [line for line in server.lines() if line["route"] == "/v1/completions"]
        assert len(lines) == load.num_begun, "each request has its line"
        by_end = [line["finish_reason"] for line in lines if line["status"] == 200]
        assert by_end.count("length") == load.ends["done"] and by_end.count("error") == load.ends["error:engine_dead"]
        assert len(by_end) == load.ends["done"] + load.ends["error:engine_dead"]


@pytest.mark.parametrize("seed", ROUNDS)
def test_the_api_process_is_killed(world, seed):
    """Nothing of it survives: neither processes nor what a restart would have to do again."""
    with tiny_server(world) as server:
        pids = [server.pid(what) for what in ("engine", "worker")]
        load = asyncio.run(killed_under_load(server, world, "api", 1000 + seed))
        assert set(load.ends) == {"done", "lost"}, load.ends
        assert load.ends["lost"] == NUM_CLIENTS and load.ends.total() == load.num_begun
        assert server.exit_code == -signal.SIGKILL
        until_gone(pids)
    serves_again(world)


def serves_again(world: World) -> None:
    """A restart answers for every model, compiles nothing, and ends with 0 when asked to."""
    with tiny_server(world) as server:
        ask_all(server, world)
        assert server.metric("multilora_adapter_compiles_total") == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code == 0


def test_the_worker_is_killed(world):
    """Requests of adapters that are there go on; one that was being compiled fails alone or is not touched."""
    with tiny_server(world) as server:
        for seed in ROUNDS:
            asyncio.run(_kill_the_worker(server, world, seed))
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code == 0


async def _kill_the_worker(server: TinyServer, world: World, seed: int) -> None:
    cold = [f"cold-{seed}-{index}" for index in range(4)]
    for index, name in enumerate(cold):
        world.add_adapter(name, seed=10_000 * (seed + 1) + index)
    first = server.pid("worker")
    load = Load(server, world.names, 2000 + seed)
    load.start(NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

        def ask(name: str) -> asyncio.Task[httpx.Response]:
            body = {"model": name, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
            return asyncio.create_task(http.post("/v1/completions", json=body))

        os.kill(first, signal.SIGSTOP)  # so that the first is certainly in its hands when it dies
        asks = [ask(name) for name in cold]
        while server.metric("vllm:num_requests_waiting") < len(cold):
            await asyncio.sleep(0.02)
        await asyncio.sleep(random.Random(seed).random() * 0.2)
        os.kill(first, signal.SIGKILL)
        answers = await asyncio.gather(*asks)
        codes = [answer.status_code if answer.is_success else answer.json()["error"]["code"] for answer in answers]
        assert sorted(map(str, codes)) == ["200", "200", "200", "adapter_unavailable"], "that one adapter fails"
        assert server.pid("worker") != first
        assert [(await ask(name)).status_code for name in cold] == [200] * len(cold)
    await load.stop()
    assert set(load.ends) == {"done"} and load.ends.total() == load.num_begun
    until_gone([first])


def test_sigterm_lets_open_requests_end(world):
    """Streams that are open go on to their end; what comes meanwhile gets 503; then it exits with 0."""
    with tiny_server(world, "--shutdown-timeout", "60") as server:
        asyncio.run(_drain(server, world))
        assert server.exit_code == 0


async def _drain(server: TinyServer, world: World) -> None:
    pids = [server.pid(what) for what in ("engine", "worker")]
    load = Load(server, world.names, 7)
    load.start(NUM_CLIENTS)
    await load.until_done(NUM_CLIENTS // 2)
    num_done = load.ends["done"]
    server.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        while not load.ends["503:overloaded"]:
            await asyncio.sleep(0.002)
    await load.stop()
    # a client that asks once more at the very end finds nobody there
    assert set(load.ends) - {"lost"} == {"done", "503:overloaded"} and load.ends["done"] > num_done, load.ends
    lines = [line for line in server.lines() if line["status"] == 200 and line["route"] == "/v1/completions"]
    assert {line["finish_reason"] for line in lines} == {"length"}, "every request that was let in has ended well"
    until_gone(pids)


def test_an_engine_that_hangs(world):
    """Health turns red and requests get 503; green again when it goes on; SIGTERM with a request in it: status 0."""
    with tiny_server(world, "--shutdown-timeout", "0.5", "--engine-stall-timeout", "1.5") as server:
        pid = server.pid("engine")
        os.kill(pid, signal.SIGSTOP)
        assert until_health(server, 503) == "engine_stalled"
        ask = {"model": "base", "prompt": "x", "max_tokens": 2}
        refused = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=10)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_stalled"
        os.kill(pid, signal.SIGCONT)
        assert until_health(server, 200) == "ok"
        os.kill(pid, signal.SIGSTOP)
        body = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.Client(timeout=30) as http:
            request = http.build_request("POST", f"{server.url}/v1/completions", json=body)
            answer = asyncio.run(_send_and_stop(http, request, server))
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_stalled"
        assert server.exit_code == 0
        until_gone([pid])


def until_health(server: TinyServer, status: int) -> str:
    """What /health says once it answers with `status`."""
    deadline = time.monotonic() + 30
    while (answer := httpx.get(f"{server.url}/health", timeout=5)).status_code != status:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer.json()["status"]


async def _send_and_stop(http: httpx.Client, request: httpx.Request, server: TinyServer) -> httpx.Response:
    asking = asyncio.create_task(asyncio.to_thread(http.send, request))
    await asyncio.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    return await asking


def test_sigterm_does_not_wait_for_a_body(world):
    """A request of which half has come is told so at once, and the process ends long before the deadline."""
    with tiny_server(world, "--shutdown-timeout", "3600") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=END_S) as sock:
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            sock.sendall(f'{head}content-length: 500\r\n\r\n{{"model":'.encode())
            assert until_health(server, 200) == "ok"  # so that it has been taken
            server.process.send_signal(signal.SIGTERM)
            answer = b""
            while piece := sock.recv(4096):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 503 ") and b'"overloaded"' in answer and b"connection: close" in answer
        assert server.exit_code == 0
        assert [line["status"] for line in server.lines() if line["route"] == "/v1/completions"] == [503]


def test_a_second_signal_ends_it_at_once(world):
    with tiny_server(world, "--shutdown-timeout", "3600") as server:
        pids = [server.pid(what) for what in ("engine", "worker")]
        os.kill(pids[0], signal.SIGSTOP)
        body = {"model": "base", "prompt": "x", "max_tokens": 100, "stream": True}
        ended = asyncio.run(_twice(server, body))
        assert isinstance(ended, httpx.TransportError)
        assert server.exit_code == 128 + signal.SIGTERM
        until_gone(pids)


async def _twice(server: TinyServer, body: dict) -> object:
    async with httpx.AsyncClient(timeout=30) as http:
        asking = asyncio.create_task(http.post(f"{server.url}/v1/completions", json=body))
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        while (await http.get(f"{server.url}/ready")).json()["status"] != "draining":
            await asyncio.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        (ended,) = await asyncio.gather(asking, return_exceptions=True)
        return ended
