"""The engine process, seen from its sockets, its exit status and its process id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from server.engine.loop import HEARTBEAT_S, IDLE_POLL_S, Pace
from server.engine.messages import (
    Abort,
    AdapterReady,
    EngineFailed,
    EngineReady,
    FromEngine,
    RequestOutput,
    Shutdown,
    StepOutputs,
    StepStats,
)
from server.engine.process import EngineProcess, LaunchSpec
from server.engine.transport import ClientTransport
from tests.engine.scripted_core import CORE, Script, answer, make_request
from tests.engine.test_transport import REF


class Child:
    """An engine process and the server's end of its sockets, without the client between."""

    def __init__(self, *, core: str = CORE, parent_pid: int | None = None, **script: object) -> None:
        self.transport = ClientTransport()
        config = msgspec.json.encode(msgspec.convert(script, Script))
        self.process = EngineProcess(
            LaunchSpec(
                core=core,
                config=msgspec.Raw(config),
                endpoints=self.transport.endpoints,
                parent_pid=parent_pid or os.getpid(),
            )
        )

    async def next(self) -> FromEngine:
        return await asyncio.wait_for(self.transport.receive(), 10)

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 10)

    async def outputs_of(self, request_id: str) -> list[RequestOutput]:
        """What the steps gave for one request, up to its terminal output."""
        outputs: list[RequestOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            message = await self.next()
            assert isinstance(message, StepOutputs)
            outputs += [output for output in message.outputs if output.request_id == request_id]
        return outputs


@contextlib.contextmanager
def child(**kwargs):
    engine = Child(**kwargs)
    try:
        yield engine
    finally:
        engine.process.kill()
        engine.transport.close()


async def test_it_is_ready_first_answers_in_order_and_exits_zero_on_shutdown():
    with child() as engine:
        assert isinstance(await engine.next(), EngineReady)
        request = make_request("a", max_tokens=20)
        engine.transport.send(request)
        outputs = await engine.outputs_of("a")
        assert [t for o in outputs for t in o.token_ids] == answer(request)
        assert len(outputs) == 20, "one output a step"
        engine.transport.send(Shutdown())
        assert await engine.exit_code() == 0


async def test_shutdown_ends_running_and_pending_requests_with_one_abort_each():
    with child(step_s=0.002) as engine:
        await engine.next()
        for request_id in ("a", "b"):
            engine.transport.send(make_request(request_id, max_tokens=10**6))
        engine.transport.send(make_request("c", pending="key"))
        engine.transport.send(Shutdown())
        ends: list[tuple[str, str]] = []
        while len(ends) < 3:
            message = await engine.next()
            assert isinstance(message, StepOutputs)
            ends += [(o.request_id, o.finish_reason) for o in message.outputs if o.finish_reason]
        assert sorted(ends) == [("a", "abort"), ("b", "abort"), ("c", "abort")]
        assert await engine.exit_code() == 0


async def test_a_leak_found_at_shutdown_is_a_failure():
    with child(is_leaky=True) as engine:
        await engine.next()
        engine.transport.send(Shutdown())
        messages = [await engine.next()]
        while isinstance(messages[-1], StepOutputs):  # a heartbeat may come before
            messages.append(await engine.next())
        assert messages[-1] == EngineFailed("AssertionError: a block leaked")
        assert await engine.exit_code() == 1


async def test_an_adapter_that_arrives_while_idle_starts_its_request():
    with child() as engine:
        await engine.next()
        request = make_request("a", pending="key")
        engine.transport.send(request)
        await asyncio.sleep(0.15)
        engine.transport.send(AdapterReady("key", REF))
        assert [t for o in await engine.outputs_of("a") for t in o.token_ids] == answer(request)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"start_error": "no memory"}, "RuntimeError: no memory"),
        ({"start_refusal": "--model /x: not a folder"}, "--model /x: not a folder"),
        (
            {"core": "server.engine.nothing:build"},
            "ModuleNotFoundError: No module named 'server.engine.nothing'",
        ),
    ],
)
async def test_a_failed_start_is_told_and_exits_non_zero(script, message):
    with child(**script) as engine:
        assert await engine.next() == EngineFailed(message)
        assert await engine.exit_code() == 1


async def test_an_exception_in_a_step_is_told_and_exits_non_zero():
    with child(fail_at_step=3) as engine:
        await engine.next()
        engine.transport.send(make_request("a"))
        messages = [await engine.next()]
        while not isinstance(messages[-1], EngineFailed):
            messages.append(await engine.next())
        assert messages[-1] == EngineFailed("ValueError: the model gave NaN")
        assert sum(len(m.outputs) for m in messages if isinstance(m, StepOutputs)) == 2
        assert await engine.exit_code() == 1


async def test_the_signals_of_a_terminal_and_a_supervisor_are_left_to_the_parent():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
    with child() as engine:
        signal.signal(signal.SIGINT, before)
        await engine.next()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine.process.pid, number)
        engine.transport.send(make_request("a"))
        assert (await engine.outputs_of("a"))[-1].finish_reason == "length"


async def test_idle_it_sends_heartbeats_only_and_uses_no_processor():
    with child() as engine:
        await engine.next()
        assert isinstance(await engine.next(), StepOutputs)  # the first heartbeat
        cpu_s, started_s = _cpu_s(engine.process.pid), time.monotonic()
        message = await engine.next()
        assert message == StepOutputs(outputs=[], stats=StepStats())
        assert 0.8 * HEARTBEAT_S < time.monotonic() - started_s < 2 * HEARTBEAT_S + 1
        assert _cpu_s(engine.process.pid) - cpu_s < 0.2


async def test_steps_without_outputs_send_stats_at_a_bounded_rate():
    with child(silent_steps=300, step_s=0.002) as engine:
        await engine.next()
        engine.transport.send(make_request("a", max_tokens=1))
        started_s = time.monotonic()
        num_messages = 0
        while True:
            message = await engine.next()
            assert isinstance(message, StepOutputs)
            num_messages += 1
            if message.outputs:
                break
        assert num_messages <= 3 + (time.monotonic() - started_s) / 0.1, "more than ten stats a second"
        assert num_messages > 3, "no stats while no output came"


async def test_an_abort_and_an_add_are_both_seen_within_a_step_of_a_busy_engine():
    with child(step_s=0.01) as engine:
        await engine.next()
        engine.transport.send(make_request("a", max_tokens=10**6))
        await engine.next()
        engine.transport.send(Abort(["a"]))
        engine.transport.send(make_request("b", max_tokens=1))
        outputs = await engine.outputs_of("a")
        assert outputs[-1].finish_reason == "abort"
        assert len(outputs) <= 20


async def test_an_engine_whose_parent_is_another_process_exits():
    with child(parent_pid=1) as engine:
        assert await engine.exit_code() == 1


PARENT = """
import asyncio, sys
from server.engine.client import AsyncEngine
from tests.engine.scripted_core import CORE, Script, make_request

async def main():
    engine = AsyncEngine(CORE)
    await engine.start(Script(hang_at_step=5))
    async for output in engine.generate(make_request("a", max_tokens=4)):
        pass
    print(engine.pid, flush=True)
    async for output in engine.generate(make_request("b", max_tokens=4)):
        pass

asyncio.run(main())
"""


async def test_the_engine_dies_with_its_parent_even_in_the_middle_of_a_step():
    env = {**os.environ, "PYTHONPATH": "."}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=env) as parent:
        try:
            assert parent.stdout is not None
            pid = int(await asyncio.to_thread(parent.stdout.readline))
            await asyncio.sleep(0.2)  # into the step that takes a minute
            pidfd = os.pidfd_open(pid)
        finally:
            parent.kill()
    try:
        has_ended = await asyncio.to_thread(select.select, [pidfd], [], [], 5.0)
        assert has_ended[0] == [pidfd]
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def _cpu_s(pid: int) -> float:
    """User and system time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_pace_waits_only_when_a_step_did_nothing_and_longer_the_longer_that_lasts():
    pace = Pace()
    busy = StepOutputs(outputs=[], stats=StepStats(step_s=0.5))
    nothing = StepOutputs(outputs=[], stats=StepStats(step_s=0.5))
    tokens = StepOutputs(outputs=[RequestOutput(request_id="a", token_ids=[1])], stats=StepStats(step_s=0.5))
    assert pace.wait_s(busy, has_work=True, now_s=100.0) == 0  # a prefill chunk: new stats, no outputs
    assert pace.wait_s(tokens, has_work=True, now_s=100.0) == 0
    waits = [pace.wait_s(nothing, has_work=True, now_s=100.0 + s) for s in (0.001, 0.1, 10.0)]
    assert waits == pytest.approx([0.001, 0.005, 0.010])
    assert pace.wait_s(nothing, has_work=False, now_s=111.0) == IDLE_POLL_S
    assert pace.wait_s(tokens, has_work=False, now_s=112.0) == 0
