"""Whether requests are let in, how many are inside, and how many choices of theirs are on the way to the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.engine.client import Engine
from server.errors import BadRequest, Overloaded, QueueFull

QUEUE_RETRY_AFTER_S = 1
DRAINING_RETRY_AFTER_S = 5  # about what a replacement needs to be found
DRAINING = "The server is shutting down and takes no new requests."


@dataclass(slots=True, eq=False)
class Door:
    """Counts what is inside.

    open ──close()──▶ draining: what is inside goes on to its end, what has not arrived is cut, only reads come in
    """

    is_open: bool = True
    num_inside: int = 0  # requests that ask for a generation, from their arrival to their response's end
    num_coming: int = 0  # choices of theirs that the engine has not got yet
    _emptied: asyncio.Event = field(default_factory=asyncio.Event)
    _bounds: set[asyncio.Timeout] = field(default_factory=set)  # of what ends with close()

    def close(self) -> None:
        """Let nobody in from now on."""
        self.is_open = False
        for bound in self._bounds:
            bound.reschedule(asyncio.get_running_loop().time())
        self._bounds.clear()
        if not self.num_inside:
            self._emptied.set()

    @contextlib.asynccontextmanager
    async def bound(self, timeout_s: float) -> AsyncIterator[Callable[[], None]]:
        """A block that takes no longer than `timeout_s`, anew from each call of what it gets, nor beyond close().

        Raises TimeoutError, and Overloaded where it was close().
        """
        loop = asyncio.get_running_loop()

        def renew() -> None:
            if self.is_open:
                bound.reschedule(loop.time() + timeout_s)

        try:
            async with asyncio.timeout(timeout_s if self.is_open else 0) as bound:
                self._bounds.add(bound)
                try:
                    yield renew
                finally:
                    self._bounds.discard(bound)
        except TimeoutError:
            if self.is_open:
                raise
            raise Overloaded(DRAINING, retry_after_s=DRAINING_RETRY_AFTER_S) from None

    async def until_empty(self) -> None:
        """Wait until everyone who was inside at close() has left."""
        await self._emptied.wait()

    def enter(self) -> Ticket:
        """A request has come. It is one choice until its body has been read, and leaves with its ticket."""
        self.num_inside += 1
        ticket = Ticket(self)
        ticket.expect(1)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Its response has ended."""
        ticket.expect(0)
        self.num_inside -= 1
        if not self.num_inside and not self.is_open:
            self._emptied.set()


@dataclass(slots=True, eq=False)
class Ticket:
    """One request inside."""

    door: Door
    num_coming: int = 0  # its choices that the engine has not got yet

    def expect(self, num_choices: int) -> None:
        """So many choices of it will be asked of the engine."""
        self.door.num_coming += num_choices - self.num_coming
        self.num_coming = num_choices

    def sent(self) -> None:
        """One of them goes to the engine in this turn of the event loop, and is counted there."""
        self.expect(max(0, self.num_coming - 1))


_current: ContextVar[Ticket | None] = ContextVar("ticket", default=None)
set_ticket, reset_ticket = _current.set, _current.reset


def current_ticket() -> Ticket:
    """The ticket of the HTTP request being answered; one of no door outside of any."""
    return _current.get() or Ticket(Door())


def check_queue(door: Door, engine: Engine, max_queue_len: int, num_more: int) -> None:
    """Raises QueueFull if `num_more` choices would be more than may wait.

    Those on their way to the engine count too, so a burst that comes between two steps finds the bound. Not
    those that have ended and whose reader is slow.
    """
    num_waiting = max(0, door.num_coming + engine.num_open - engine.last_stats.num_running)
    if num_waiting + num_more > max_queue_len:
        raise QueueFull(
            f"{num_waiting} choices are waiting and this request has {num_more} more: above what this server lets "
            f"wait (--max-queue-len {max_queue_len}).",
            retry_after_s=QUEUE_RETRY_AFTER_S,
        )


def check_choices(engine: Engine, max_queue_len: int, num_choices: int) -> None:
    """The request being answered has this many choices: prompts times n. Raises QueueFull, or BadRequest if it
    can never be taken.
    """
    ticket = current_ticket()
    if num_choices > max_queue_len:
        raise BadRequest(
            f"The request asks for {num_choices} choices (prompts times n); this server lets at most "
            f"{max_queue_len} wait (--max-queue-len).",
            param="n",
        )
    if num_choices > ticket.num_coming:
        check_queue(ticket.door, engine, max_queue_len, num_choices - ticket.num_coming)
    ticket.expect(num_choices)
