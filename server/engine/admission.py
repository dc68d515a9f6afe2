"""Who in line comes to run: admission by turns, and who runs and is far ahead makes way.

Within a step, in this order: `make_way` before rows are given out, then the running requests take theirs, then
`admit`. What can't be admitted now is passed over and ages; adapters that will be wanted next are loaded ahead, in
the order of turns.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from adapters_store.errors import AdapterTooLarge
from server.adapters.slots import Acquire
from server.engine.draft import Draft
from server.engine.drain import Drain
from server.engine.limits import SchedulerLimits
from server.engine.messages import RequestError
from server.engine.queues import AdapterQueue, Turn, WaitingQueues
from server.engine.request import Request
from server.engine.running import RunningSet, Slots
from server.engine.shares import FairShares

LOADS_AHEAD = 8  # adapters next in line that are looked at, a step

Preempt = Callable[[Request], None]


class Admission:
    """Moves requests from the queues to the running set. Calls `preempt` for those that make way, `rest` for those
    that can't before their rows in flight are collected, and so get no more of them, `started` for each that is
    admitted, and `load_failed` where an adapter can never be had."""

    def __init__(
        self,
        limits: SchedulerLimits,
        queues: WaitingQueues,
        running: RunningSet,
        slots: Slots,
        shares: FairShares,
        *,
        preempt: Preempt,
        rest: Preempt,
        started: Callable[[Request, Draft], None],
        load_failed: Callable[[str, RequestError], None],
    ) -> None:
        self._limits = limits
        self._queues = queues
        self._running = running
        self._slots = slots
        self._shares = shares
        self._drain = Drain(queues)
        self._preempt = preempt
        self._rest = rest
        self._started = started
        self._load_failed = load_failed

    # --- by turns ------------------------------------------------------------------------------------------

    def admit(self, draft: Draft, turns: list[Turn]) -> None:
        """Admit the heads of the queues by turns, passing over those whose adapter can't be had now.

        What lacks blocks ends the round: smaller requests that overtake a large one would starve it.
        """
        most_served = 0.0  # of those admitted
        while turns and draft.budget and len(self._running) < self._limits.max_num_seqs:
            queue = self._queues.first_of(turns)
            if not self._may_join(queue, draft):
                heapq.heappop(turns)
                queue.hold(draft.now, None)
                continue
            request, prefix = queue.head, self._running.find_prefix(queue.head)
            if not self._running.can_start(request, prefix):
                break
            heapq.heappop(turns)
            slot = self._acquire(request, queue, draft.now)
            if slot is not None:
                most_served = max(most_served, queue.served)
                self._start(request, prefix, slot, draft)
                if queue.waiting:
                    heapq.heappush(turns, self._queues.turn(queue, draft.now))
        self._age_overtaken(turns, most_served, draft.now)
        self._load_ahead(turns)

    def _may_join(self, queue: AdapterQueue, draft: Draft) -> bool:
        """Whether this adapter may have one more running request: drain and adapter bound."""
        if not queue.key:
            return True
        if not self._drain.may_admit(queue):
            return False
        may_exceed = queue.head.num_preemptions > 0 or self._queues.is_aged(queue, draft.now)
        return may_exceed or draft.has_place_for(queue.key)

    def _acquire(self, request: Request, queue: AdapterQueue, now: float) -> int | None:
        """Take a ref on the slot of the request's adapter; None: it can't be had now. The base has slot 0."""
        if request.adapter is None:
            return 0
        try:
            answer, slot = self._slots.acquire(request.adapter)
        except AdapterTooLarge as error:
            self._load_failed(queue.key, RequestError(error.http_status, error.code, error.message))
            return None
        if answer is Acquire.READY:
            return slot
        queue.hold(now, answer)
        if answer is Acquire.FULL:
            self._drain.widen(queue, self._running)
        return None

    def _start(self, request: Request, prefix: list[int], slot: int, draft: Draft) -> None:
        queue = self._queues.of(request)
        self._queues.remove(request)
        queue.release_hold()
        queue.num_running += 1
        self._running.start(request, prefix, slot)
        self._started(request, draft)

    def _age_overtaken(self, turns: list[Turn], served: float, now: float) -> None:
        """What is not on the device and was served less than one that was admitted is held back by it."""
        for turn in turns if served else ():
            queue = self._queues[turn[-1]]
            if queue.served < served and queue.key and not self._slots.is_ready(queue.key):
                queue.hold(now, None)

    def _load_ahead(self, turns: list[Turn]) -> None:
        """Begin to load what the next in line will ask for, where that evicts nothing that is wanted."""
        for turn in heapq.nsmallest(LOADS_AHEAD, turns):
            queue = self._queues[turn[-1]]
            if queue.head.adapter is not None and not self._slots.is_ready(queue.key):
                self._slots.prefetch(queue.head.adapter)

    # --- making way ----------------------------------------------------------------------------------------

    def make_way(self, now: float, turns: list[Turn]) -> None:
        """Have requests yield to the first in line that are far ahead of it: they are preempted, and go on by turns.

        Of the least priority that runs, and not below that of the one in line; of these the adapter that is ahead
        the most, and its latest admitted. Only what is lacking makes way: device memory, places or blocks.
        """
        self._drain.begin(now)
        if not turns:
            return
        queue = self._queues.first_of(turns)
        is_any_ahead = any(self._shares.is_ahead(other, queue) for other in self._queues if other.num_running)
        if not is_any_ahead or (queue.key and not self._drain.may_admit(queue)):
            return
        candidates = self._running.least_of_priority(queue.head.priority)
        if queue.key and not queue.num_running:
            is_full = self._running_adapters() >= self._limits.max_adapters_per_step
            if is_full and not self._queues.is_aged(queue, now) and not queue.head.num_preemptions:
                return
            if not self._slots.is_ready(queue.key):
                self._free_device(queue, candidates, now)
                if not queue.waiting:  # too large for any device memory
                    heapq.heappop(turns)
                return
        self._free_places(queue, candidates)

    def _free_device(self, queue: AdapterQueue, candidates: list[Request], now: float) -> None:
        """An adapter that is far ahead leaves the device, if that makes room for this one."""
        request = queue.head
        assert request.adapter is not None
        slot = self._acquire(request, queue, now)
        assert slot is None, "an adapter that is not ready gives no slot"
        if not queue.waiting or queue.last_answer is not Acquire.FULL:
            return
        by_adapter: dict[str, list[Request]] = {}
        for candidate in candidates:
            by_adapter.setdefault(candidate.adapter_key, []).append(candidate)
        by_adapter.pop("", None)
        leaving = {each.adapter_key for each in self._running.leaving}
        for key in sorted(by_adapter, key=lambda key: (_is_any_in_flight(by_adapter[key]), -self._queues[key].served)):
            other, requests = self._queues[key], by_adapter[key]
            cost = sum(self._shares.recompute(each) for each in requests)
            is_all = len(requests) == other.num_running and key not in leaving
            if is_all and self._shares.is_ahead(other, queue, cost) and self._slots.makes_room(key, request.adapter):
                is_any_in_flight = _is_any_in_flight(requests)
                for each in requests:
                    (self._rest if is_any_in_flight else self._preempt)(each)
                if not is_any_in_flight:
                    self._acquire(request, queue, now)
                return

    def _free_places(self, queue: AdapterQueue, candidates: list[Request]) -> None:
        """Places in the running set for as many of this adapter's line as are due, and blocks for the first."""
        given = 0.0  # what those for whom there is a place now will add to its counter
        num_to_come = 0  # places that there will be in the next step: who has them rests
        for num_before, request in enumerate(queue.waiting):
            while not self._has_place(request, num_before, num_to_come):
                victim = self._victim(queue, candidates, given)
                if victim is None:
                    return
                candidates.remove(victim)
                num_to_come += victim.is_in_flight
                (self._rest if victim.is_in_flight else self._preempt)(victim)
            given += self._shares.recompute(request)

    def _has_place(self, request: Request, num_before: int, num_to_come: int) -> bool:
        if len(self._running) + num_before - num_to_come >= self._limits.max_num_seqs:
            return False
        is_counted = num_before > 0 or num_to_come > 0  # how many blocks there will be is looked at in the next step
        return is_counted or self._running.can_start(request, self._running.find_prefix(request))

    def _victim(self, queue: AdapterQueue, candidates: list[Request], given: float) -> Request | None:
        """Who yields to `queue`, whose counter will be higher by `given`."""

        def yields(request: Request) -> bool:
            margin = given + self._shares.recompute(request)
            return self._shares.is_ahead(self._queues.of(request), queue, margin)

        found = (request for request in reversed(candidates) if yields(request))
        return max(found, key=lambda each: (not each.is_in_flight, self._queues.of(each).served), default=None)

    def _running_adapters(self) -> int:
        return sum(bool(queue.key and queue.num_running) for queue in self._queues)


def _is_any_in_flight(requests: list[Request]) -> bool:
    return any(request.is_in_flight for request in requests)
