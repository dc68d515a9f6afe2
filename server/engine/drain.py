"""Room for an adapter that the arena has been full for: others stop taking what would keep it full."""

from __future__ import annotations

from collections.abc import Iterable

from server.adapters.slots import Acquire
from server.engine.queues import AdapterQueue, WaitingQueues
from server.engine.request import Request


class Drain:
    """At most one adapter starves at a time: of the first in priority the one held back the longest, beyond
    the age limit, by FULL.

    While it does, an adapter that runs nothing may not take a slot, and the draining ones admit nothing;
    a request that goes before it by priority is not held. The draining ones are chosen one after another,
    each when the last is idle and that was not room enough. Every running request ends, so at the latest
    with all of them idle there is room.
    """

    def __init__(self, queues: WaitingQueues) -> None:
        self._queues = queues
        self._starving: AdapterQueue | None = None
        self._priority = 0  # of the starving one's head
        self._draining: list[AdapterQueue] = []

    def begin(self, now: float) -> None:
        """Look, before a round of admissions, for whom to drain."""
        starving = min(
            (q for q in self._queues if q.last_answer is Acquire.FULL and self._queues.is_aged(q, now)),
            key=lambda queue: (queue.head.priority, queue.held_since or 0.0),
            default=None,
        )
        if starving is not None:
            self._priority = starving.head.priority
        if starving is not self._starving:
            self._starving = starving
            self._draining.clear()

    def may_admit(self, queue: AdapterQueue) -> bool:
        """Whether another request of this adapter takes no room that the starving one waits for."""
        if self._starving is None or queue is self._starving:
            return True
        if queue.head.priority < self._priority:
            return True
        if queue.num_running:
            return queue not in self._draining
        return queue.last_answer is Acquire.LOADING  # its room is taken already: let it come and go

    def widen(self, queue: AdapterQueue, running: Iterable[Request]) -> None:
        """The arena was full again for `queue`: if it is the starving one, drain one more if none is."""
        if queue is not self._starving or any(draining.num_running for draining in self._draining):
            return
        steps_left: dict[str, int] = {}
        for request in running:
            if request.adapter is not None:
                left = request.params.max_tokens - request.num_output
                steps_left[request.adapter_key] = max(left, steps_left.get(request.adapter_key, 0))
        if steps_left:
            self._draining.append(self._queues[min(steps_left, key=lambda key: steps_left[key])])
