"""AsyncEngine over a real engine process with a scripted core: streams, aborts, deaths, ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
import uvloop

from server.engine.client import AsyncEngine, EngineStartError
from server.engine.messages import AddRequest, EngineFailed, RequestOutput
from server.errors import ConfigError, EngineDead
from tests.engine.scripted_core import CORE, Script, answer, make_request, serving, token
from tests.engine.test_transport import REF

FOREVER = 10**6  # tokens


async def read(engine: AsyncEngine, request: AddRequest) -> list[RequestOutput]:
    return [output async for output in engine.generate(request)]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def until(predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that the engine's messages bring about."""
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline_s, "it did not happen"
        await asyncio.sleep(0.005)


def assert_dead_engine(last: RequestOutput) -> None:
    assert last.finish_reason == "error"
    assert last.error is not None
    assert (last.error.status, last.error.code) == (503, "engine_dead")


async def test_many_concurrent_streams_each_get_their_own_answer_in_order():
    async with serving() as engine:
        assert engine.is_alive
        assert engine.ready.max_model_len == 1024
        requests = [make_request(str(i), [i, 3 * i + 1], max_tokens=1 + i % 40) for i in range(500)]
        results = await asyncio.gather(*(read(engine, request) for request in requests))
        for request, outputs in zip(requests, results, strict=True):
            assert tokens_of(outputs) == answer(request)
            assert [o.finish_reason for o in outputs] == [None] * (len(outputs) - 1) + ["length"]
            assert outputs[0].num_cached_tokens == 2
            assert outputs[0].phases == {"queue": 0.5}
        assert engine.num_open == 0
        await until(lambda: engine.last_stats.num_running == 0)
        await engine.close()
        assert engine.exit_code == 0


def test_it_works_on_uvloop_too():
    async def scenario() -> None:
        async with serving() as engine:
            requests = [make_request(str(i)) for i in range(50)]
            results = await asyncio.gather(*(read(engine, request) for request in requests))
            assert [tokens_of(outputs) for outputs in results] == [answer(request) for request in requests]
            os.kill(engine.pid, signal.SIGKILL)
            await asyncio.wait_for(engine.died.wait(), 5)
        assert engine.exit_code == -signal.SIGKILL

    uvloop.run(scenario())


async def test_a_slow_reader_gets_merged_outputs_and_delays_nobody():
    async with serving() as engine:
        slow, fast = make_request("slow", max_tokens=500), make_request("fast", max_tokens=500)
        stream = engine.generate(slow)
        outputs = [await anext(stream)]
        assert tokens_of(await read(engine, fast)) == answer(fast)
        await until(lambda: engine.num_open == 0)
        outputs += [output async for output in stream]
        assert tokens_of(outputs) == answer(slow)
        assert len(outputs) == 2, "what came while the reader was away is one output"
        assert outputs[0].num_cached_tokens is not None
        assert outputs[1].num_cached_tokens is None


async def test_a_reader_that_leaves_ends_its_request_in_the_core():
    async with serving(step_s=0.001) as engine:
        closed = engine.generate(make_request("closed", max_tokens=FOREVER))
        await anext(closed)
        cancelled = asyncio.create_task(read(engine, make_request("cancelled", max_tokens=FOREVER)))
        await until(lambda: engine.last_stats.num_running == 2)
        await closed.aclose()
        await until(lambda: engine.last_stats.num_running == 1)
        cancelled.cancel()
        await until(lambda: engine.last_stats.num_running == 0)
        assert engine.last_stats.preemptions == 2  # the script's count of aborts


async def test_abort_ends_the_stream_with_its_terminal_output():
    async with serving(step_s=0.001) as engine:
        reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
        await until(lambda: engine.last_stats.num_running == 1)
        engine.abort("a")
        engine.abort("unknown")
        outputs = await reading
        assert outputs[-1].finish_reason == "abort"
        assert [o.finish_reason for o in outputs].count(None) == len(outputs) - 1


async def test_a_pending_request_waits_for_its_adapter_or_ends_with_its_error():
    async with serving() as engine:
        good, bad = make_request("good", pending="k1"), make_request("bad", pending="k2")
        readings = [asyncio.create_task(read(engine, request)) for request in (good, bad)]
        await until(lambda: engine.last_stats.num_waiting == 2)
        engine.adapter_ready("k1", REF)
        engine.adapter_failed("k2", 422, "adapter_invalid", "no tensor 0.q_proj")
        assert tokens_of(await readings[0]) == answer(good)
        [output] = await readings[1]
        assert output.finish_reason == "error"
        assert output.error is not None
        assert (output.error.status, output.error.code) == (422, "adapter_invalid")


@pytest.mark.parametrize("seed", range(4))
async def test_killed_at_a_random_moment_each_open_stream_ends_exactly_once(seed):
    rng = random.Random(seed)
    async with serving(step_s=0.001) as engine:
        readings = [
            asyncio.create_task(read(engine, make_request(f"{seed}-{i}", max_tokens=rng.choice([5, FOREVER]))))
            for i in range(200)
        ]
        await asyncio.sleep(rng.random() * 0.3)
        is_open = [not reading.done() for reading in readings]
        os.kill(engine.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*readings), 5)
        assert any(is_open)
        for outputs in results:
            assert [o.finish_reason is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]
            if outputs[-1].finish_reason != "length":
                assert_dead_engine(outputs[-1])
        assert sum(outputs[-1].finish_reason == "error" for outputs in results) > 0
        assert engine.died.is_set()
        assert not engine.is_alive
        assert engine.exit_code == -signal.SIGKILL
        assert "SIGKILL" in (engine.end_reason or "")
        with pytest.raises(EngineDead):
            engine.generate(make_request("late"))
        engine.abort("late")
        engine.adapter_ready("key", REF)
        engine.adapter_failed("key", 404, "x", "y")


async def test_a_stream_opened_but_not_yet_read_when_the_engine_dies_raises():
    async with serving() as engine:
        stream = engine.generate(make_request("a"))
        os.kill(engine.pid, signal.SIGKILL)
        await engine.died.wait()
        with pytest.raises(EngineDead):
            await anext(stream)


async def test_a_step_that_raises_is_a_death_with_the_engines_own_message():
    async with serving(fail_at_step=5) as engine:
        outputs = await read(engine, make_request("a", max_tokens=FOREVER))
        assert_dead_engine(outputs[-1])
        assert len(tokens_of(outputs)) == 4, "tokens of the steps before it are kept"
        assert "NaN" not in outputs[-1].error.message, "the cause is for the log, not for clients"
        assert engine.died.is_set()
        assert engine.end_reason == "ValueError: the model gave NaN"
        await until(lambda: engine.exit_code is not None)
        assert engine.exit_code == 1


async def test_a_message_that_cannot_be_read_is_a_death():
    async with serving(step_s=0.001) as engine:
        reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
        await until(lambda: engine.last_stats.num_running == 1)
        engine._transport._decoder = msgspec.msgpack.Decoder(EngineFailed)  # as if of another version
        assert_dead_engine((await reading)[-1])
        await until(lambda: engine.exit_code == -signal.SIGKILL)
        assert engine.died.is_set()


@pytest.mark.parametrize(
    ("core", "script", "message"),
    [
        (CORE, Script(start_error="no memory"), "RuntimeError: no memory"),
        (CORE, Script(start_refusal="--model: no such folder"), "^--model: no such folder$"),
        ("server.engine.nothing:build", Script(), "No module named 'server.engine.nothing'"),
    ],
)
async def test_a_failed_start_raises_with_the_engines_own_message(core, script, message):
    engine = AsyncEngine(core, start_timeout_s=20)
    with pytest.raises(EngineStartError, match=message) as caught:
        await engine.start(script)
    assert isinstance(caught.value, ConfigError)
    assert engine.exit_code is not None
    assert not engine.is_alive
    with pytest.raises(EngineDead):
        engine.generate(make_request("a"))


async def test_an_engine_killed_while_it_starts_raises_with_how_it_ended():
    engine = AsyncEngine(CORE)
    starting = asyncio.create_task(engine.start(Script(start_s=60)))
    await until(lambda: engine.pid is not None)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineStartError, match="SIGKILL"):
        await starting


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_a_start_given_up_leaves_no_process(how):
    engine = AsyncEngine(CORE, start_timeout_s=0.5 if how == "timeout" else 60)
    starting = asyncio.create_task(engine.start(Script(start_s=60)))
    await until(lambda: engine.pid is not None)
    if how == "cancel":
        starting.cancel()
    with pytest.raises(EngineStartError if how == "timeout" else asyncio.CancelledError):
        await starting
    assert engine.exit_code == -signal.SIGKILL


async def test_close_ends_open_streams_and_the_process_exits_zero():
    async with serving(step_s=0.001) as engine:
        reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
        await until(lambda: engine.last_stats.num_running == 1)
        await asyncio.gather(engine.close(), engine.close())
        assert [o.finish_reason for o in await reading if o.finish_reason] == ["abort"]
        assert engine.exit_code == 0
        assert not engine.died.is_set(), "an end that was asked for is not a death"
        with pytest.raises(EngineDead, match="shutting down"):
            engine.generate(make_request("late"))


async def test_close_kills_an_engine_that_hangs():
    async with serving(hang_at_step=3) as engine:
        reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
        await until(lambda: engine.silent_s > 0.3)
        await engine.close(timeout_s=0.2)
        assert_dead_engine((await reading)[-1])
        assert engine.exit_code == -signal.SIGKILL


async def test_silence_tells_a_stuck_engine_from_an_idle_one():
    async with serving(hang_at_step=3) as engine:
        await asyncio.sleep(1.6)
        assert engine.silent_s < 1.4, "an idle engine says so every second"
        reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
        await until(lambda: engine.silent_s > 1.6)
        assert engine.is_alive
        os.kill(engine.pid, signal.SIGKILL)
        assert_dead_engine((await reading)[-1])


async def test_an_engine_that_speaks_and_does_no_step_is_stuck():
    async with serving(stall_at_step=3) as engine:
        reading = asyncio.create_task(read(engine, make_request("a", max_tokens=FOREVER)))
        await until(lambda: engine.stuck_s > 2.5 and engine.silent_s < 1)  # it still speaks, once a second
        assert engine.last_stats.num_running == 1
        engine.abort("a")
        assert [o.finish_reason for o in await reading if o.finish_reason] == ["abort"]
        await until(lambda: engine.stuck_s == 0)


async def _impatient(engine: AsyncEngine, request: AddRequest, choice: str, rng: random.Random) -> list[RequestOutput]:
    """Reads some outputs; then goes on, closes, or asks for an abort and goes on. Returns what it saw."""
    outputs: list[RequestOutput] = []
    patience = rng.randrange(6)
    async with contextlib.aclosing(engine.generate(request)) as stream:
        async for output in stream:
            outputs.append(output)
            if len(outputs) > patience:
                if "abort" in choice:
                    engine.abort(request.request_id)
                if "close" in choice:
                    break
            if rng.random() < 0.1:
                await asyncio.sleep(rng.random() * 0.01)
    return outputs


@pytest.mark.parametrize("seed", range(3))
async def test_exactly_one_terminal_event_under_random_aborts(seed):
    """Half of those who don't read to the end would never come to one: how they end is theirs, at any speed of the
    machine. The other half may be over before they have had enough."""
    rng = random.Random(1000 + seed)
    choices = [rng.choice(["read", "close", "abort", "abort and close"]) for _ in range(300)]
    is_endless = [choice != "read" and rng.random() < 0.5 for choice in choices]
    async with serving(step_s=0.0005) as engine:
        lengths = [FOREVER if endless else rng.randrange(1, 300) for endless in is_endless]
        requests = [make_request(f"{seed}-{i}", max_tokens=length) for i, length in enumerate(lengths)]
        readings = [
            asyncio.create_task(_impatient(engine, request, choice, rng))
            for request, choice in zip(requests, choices, strict=True)
        ]
        cancelled = set(rng.sample(range(300), 60))
        for i in cancelled:
            await asyncio.sleep(rng.random() * 0.003)
            readings[i].cancel()
        results = await asyncio.wait_for(asyncio.gather(*readings, return_exceptions=True), 20)
        ends: Counter[tuple[str, bool, str | None]] = Counter()
        for i, (request, outputs) in enumerate(zip(requests, results, strict=True)):
            if isinstance(outputs, BaseException):
                assert isinstance(outputs, asyncio.CancelledError) and i in cancelled
                continue
            assert tokens_of(outputs) == [token(request.prompt_ids, n) for n in range(len(tokens_of(outputs)))]
            terminal = [o.finish_reason for o in outputs if o.finish_reason is not None]
            assert len(terminal) <= 1
            assert not terminal or outputs[-1].finish_reason == terminal[0], "an output after the terminal one"
            ends[choices[i], is_endless[i], terminal[0] if terminal else None] += 1
        allowed = {("read", False): {"length"}, ("abort", True): {"abort"}, ("close", True): {None}}
        for (choice, endless, end), count in ends.items():
            assert end in allowed.get((choice, endless), {"length", "abort", None}), (choice, endless, end, count)
        assert min(ends["read", False, "length"], ends["abort", True, "abort"], ends["close", True, None]) > 5
        assert engine.num_open == 0
        await until(lambda: engine.last_stats.num_running == 0 and not engine._streams._aborted)
        await engine.close()
        assert engine.exit_code == 0, "the core found its books in order"


def test_the_client_side_imports_no_torch():
    modules = ("client", "inproc", "loop", "streams", "transport")
    program = (
        f"import sys, {', '.join(f'server.engine.{m}' for m in modules)}\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
