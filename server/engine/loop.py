"""The engine process: take what came, step, send what came of it. Run as `python -m server.engine.loop`.

    ┌─▶ drain the inbox ─▶ core.step() ─▶ one StepOutputs ─┐
    └──────── waits only when a step did nothing ◀─────────┘

Threads. The main thread owns the core and both sockets; every call into the core comes from it, between
steps. The core's own loader threads touch neither; `step()` collects what they finished. ZMQ's I/O thread
runs no Python.

Signals. SIGINT and SIGTERM are ignored: a terminal's Ctrl-C and a supervisor's SIGTERM reach the whole
group, and it is the API process that drains and then says Shutdown. The kernel kills the engine when its
parent ends. So an engine ends by Shutdown (status 0), its own failure (EngineFailed, status 1), or SIGKILL.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from adapters_store.ref import AdapterRef
from server.engine.messages import (
    Abort,
    AdapterFailed,
    AdapterReady,
    AddRequest,
    DropAdapter,
    EngineFailed,
    EngineReady,
    PinAdapter,
    PrefetchAdapter,
    SetWeight,
    Shutdown,
    StepOutputs,
    StepStats,
    ToEngine,
)
from server.engine.process import LaunchSpec, die_with_parent, exit_if_orphaned
from server.engine.transport import Endpoints, EngineTransport
from server.errors import ConfigError

IDLE_POLL_S = 0.1  # nothing to do: how often to look at the parent and at the core's own time-outs
STATS_INTERVAL_S = 0.1  # at least this long between two messages that carry only new stats
HEARTBEAT_S = 1.0  # an idle engine still says so this often; see AsyncEngine.silent_s
SHUTDOWN_S = 5.0  # how long the requests open at Shutdown may take to end

logger = logging.getLogger(__name__)


class Core(Protocol):
    """What is stepped: EngineCore, or a test's script. Called from one thread.

    Every added request ends in exactly one output with a finish reason, an aborted one too.
    """

    @property
    def ready(self) -> EngineReady: ...

    def add(self, request: AddRequest, /) -> None: ...

    def abort(self, request_ids: Sequence[str], /) -> None:
        """Unknown ids are requests that have already ended."""

    def adapter_ready(self, key: str, ref: AdapterRef, /) -> None: ...

    def adapter_failed(self, failed: AdapterFailed, /) -> None: ...

    def pin_adapter(self, ref: AdapterRef, /) -> None: ...

    def drop_adapter(self, image_key: str, /) -> None: ...

    def prefetch_adapter(self, ref: AdapterRef, tier: Literal["host", "device"], /) -> None: ...

    def set_weight(self, name: str, weight: float, /) -> None: ...

    def has_work(self) -> bool:
        """Whether something could progress now: requests running or waiting, loads in flight."""

    def step(self) -> StepOutputs:
        """Never blocks for long. With nothing to do it gives no outputs and the stats it gave before."""

    def check_integrity(self) -> None:
        """Assert that nothing leaked."""

    def close(self) -> None: ...


class Pace:
    """How long to wait for messages after a step: not at all while steps do something.

    While work can't progress (loads, full device) the wait grows with the time since it last did, from 1 to
    10 ms: a load is noticed at most 5% late, and a long one doesn't cost a core.
    """

    def __init__(self) -> None:
        self._stats: StepStats | None = None
        self._progress_s = 0.0

    def wait_s(self, outputs: StepOutputs, *, has_work: bool, now_s: float) -> float:
        """The wait after a step that gave `outputs`. A step that did anything changed the stats."""
        if outputs.outputs or outputs.stats != self._stats:
            self._stats = outputs.stats
            self._progress_s = now_s
            return 0.0
        if not has_work:
            return IDLE_POLL_S
        return min(max(0.001, 0.05 * (now_s - self._progress_s)), 0.010)


class EngineLoop:
    """Drives a core from its sockets until Shutdown."""

    def __init__(self, core: Core, transport: EngineTransport, parent_pid: int) -> None:
        self._core = core
        self._transport = transport
        self._parent_pid = parent_pid
        self._open_ids: set[str] = set()  # added, no terminal output yet
        self._sent_stats = StepStats()
        self._sent_s = 0.0

    def run(self) -> None:
        """Returns after Shutdown, with every request ended and nothing leaked."""
        pace = Pace()
        wait_s = 0.0
        while self._take_messages(wait_s):
            outputs = self._step()
            wait_s = pace.wait_s(outputs, has_work=self._core.has_work(), now_s=time.monotonic())
        self._end_everything()

    def _take_messages(self, wait_s: float) -> bool:
        """Apply what arrived; False once it was Shutdown (what came after it is the client's to end)."""
        exit_if_orphaned(self._parent_pid)
        for message in self._transport.receive(wait_s):
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, AddRequest):
                self._open_ids.add(message.request_id)
            apply(self._core, message)
        return True

    def _step(self) -> StepOutputs:
        outputs = self._core.step()
        self._open_ids.difference_update(o.request_id for o in outputs.outputs if o.finish_reason is not None)
        now_s = time.monotonic()
        interval_s = HEARTBEAT_S if outputs.stats == self._sent_stats else STATS_INTERVAL_S
        if outputs.outputs or outputs.slot_changes or now_s - self._sent_s >= interval_s:
            self._transport.send(outputs)
            self._sent_stats = outputs.stats
            self._sent_s = now_s
        return outputs

    def _end_everything(self) -> None:
        self._core.abort(sorted(self._open_ids))
        deadline_s = time.monotonic() + SHUTDOWN_S
        while self._open_ids:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(self._open_ids)} requests did not end {SHUTDOWN_S:.0f} s after Shutdown")
            if not self._step().outputs:
                time.sleep(0.001)
        self._core.check_integrity()


def apply(core: Core, message: ToEngine) -> None:
    """Pass one message on to the core; Shutdown is for its driver, not for it."""
    match message:
        case AddRequest():
            core.add(message)
        case Abort():
            core.abort(message.request_ids)
        case AdapterReady():
            core.adapter_ready(message.key, message.ref)
        case AdapterFailed():
            core.adapter_failed(message)
        case PinAdapter():
            core.pin_adapter(message.ref)
        case DropAdapter():
            core.drop_adapter(message.image_key)
        case PrefetchAdapter():
            core.prefetch_adapter(message.ref, message.tier)
        case SetWeight():
            core.set_weight(message.name, message.weight)


def run_engine(build_core: Callable[[], Core], endpoints: Endpoints, parent_pid: int) -> int:
    """The engine process's life; its exit status. A failure, at start or later, is told before it exits."""
    transport = EngineTransport(endpoints)
    try:
        core = build_core()
        gc.collect()
        gc.freeze()  # what a start makes stays: collections need not walk it
        transport.send(core.ready)
        EngineLoop(core, transport, parent_pid).run()
        core.close()
    except Exception as error:  # the process boundary
        if not isinstance(error, ConfigError):  # those say it all, and the API process prints them
            logger.exception("the engine failed")
        transport.send(EngineFailed(describe_error(error)))
        return 1
    finally:
        transport.close()
    return 0


def describe_error(error: Exception) -> str:
    """One line for the person who started the server."""
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def load_core(spec: LaunchSpec) -> Core:
    """Import the factory and build the core. The heavy imports happen here, inside the boundary."""
    module, _, name = spec.core.partition(":")
    factory: Callable[[bytes], Core] = getattr(importlib.import_module(module), name)
    return factory(bytes(spec.config))


def main() -> None:
    """Entry of the engine process: a LaunchSpec on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(name)s: %(message)s")
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=LaunchSpec)
    die_with_parent(spec.parent_pid)
    status = run_engine(functools.partial(load_core, spec), spec.endpoints, spec.parent_pid)
    if status:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)  # a failed engine may have threads that hang; nothing of it is worth waiting for


if __name__ == "__main__":
    from server.engine import loop  # the module under its own name, so that its classes exist once

    loop.main()
