"""Work that a route began and does not wait for, bounded in number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from adapters_store.errors import AdapterError
from server.errors import Overloaded, ServerError

MAX_TASKS = 256

logger = logging.getLogger(__name__)


class Tasks:
    """Tasks until they end; close() cancels the rest."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, work: Coroutine[object, object, object], name: str) -> asyncio.Task[object]:
        """Begin `work`. Raises Overloaded when as many as may are under way."""
        if len(self._tasks) >= MAX_TASKS:
            work.close()
            raise Overloaded(
                f"{MAX_TASKS} changes of adapters that nobody waits for are under way: above this server's limit.",
                retry_after_s=1,
            )
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, AdapterError | ServerError):
            logger.error("%s failed", task.get_name(), exc_info=error)
