"""Work that ends when its client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

ResultT = TypeVar("ResultT")


class ClientGone(Exception):
    """The client closed its connection; whatever was under way has been cancelled."""


async def until_gone(
    receive: Receive, work: Coroutine[Any, Any, ResultT], gone: asyncio.Event | None = None
) -> ResultT:
    """The result of `work`. When the client disconnects first, cancels it, waits for its end, raises ClientGone.

    The request's body must have been read: the next message is then the disconnect. `gone` is set with it. A lost
    connection wakes receive() before a send() that was held up (uvicorn), so `work` finds it set when it goes on.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_watch(receive, gone or asyncio.Event()))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_done = worker.done()
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
    if is_done:
        return worker.result()
    raise ClientGone


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
