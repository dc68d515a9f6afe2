"""Each open request's outputs on their way to the one who reads them. Used by both engines; no I/O."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from msgspec.structs import replace

from server.engine.messages import Abort, AddRequest, RequestError, RequestOutput, ToEngine
from server.errors import BadRequest, EngineDead

Taker = Callable[[RequestOutput], bool]  # takes an output at once, or says that it doesn't and does nothing

CHUNK = 128  # outputs handed over between two turns of the event loop


class Collector:
    """A request's unread outputs, merged into one: a slow reader costs its tokens and nothing else."""

    __slots__ = ("_is_merged", "_reader", "_unread", "take")

    def __init__(self) -> None:
        self._unread: RequestOutput | None = None
        self._is_merged = False  # the unread token list is ours to extend, not the sender's
        self._reader: asyncio.Future[None] | None = None  # who waits for the next one
        self.take: Taker | None = None  # is asked first while the reader waits: spares waking it

    def put(self, output: RequestOutput) -> None:
        """Add what one step did. Never blocks; amortised O(new tokens)."""
        reader = self._reader
        if reader is not None and not reader.done() and self.take is not None and output.finish_reason is None:
            try:
                if self.take(output):
                    return
            except Exception as error:  # the reader's, not of who delivers
                reader.set_exception(error)
                return
        if self._unread is None:
            self._unread = output
            self._is_merged = False
        else:
            self._unread = self._merge(self._unread, output)
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def get(self) -> RequestOutput:
        """All that came since the last call; waits for the first. One reader at a time."""
        if self._unread is None:
            assert self._reader is None, "two readers"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        output, self._unread = self._unread, None
        assert output is not None, "woken without an output"
        return output

    def _merge(self, old: RequestOutput, new: RequestOutput) -> RequestOutput:
        """Tokens and logprobs of both, the first output's own fields from `old`, everything else from `new`."""
        token_ids = old.token_ids if self._is_merged else list(old.token_ids)
        token_ids.extend(new.token_ids)
        logprobs = old.logprobs if self._is_merged or old.logprobs is None else list(old.logprobs)
        if new.logprobs is not None:
            logprobs = logprobs or []
            logprobs.extend(new.logprobs)
        self._is_merged = True
        return replace(
            new,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=new.prompt_logprobs if old.prompt_logprobs is None else old.prompt_logprobs,
            num_cached_tokens=new.num_cached_tokens if old.num_cached_tokens is None else old.num_cached_tokens,
            phases=new.phases if old.phases is None else old.phases,
        )


class Streams:
    """The open requests, by id.

        stream() ──▶ open ──terminal output──▶ gone
                       └──reader leaves early: Abort──▶ aborted ──terminal output──▶ gone

    `send` takes a message to the engine and never raises because the engine is gone. All calls come from
    one event loop.
    """

    def __init__(self, send: Callable[[ToEngine], None], *, refusal: str | None = None) -> None:
        self._send = send
        self._refusal = refusal  # why no new request is taken; None = they are
        self._open: dict[str, Collector] = {}
        self._aborted: set[str] = set()  # their ids stay taken until the engine has let go of them

    @property
    def is_admitting(self) -> bool:
        """Whether new requests are taken."""
        return self._refusal is None

    @property
    def open_ids(self) -> list[str]:
        return list(self._open)

    def admit(self) -> None:
        """Take new requests from now on."""
        self._refusal = None

    def refuse(self, reason: str) -> None:
        """Take no more requests; the open ones go on. The first reason stays."""
        self._refusal = self._refusal or reason

    def check(self) -> None:
        """Raises EngineDead if no new request is taken."""
        if self._refusal is not None:
            raise EngineDead(self._refusal)

    async def stream(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """Send the request at the first `__anext__` and yield its outputs up to the terminal one.

        Left early (aclose, cancellation, garbage), it sends an Abort before anything else runs.
        """
        self.check()
        request_id = request.request_id
        if request_id in self._open or request_id in self._aborted:
            raise BadRequest(f"the request id {request_id!r} is in use", param="request_id")
        collector = self._open[request_id] = Collector()  # before sending: an answer must find it
        try:
            self._send(request)
            while True:
                output = await collector.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._open.get(request_id) is collector:
                del self._open[request_id]
                self._aborted.add(request_id)
                self._send(Abort([request_id]))

    def divert(self, request_id: str, take: Taker) -> None:
        """Offer an open request's further outputs, but the last, to `take` while the reader of its stream waits.

        What it declines goes to the reader; what it raises is raised there.
        """
        if request_id in self._open:
            self._open[request_id].take = take

    def abort(self, request_id: str) -> None:
        """Ask the engine to end a request; its stream goes on to its terminal output. Unknown ids: no-op."""
        if request_id in self._open:
            self._send(Abort([request_id]))

    async def deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs to their readers, letting the event loop turn after every CHUNK of them."""
        for start in range(0, len(outputs), CHUNK):
            for output in outputs[start : start + CHUNK]:
                self._put(output)
            await asyncio.sleep(0)

    def fail_all(self, error: RequestError) -> None:
        """End every open stream with `error`: the terminal event that the engine can no longer send."""
        while self._open:
            request_id, collector = self._open.popitem()
            collector.put(RequestOutput(request_id=request_id, finish_reason="error", error=error))
        self._aborted.clear()

    def _put(self, output: RequestOutput) -> None:
        collector = self._open.get(output.request_id)
        if output.finish_reason is not None:
            self._open.pop(output.request_id, None)
            self._aborted.discard(output.request_id)
        if collector is not None:
            collector.put(output)
