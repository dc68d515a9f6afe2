"""An engine that has stopped getting on: nobody is left waiting for it, and what has begun may go on."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.api import stall
from server.api.service import ApiLimits
from tests.api.conftest import ANSWER, BASE, Served, serve
from tests.api.test_adapters import until

LONG_S = 1e6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stall, "CHECK_S", 0.01)


def assert_refused(answer) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "engine_stalled"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-request-id"]


def ask(http, **fields) -> asyncio.Task:
    return asyncio.create_task(http.post("/v1/completions", json={"model": BASE, "prompt": "x", **fields}))


@pytest.mark.parametrize("how", ["silent_s", "stuck_s"])
async def test_new_generations_are_refused_until_it_gets_on(served, how):
    setattr(served.engine, how, LONG_S)
    async with served.http() as http:
        for stream in (False, True):
            assert_refused(await ask(http, stream=stream))
        chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
        assert_refused(await http.post("/v1/chat/completions", json=chat))
        assert (await http.get("/v1/models")).status_code == 200
        assert served.engine.added == []
        setattr(served.engine, how, 0.5)
        assert (await ask(http)).status_code == 200
    served.assert_quiet()


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
@pytest.mark.parametrize("model", [BASE, "support-fr"])
async def test_what_waits_for_its_first_event_is_ended(served, fields, model):
    for name in ("", "support-fr"):
        served.answer("", adapter=name, finish_reason="length", hangs=True)
    async with served.http() as http:
        asking = ask(http, model=model, **fields)
        await until(lambda: len(served.engine.added) == fields.get("n", 1))
        await asyncio.sleep(0.05)
        assert not asking.done()
        served.engine.silent_s = LONG_S
        assert_refused(await asyncio.wait_for(asking, 5))
    assert len(served.engine.aborted) == fields.get("n", 1)
    assert served.state.door.num_inside == served.state.door.num_coming == 0
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_has_begun_goes_on(served, stream):
    script = served.answer(ANSWER, delay_s=0.01)
    async with served.http() as http:
        asking = ask(http, stream=stream, max_tokens=100)
        await until(lambda: served.state.door.num_inside and served.engine.added)
        await asyncio.sleep(0.03)
        served.engine.silent_s = LONG_S
        answer = await asyncio.wait_for(asking, 10)
    assert answer.status_code == 200 and len(script.token_ids) > 10
    assert served.engine.aborted == []
    if stream:
        assert answer.text.rstrip().endswith("[DONE]") and "error" not in answer.text
    else:
        assert answer.json()["choices"][0]["text"] == ANSWER
    served.assert_quiet()


async def held(tokenizer, adapters_dir, silent_s: float, max_wait_s: float) -> bool:
    """Whether a request just sent is let wait on, under a stall time-out that is not over."""
    limits = ApiLimits(max_queue_wait_s=max_wait_s - stall.QUEUE_MARGIN_S, engine_stall_timeout_s=LONG_S)
    server: Served
    async with serve(tokenizer, adapters_dir, limits=limits) as server, server.http() as http:
        server.answer("", finish_reason="length", hangs=True)
        asking = ask(http)
        await until(lambda: server.engine.added)
        server.engine.silent_s = silent_s
        done, _ = await asyncio.wait({asking}, timeout=0.2)
        if not done:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return True
        assert_refused(asking.result())
        return False


async def test_a_long_stall_timeout_does_not_hold_what_waits_beyond_the_queue_wait(tokenizer, adapters_dir):
    """Where the engine speaks it ends them itself, or works on them."""
    assert not await held(tokenizer, adapters_dir, silent_s=0.01, max_wait_s=0)
    assert await held(tokenizer, adapters_dir, silent_s=0.0, max_wait_s=0)
    assert await held(tokenizer, adapters_dir, silent_s=1000, max_wait_s=500)


async def test_a_500_says_that_the_connection_closes(served, monkeypatch):
    async def broken(name):
        raise RuntimeError("a defect")

    monkeypatch.setattr(served.state.catalog, "resolve", broken)
    async with served.http() as http:
        answer = await ask(http, model="support-fr")
    assert answer.status_code == 500 and answer.headers["connection"] == "close"
    assert json.loads(answer.content)["error"]["code"] == "internal_error"
