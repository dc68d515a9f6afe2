"""Who renders next: one turn at a time, to the name that has used the least time lately.

A name whose turns are long falls behind all others, so an adapter whose template runs into its limit with
every request holds others up by the turn it is in, not by the number of its requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from server.errors import Overloaded

HALF_LIFE_S = 10.0  # after which used time counts half
NEW_NAME_S = 0.2  # what a name not seen before counts with: behind those known to be quick, before the slow
MAX_NAMES = 4096  # remembered, the most recently used ones
MAX_WAITING = 4096  # as many as the engine's own queue takes by default
MAX_WAIT_S = 10.0
RETRY_AFTER_S = 2


class Turns:
    """A lock with fair queues, one per name. Of one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holder: tuple[str, float] | None = None  # the name in its turn, and since when
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by name, none empty; names by first arrival
        self._num_waiting = 0
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()  # seconds, and when they were added up

    async def take(self, name: str) -> None:
        """Wait for a turn, which `give_back` ends. Raises Overloaded after MAX_WAIT_S, or when too many wait."""
        if self._holder is None:
            self._holder = name, self._clock()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, deque()).append(turn)
        self._num_waiting += 1
        if self._num_waiting > MAX_WAITING:
            self._refuse_one()
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await turn
        except BaseException as error:
            self._leave(name, turn)
            if isinstance(error, TimeoutError):
                raise _overloaded() from None
            raise

    def give_back(self) -> None:
        """End the turn: its time counts for its name, and the next one begins."""
        assert self._holder is not None
        now = self._clock()
        name, since = self._holder
        before_s = self.used_s(name) if name in self._used else 0.0
        self._used[name] = before_s + now - since, now
        self._used.move_to_end(name)
        if len(self._used) > MAX_NAMES:
            self._used.popitem(last=False)
        self._holder = None
        while self._waiting and self._holder is None:
            chosen = min(self._waiting, key=self.used_s)  # of equal ones the first
            turn = self._waiting[chosen][0]
            self._drop(chosen, turn)
            if not turn.done():  # one that was cancelled just now is still in its queue
                self._holder = chosen, now
                turn.set_result(None)

    def used_s(self, name: str) -> float:
        """Seconds that `name` used lately."""
        if name not in self._used:
            return NEW_NAME_S
        seconds, at = self._used[name]
        decayed: float = seconds * 0.5 ** ((self._clock() - at) / HALF_LIFE_S)
        return decayed

    def _refuse_one(self) -> None:
        """The last in the queue of the name that has used the most."""
        name = max(self._waiting, key=self.used_s)
        turn = self._waiting[name][-1]
        self._drop(name, turn)
        turn.set_exception(_overloaded())

    def _leave(self, name: str, turn: asyncio.Future[None]) -> None:
        """What a waiter does that is refused, cancelled or late, perhaps when its turn has come already."""
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self.give_back()
        elif turn in self._waiting.get(name, ()):
            self._drop(name, turn)

    def _drop(self, name: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting[name]
        queue.remove(turn)
        if not queue:
            del self._waiting[name]
        self._num_waiting -= 1


def _overloaded() -> Overloaded:
    return Overloaded("Too many chats wait for their adapters' own chat templates", retry_after_s=RETRY_AFTER_S)
