"""The HTTP server's life: serve until a signal, drain, end; or turn red and end when the engine has died.

    serving ──SIGTERM, SIGINT──▶ draining ──empty, or the deadline──▶ ended, status 0
       └────────the engine died──────┴──▶ red for DEAD_ENGINE_GRACE_S ──▶ ended, status 1

A second signal ends the process at once; the kernel ends the engine and the compiler with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from server.api.app import create_app
from server.api.protocol import OneAtATimeProtocol
from server.api.service import ServerState

DEAD_ENGINE_GRACE_S = 3.0  # how long /health stays red and requests get 503 before the process exits
ENGINE_CLOSE_S = 3.0  # how long the engine may take to end what is open at the deadline
LAST_WORDS_S = 2  # how long responses may then take to leave

logger = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the signals start a drain here, in which connections are still taken."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until_stopped(state: ServerState, listener: socket.socket, *, shutdown_timeout_s: float) -> int:
    """Serve on `listener`; the process's exit status."""
    app = create_app(state)
    config = uvicorn.Config(
        app,
        log_config=None,  # uvicorn's own would close every handler there is, the access log's with them
        log_level="warning",
        access_log=False,
        http=OneAtATimeProtocol,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    server = HttpServer(config)
    stopped = _on_signals()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    died = asyncio.create_task(state.engine.died.wait())
    await _first_of(serving, died, asyncio.create_task(stopped.wait()))
    if stopped.is_set() and not died.done():
        await _drain(state, died, shutdown_timeout_s)
    has_died = died.done()
    if has_died:
        logger.error("the engine has stopped; exiting in %.0f s", DEAD_ENGINE_GRACE_S)
        await asyncio.wait({serving}, timeout=DEAD_ENGINE_GRACE_S)
    died.cancel()
    server.should_exit = True
    await serving
    return 1 if has_died else 0


async def _drain(state: ServerState, died: asyncio.Task[bool], timeout_s: float) -> None:
    """Take nothing new; wait for what is open, and end with an error event what is open at the deadline."""
    state.door.close()
    logger.info("draining: %d requests are open, for at most %g s", state.door.num_inside, timeout_s)
    emptied = asyncio.create_task(state.door.until_empty())
    await asyncio.wait({emptied, died}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    emptied.cancel()
    if state.door.num_inside and not died.done():
        logger.warning("--shutdown-timeout %g s is over: %d requests are cut", timeout_s, state.door.num_inside)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(state.engine.close(), ENGINE_CLOSE_S)  # open streams get their terminal event


async def _first_of(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _on_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set():
            logger.warning("a second signal: ending at once")
            logging.shutdown()
            os._exit(128 + number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stopped
