"""A request's choices: each one an engine request of its own, run together and merged into one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.ref import AdapterRef
from server.api.errors import RequestFailed
from server.api.meter import RequestMeter
from server.api.supply import Hold, Target
from server.engine.messages import AddRequest, RequestError, RequestOutput, SamplingParams, TokenLogprobs
from server.errors import EngineDead
from server.metrics import Siblings
from server.text.output import Delta, OutputText, TextOptions

if TYPE_CHECKING:
    from server.api.service import Service


MAX_TOKENS_ON_LOOP = 256  # with offsets, or alternatives: more take longer than other requests should wait

ResultT = TypeVar("ResultT")


async def off_loop_if(num_tokens: int, work: Callable[[], ResultT]) -> ResultT:
    """What `work` gives; done in a thread if it is about many tokens."""
    return await asyncio.to_thread(work) if num_tokens > MAX_TOKENS_ON_LOOP else work()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one choice asks of the engine."""

    index: int  # among the request's choices
    request_id: str  # ours, never the client's: two clients may send the same
    target: Target
    prompt_ids: list[int]
    params: SamplingParams
    text: TextOptions
    skips_special: bool = True
    echo: str | None = None  # the prompt's text, if the answer begins with it; "" = to be decoded
    cache_salt: str = ""
    priority: int = 0
    arrival_s: float = 0.0  # time.time()
    siblings: Siblings = field(default_factory=lambda: Siblings(1))  # the choices of its prompt
    continues_prompt: bool = False  # the output's text goes on where the prompt's ends


class Scored(NamedTuple):
    """A token with what the model thought of it; `logprobs` is None for a prompt's first token."""

    token_id: int
    offset: int  # characters of the choice's text before it; 0 where nobody asked
    logprobs: TokenLogprobs | None


class Part(msgspec.Struct, frozen=True):
    """What one engine event adds to one choice: its delta (an echo included), and logprobs if asked for."""

    index: int
    delta: Delta
    scored: list[Scored] | None = None


@dataclass(slots=True, eq=False)
class _Told:
    """What the first event of a choice told. What is of the prompt, its choices share."""

    num_cached: int = 0
    ref: AdapterRef | None = None  # which image answers; None: the base
    phases: dict[str, float] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] | None = None
    echo: tuple[str, list[Scored]] = ("", [])  # the prompt's text, and its tokens if they have logprobs


class Choice:
    """One choice in the engine: parts() runs it, the fields tell of it. Single use.

    num_output: tokens that the client was given; told: known from the first part on, when `is_told` is set.
    scorer: the choice that gets the logprobs of the prompt for this one too, which waits for them. The engine
    then computes them once, and the prompt as well where its KV is cached.
    """

    def __init__(self, service: Service, job: Job, scorer: Choice | None = None) -> None:
        self.job = job
        self.num_output = 0
        self.told = _Told()
        self.is_told = asyncio.Event()
        self._scorer = scorer
        self._engine = service.state.engine
        self._supply = service.supply
        self._meter = RequestMeter(
            service.metrics,
            model=job.target.name,
            is_adapter=job.target.version is not None,
            prompt_ids=job.prompt_ids,
            max_tokens=job.params.max_tokens,
            arrival_s=job.arrival_s,
            siblings=job.siblings,
        )
        self._tokenizer = service.state.tokenizer
        context = job.prompt_ids if job.continues_prompt else ()
        detokenizer = self._tokenizer.detokenizer(context, skip_special_tokens=job.skips_special)
        self._text = OutputText(detokenizer, job.text)
        self._num_echoed = 0  # characters

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The choice; the last part has the finish_reason. Close it (aclosing): that aborts what still runs.

        Raises RequestFailed when the engine ends the request with an error, EngineDead when it is gone.
        """
        reason = "abort"
        hold: Hold | None = None
        try:
            if self._scorer is not None:
                await self._scorer.is_told.wait()  # it ends without: so does the generation, and this with it
            hold = self._supply.hold(self.job.target)
            async with aclosing(self._engine.generate(self._add_request(hold))) as events:
                # No await from here to the first event's: the request must reach the engine before the news
                # of its adapter can.
                self._supply.fetch(hold)
                self._meter.sent()
                async for event in events:
                    part = self._take(event, hold)
                    if not self.is_told.is_set():
                        part = await self._first(part)
                    yield part
                    if part.delta.finish_reason is not None:
                        reason = part.delta.finish_reason  # the reader came back: it has been handed on whole
                        return
            raise EngineDead("The engine ended this request without saying why.")
        except (RequestFailed, EngineDead):
            reason = "error"
            raise
        finally:
            if hold is not None:
                self._supply.release(hold)
            self._meter.end(reason)

    def divert(self, write: Callable[[str, list[int]], None], is_free: Callable[[], bool]) -> None:
        """From the second part on give the text and ids of plain ones to `write`, while `is_free`, not to parts().

        Plain is what can't end the choice and has no logprobs. Its reader is not woken then, which with all that
        is between it and the engine costs several times as much as the text.
        """
        feed, count = self._text.plain_feed, self._meter.tokens
        if feed is None:
            return

        def take(event: RequestOutput) -> bool:
            if event.logprobs is not None or not is_free():
                return False
            token_ids = event.token_ids
            text = feed(token_ids)
            self.num_output += len(token_ids)
            count(len(token_ids))
            write(text, token_ids)
            return True

        self._engine.divert(self.job.request_id, take)

    def _add_request(self, hold: Hold) -> AddRequest:
        return AddRequest(
            request_id=self.job.request_id,
            prompt_ids=self.job.prompt_ids,
            params=self.job.params,
            adapter=hold.ref,
            pending=hold.pending,
            cache_salt=self.job.cache_salt,
            arrival_s=self.job.arrival_s,
            priority=self.job.priority,
        )

    def _take(self, event: RequestOutput, hold: Hold) -> Part:
        """One event's part; the first event also brings what is told once."""
        if event.error is not None:
            if event.error.code == AdapterCorrupt.code and hold.ref is not None:
                self._supply.discard(hold)  # the image of a sound adapter: the next request compiles it anew
                raise RequestFailed(RequestError(503, AdapterUnavailable.code, f"{event.error.message}; try again", 1))
            raise RequestFailed(event.error)
        if event.finish_reason == "abort":
            raise RequestFailed(RequestError(503, "request_aborted", "The server ended this request."))
        if not self.is_told.is_set():
            self._start(event, hold)
        return self._part(event)

    def _part(self, event: RequestOutput) -> Part:
        delta = self._text.feed(event.token_ids, event.finish_reason, event.stop_token_id)
        self.num_output += len(delta.token_ids)
        self._meter.tokens(len(delta.token_ids))
        if self.job.params.logprobs is None:
            return Part(self.job.index, delta)
        offsets = delta.offsets or [0] * len(delta.token_ids)
        rows = (event.logprobs or [])[: len(delta.token_ids)]
        scored = [
            Scored(token_id, offset + self._num_echoed, row)
            for token_id, offset, row in zip(delta.token_ids, offsets, rows, strict=True)
        ]
        return Part(self.job.index, delta, scored)

    def _start(self, event: RequestOutput, hold: Hold) -> None:
        ttft_s = time.time() - self.job.arrival_s
        told = self.told
        told.ref = hold.ref
        told.num_cached = event.num_cached_tokens or 0
        told.prompt_logprobs = event.prompt_logprobs if self._scorer is None else self._scorer.told.prompt_logprobs
        if self.job.target.version is not None:
            told.phases["resolve_s"] = self.job.target.resolve_s
        told.phases |= hold.phases | (event.phases or {}) | {"ttft_s": ttft_s}
        image_key = "" if told.ref is None else told.ref.image_key
        self._meter.start(image_key=image_key, num_cached=told.num_cached, phases=told.phases)

    async def _first(self, part: Part) -> Part:
        """The first part, the prompt before it if the answer begins with that. What is told is then complete."""
        if self.job.echo is not None:
            if self._scorer is not None:
                self.told.echo = self._scorer.told.echo
            else:
                self.told.echo = await off_loop_if(len(self.job.prompt_ids), self._echo)
            part = self._with_echo(part)
        self.is_told.set()
        return part

    def _with_echo(self, part: Part) -> Part:
        """`part` with the prompt before it."""
        text, echoed = self.told.echo
        delta = Delta(
            text + part.delta.text,
            part.delta.token_ids,
            part.delta.finish_reason,
            part.delta.stop_reason,
        )
        if part.scored is None:
            return Part(part.index, delta)
        self._num_echoed = len(text)
        output = [scored._replace(offset=scored.offset + len(text)) for scored in part.scored]
        return Part(part.index, delta, [*echoed, *output])

    def _echo(self) -> tuple[str, list[Scored]]:
        """The prompt's text, and with logprobs its tokens."""
        has_logprobs = self.job.params.logprobs is not None
        if self.job.echo and not has_logprobs:
            return self.job.echo, []
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=self.job.skips_special)
        whole = OutputText(detokenizer, TextOptions(has_offsets=has_logprobs))
        delta = whole.feed(self.job.prompt_ids, "length")
        text = self.job.echo or delta.text
        if not has_logprobs:
            return text, []
        rows: list[TokenLogprobs | None] = [None, *(self.told.prompt_logprobs or [])]
        return text, [Scored(*fields) for fields in zip(self.job.prompt_ids, delta.offsets, rows, strict=True)]


class Generation:
    """One request's choices: `n` for each prompt, prompt by prompt. If one fails, or the reader leaves, all end."""

    def __init__(self, request_id: str, target: Target, choices: Sequence[Choice], n: int) -> None:
        self.request_id = request_id
        self.target = target
        self.choices = choices
        self._n = n

    @property
    def arrival_s(self) -> float:
        return self.choices[0].job.arrival_s

    @property
    def has_begun(self) -> bool:
        """Whether an event of any choice has come."""
        return any(choice.is_told.is_set() for choice in self.choices)

    @property
    def ref(self) -> AdapterRef | None:
        """Which image answers; None for the base, and before the first part."""
        return next((choice.told.ref for choice in self.choices if choice.told.ref is not None), None)

    def parts(self) -> AsyncGenerator[Part, None]:
        """Every choice's parts as they come; each choice's last has its finish_reason. Close it, as Choice.parts."""
        streams = [choice.parts() for choice in self.choices]
        return streams[0] if len(streams) == 1 else _merged(streams)

    def usage(self, *, has_phases: bool) -> dict[str, object]:
        """OpenAI's usage object over all choices, each prompt counted once; with the phases if wanted."""
        firsts = self.choices[:: self._n]
        num_prompt = sum(len(choice.job.prompt_ids) for choice in firsts)
        num_output = sum(choice.num_output for choice in self.choices)
        usage: dict[str, object] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(choice.told.num_cached for choice in firsts)},
        }
        if has_phases:
            usage["multilora"] = {"phases": self.choices[0].told.phases}
        return usage


async def _merged(streams: Sequence[AsyncGenerator[Part, None]]) -> AsyncGenerator[Part, None]:
    """All streams' parts in the order they come. The first error ends all of them.

    The queue is bounded: while the reader is busy the engine's collectors merge what comes, as for one stream.
    """
    queue: asyncio.Queue[Part | Exception] = asyncio.Queue(len(streams))

    async def pump(stream: AsyncGenerator[Part, None]) -> None:
        try:
            async with aclosing(stream):
                async for part in stream:
                    await queue.put(part)
        except Exception as error:  # handed to the reader, who raises it
            await queue.put(error)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_open = len(pumps)
        while num_open:
            part = await queue.get()
            if isinstance(part, Exception):
                raise part
            num_open -= part.delta.finish_reason is not None
            yield part
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
