"""How long requests have waited without ever having run, and for whom that is too long."""

from __future__ import annotations

from collections.abc import Iterator

from server.engine.limits import SchedulerLimits
from server.engine.request import Request, RequestState


class Waits:
    """Requests by the start of their wait: PENDING ones from arrival, WAITING ones from the first schedule() that
    saw them, so that the wait for an image doesn't count against the bound on the queue."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._pending: dict[str, tuple[float, Request]] = {}  # by request id, ascending
        self._unstarted: dict[str, tuple[float, Request]] = {}  # the same
        self._fresh: list[Request] = []  # became WAITING since the last look

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request) -> None:
        """It waits from now on: for its image if it is PENDING, else to be admitted."""
        if request.state is RequestState.PENDING:
            self._pending[request.request_id] = request.arrival_s, request
        else:
            self._pending.pop(request.request_id, None)
            self._fresh.append(request)

    def remove(self, request: Request) -> None:
        """It was admitted or has ended."""
        self._pending.pop(request.request_id, None)
        self._unstarted.pop(request.request_id, None)

    def look(self, now: float) -> None:
        """The waits of those that came since the last look begin."""
        for request in self._fresh:
            if request.state is RequestState.WAITING:
                self._unstarted[request.request_id] = now, request
        self._fresh.clear()

    def expired(self, now: float) -> Iterator[Request]:
        """Those beyond their bound. Each has to be removed before the next is asked for."""
        yield from _older_than(self._unstarted, now - self._limits.max_wait_s)
        yield from _older_than(self._pending, now - self._limits.max_pending_s)

    def check_integrity(self, waiting: list[Request], pending: list[Request]) -> None:
        """Assert that exactly the PENDING and the WAITING that never ran are known."""
        assert set(self._pending) == {request.request_id for request in pending}
        unstarted = {request.request_id for request in waiting if not request.num_preemptions}
        fresh = {request.request_id for request in self._fresh}
        assert set(self._unstarted) | fresh >= unstarted >= set(self._unstarted)


def _older_than(since: dict[str, tuple[float, Request]], limit: float) -> Iterator[Request]:
    """From the front of an ascending dict."""
    while since:
        start, request = next(iter(since.values()))
        if start > limit:
            return
        yield request
