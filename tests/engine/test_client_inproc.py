"""InprocEngine keeps AsyncEngine's promises without a process."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from server.engine.client import AsyncEngine, Engine
from server.engine.inproc import InprocEngine
from server.errors import EngineDead
from tests.engine.scripted_core import Script, ScriptedCore, answer, make_request
from tests.engine.test_client import FOREVER, assert_dead_engine, read, tokens_of, until
from tests.engine.test_transport import REF


@pytest.fixture
async def core():
    return ScriptedCore(Script())


@pytest.fixture
async def engine(core):
    engine = InprocEngine(core)
    yield engine
    await engine.close()


def test_both_engines_are_engines(core):
    engines: list[Engine] = [AsyncEngine(), InprocEngine(core)]  # mypy's part
    members = [name for name in vars(Engine) if not name.startswith("_")]
    assert all(hasattr(type(e), name) for e in engines for name in members)


async def test_many_streams_and_a_slow_reader(engine):
    slow = make_request("slow", max_tokens=50)
    stream = engine.generate(slow)
    outputs = [await anext(stream)]
    requests = [make_request(str(i), [i, 7], max_tokens=1 + i % 9) for i in range(100)]
    results = await asyncio.gather(*(read(engine, request) for request in requests))
    assert [tokens_of(outputs) for outputs in results] == [answer(request) for request in requests]
    await until(lambda: engine.num_open == 0)
    outputs += [output async for output in stream]
    assert tokens_of(outputs) == answer(slow)
    assert len(outputs) < 50


async def test_leaving_aborts_and_an_idle_engine_stops_stepping(engine, core):
    stream = engine.generate(make_request("a", max_tokens=FOREVER))
    await anext(stream)
    await stream.aclose()
    await until(lambda: engine.last_stats.num_running == 0 and engine._driver.done())
    assert core.num_aborted == 1
    steps = core.num_steps
    await asyncio.sleep(0.05)
    assert core.num_steps == steps
    assert tokens_of(await read(engine, make_request("b"))) == answer(make_request("b"))


async def test_a_pending_request_waits_for_its_adapter(engine):
    good, bad = make_request("good", pending="k1"), make_request("bad", pending="k2")
    readings = [asyncio.create_task(read(engine, request)) for request in (good, bad)]
    await asyncio.sleep(0.05)
    engine.adapter_ready("k1", REF)
    engine.adapter_failed("k2", 404, "adapter_not_found", "no such adapter")
    assert tokens_of(await readings[0]) == answer(good)
    assert (await readings[1])[0].error.code == "adapter_not_found"


async def test_the_core_is_called_from_one_thread_that_is_not_the_loops(engine, core):
    threads: set[int] = set()
    step = core.step

    def watched():
        threads.add(threading.get_ident())
        return step()

    core.step = watched
    others = [asyncio.to_thread(time.sleep, 0.001) for _ in range(50)]  # so that the loop's own threads change
    await asyncio.gather(*(read(engine, make_request(str(i), max_tokens=50)) for i in range(20)), *others)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_step_that_raises_is_a_death():
    engine = InprocEngine(ScriptedCore(Script(fail_at_step=3)))
    outputs = await read(engine, make_request("a", max_tokens=FOREVER))
    assert_dead_engine(outputs[-1])
    assert engine.died.is_set()
    assert engine.end_reason == "ValueError: the model gave NaN"
    with pytest.raises(EngineDead):
        engine.generate(make_request("b"))
    await engine.close()


async def test_close_aborts_what_is_open_and_closes_the_core(engine, core):
    reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
    await until(lambda: engine.last_stats.num_running == 1)
    await engine.close()
    assert (await reading)[-1].finish_reason == "abort"
    assert core.is_closed
    with pytest.raises(EngineDead):
        engine.generate(make_request("b"))


async def test_close_finds_a_leak():
    engine = InprocEngine(ScriptedCore(Script(is_leaky=True)))
    with pytest.raises(AssertionError, match="leaked"):
        await engine.close()


def test_it_lives_across_event_loops(core):
    engine = InprocEngine(core)
    for i in range(3):
        request = make_request(str(i))
        assert tokens_of(asyncio.run(read(engine, request))) == answer(request)
    asyncio.run(engine.close())


async def test_a_step_does_not_hold_up_the_event_loop():
    engine = InprocEngine(ScriptedCore(Script(step_s=0.5)))
    reading = asyncio.create_task(read(engine, make_request("a", max_tokens=2)))
    longest_s, last_s = 0.0, time.monotonic()
    while not reading.done():
        await asyncio.sleep(0.005)
        now_s = time.monotonic()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    assert longest_s < 0.4
    await engine.close()
