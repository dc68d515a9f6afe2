"""Who is in line, and who is next. One queue per adapter, the base's being one of them.

Order of turns: by priority, the lowest number first. Among equals: requests that already ran and were
preempted; then adapters held back for longer than the age limit, the longest held first; then the rest by
what they were served (shares.py), the least served first. Inside an adapter and a priority it is first come,
first served.

Two exceptions, each bounded. An adapter on the device goes before one that would have to be loaded, until it
is the residency quantum ahead of it, or the other has been overtaken for longer than the age limit: so one load
serves several. And a preempted request has precedence only as long as its adapter is not half the fair quantum
ahead of the least served in line: else an adapter that runs a lot would keep its place by being preempted.

Served is a virtual counter: an adapter that comes back from idleness starts at the least served of those at
work, so nobody saves up turns, and nobody who was busy is punished for it.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.adapters.slots import Acquire
from server.engine.limits import SchedulerLimits
from server.engine.request import Request

Turn = tuple[int, int, float, float, str]
"""sort key of a turn: priority, class, two keys inside the class, adapter key"""


class Line:
    """One adapter's requests in line: by priority, then in order of arrival, preempted ones before the rest."""

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[str, Request]] = {}  # by request id; no empty ones
        self._priorities: list[int] = []  # its keys, ascending

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._by_priority.values())

    def __bool__(self) -> bool:
        return bool(self._priorities)

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._by_priority[priority].values()

    @property
    def head(self) -> Request:
        return next(iter(self))

    @property
    def levels(self) -> list[OrderedDict[str, Request]]:
        """The requests of each priority, each in order."""
        return [self._by_priority[priority] for priority in self._priorities]

    def append(self, request: Request) -> None:
        """Behind all others of its priority."""
        if request.priority not in self._by_priority:
            self._by_priority[request.priority] = OrderedDict()
            insort(self._priorities, request.priority)
        self._by_priority[request.priority][request.request_id] = request

    def push_front(self, request: Request) -> None:
        """Before all others of its priority."""
        self.append(request)
        self._by_priority[request.priority].move_to_end(request.request_id, last=False)

    def remove(self, request: Request) -> None:
        requests = self._by_priority[request.priority]
        del requests[request.request_id]
        if not requests:
            del self._by_priority[request.priority]
            self._priorities.remove(request.priority)


@dataclass(slots=True, eq=False)
class AdapterQueue:
    """One adapter's requests in line, and where the adapter stands. Set by the scheduler."""

    key: str  # image key; "" for the base
    name: str  # of the first that came; names with the same bytes share a queue
    names: set[str] = field(default_factory=set)  # all that came
    served: float = 0.0  # cost of the rows scheduled, per weight, as a virtual counter
    waiting: Line = field(default_factory=Line)
    num_running: int = 0
    last_turn: int = 0  # number of its last turn among a step's adapters; 0 = none yet
    last_answer: Acquire | None = None  # of the slots, when it was not READY and nothing was admitted since
    held_since: float | None = None  # when a full arena, a bound, a drain or an overtaking first held it back

    @property
    def head(self) -> Request:
        return self.waiting.head

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.num_running

    def hold(self, now: float, answer: Acquire | None) -> None:
        """Its head was passed over: for want of room (FULL), while it loads, or by a bound (None)."""
        if answer is not None:
            self.last_answer = answer
        if answer is not Acquire.LOADING and self.held_since is None:
            self.held_since = now
        for requests in self.waiting.levels:
            for request in reversed(requests.values()):  # what was marked before stands before the rest
                if request.adapter_wait_s or request.num_preemptions:
                    break
                request.adapter_wait_s = now

    def release_hold(self) -> None:
        """One of it was admitted, or none is left: its next wait is a new one."""
        self.last_answer = None
        self.held_since = None


class WaitingQueues:
    """All adapter queues, and the order of their turns.

    `is_ready` says of an image key whether it is on the device; `want` is told when an image comes to have
    requests in line, and when it has none any more.
    """

    def __init__(
        self, limits: SchedulerLimits, is_ready: Callable[[str], bool], want: Callable[[str, bool], None]
    ) -> None:
        self._age_limit_s = limits.age_limit_s
        self._quantum = limits.fair_quantum
        self._residency_quantum = limits.residency_quantum
        self._is_ready = is_ready
        self._want = want
        self._least_served = 0.0  # of those in line, as of the last turns()
        self._queues: dict[str, AdapterQueue] = {}

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._queues.values())

    def __iter__(self) -> Iterator[AdapterQueue]:
        return iter(self._queues.values())

    def __getitem__(self, key: str) -> AdapterQueue:
        return self._queues[key]

    def of(self, request: Request) -> AdapterQueue:
        """The queue of a request that is waiting or running."""
        return self._queues[request.adapter_key]

    def is_aged(self, queue: AdapterQueue, now: float) -> bool:
        """Whether its adapter has been held back for longer than the age limit."""
        return queue.held_since is not None and now - queue.held_since >= self._age_limit_s

    def append(self, request: Request) -> None:
        """A new request: last of its priority in its adapter's line."""
        queue = self._queues.get(request.adapter_key)
        if queue is None or queue.is_idle:
            queue = self._join(request)
        if request.adapter is not None:
            queue.names.add(request.adapter.name)
            if not queue.waiting:
                self._want(queue.key, True)
        queue.waiting.append(request)

    def push_front(self, request: Request) -> None:
        """A preempted request: first of its priority in its adapter's line."""
        queue = self.of(request)
        if queue.key and not queue.waiting:
            self._want(queue.key, True)
        queue.waiting.push_front(request)

    def remove(self, request: Request) -> None:
        """Take a request out of the line: admitted or ended."""
        queue = self.of(request)
        queue.waiting.remove(request)
        if not queue.waiting:
            queue.release_hold()
            if queue.key:
                self._want(queue.key, False)

    def waiting_on(self, key: str) -> list[Request]:
        """The requests in line for an image."""
        queue = self._queues.get(key)
        return list(queue.waiting) if queue is not None else []

    def turns(self, now: float) -> list[Turn]:
        """A heap of the turns of all adapters that have someone in line."""
        in_line = [queue for queue in self._queues.values() if queue.waiting]
        self._least_served = min((queue.served for queue in in_line), default=0.0)
        heap = [self.turn(queue, now) for queue in in_line]
        heapq.heapify(heap)
        return heap

    def turn(self, queue: AdapterQueue, now: float) -> Turn:
        """When the head of one queue is next."""
        head = queue.head
        if head.num_preemptions and queue.served <= self._least_served + self._quantum / 2:
            return head.priority, 0, head.arrival_s, 0.0, queue.key
        if queue.held_since is not None and self.is_aged(queue, now):
            return head.priority, 1, queue.held_since, 0.0, queue.key
        is_here = queue.num_running > 0 or not queue.key or self._is_ready(queue.key)
        return head.priority, 2, queue.served + (0.0 if is_here else self._residency_quantum), head.arrival_s, queue.key

    def first_of(self, turns: list[Turn]) -> AdapterQueue:
        """The queue of a heap's first turn."""
        return self._queues[turns[0][-1]]

    def _join(self, request: Request) -> AdapterQueue:
        """The queue of an adapter that comes back from idleness. Forgets the idle ones that are not ahead."""
        floor = min((queue.served for queue in self._queues.values() if not queue.is_idle), default=None)
        if floor is None:
            self._queues.clear()
            floor = 0.0
        kept = {key: q for key, q in self._queues.items() if not q.is_idle or q.served > floor}
        name = request.adapter.name if request.adapter is not None else ""
        self._queues = kept
        return kept.setdefault(request.adapter_key, AdapterQueue(request.adapter_key, name, served=floor))
