"""Which requests get rows in the next step, and what became of the rows of the last one. No torch.

    add ──▶ PENDING ──adapter_ready──▶ WAITING ──admit──▶ RUNNING ──stop──▶ FINISHED
                                          ▲                  │
                                          └──── preempt ─────┘ (blocks and slot ref given up)

A step, one mixed batch under a token budget: decodes, then prefill chunks of running requests, then
admissions. Nothing here waits: what can't go now is passed over and ages.

- A running request owns the blocks of all its known tokens and, with an adapter, a ref on its slot. Both
  are taken at admission and given up when it finishes or is preempted, never while rows are in flight.
- num_scheduled advances in schedule(), num_computed in collect(). A request whose next token is not yet
  known has nothing to schedule, so with two steps in flight only the chunks of one prompt overlap.
- Distinct adapters: a step has at most max_adapters_per_step. New adapters are admitted up to that bound;
  beyond it only aged or preempted ones are, and then the running adapters take turns, the longest unserved
  first.
- Drain: when the arena has been FULL for one adapter for longer than the age limit, no other adapter may
  take a slot, and the running adapter that will be idle soonest admits nothing more; one after another, until
  there is room. At the latest the arena has no refs left, and then it fits.
- Preemption: when blocks run out, the latest admitted goes first and keeps its tokens; the oldest never
  has to, so something always finishes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from adapters_store.errors import AdapterTooLarge
from adapters_store.ref import AdapterRef
from server.adapters.slots import Acquire
from server.engine.batch import ScheduledRequest, StepPlan, row_order
from server.engine.blocks import BlockPool, KvNamespace
from server.engine.drain import Drain
from server.engine.messages import RequestError, RequestOutput, StepStats
from server.engine.queues import AdapterQueue, WaitingQueues
from server.engine.request import FinishReason, Request, RequestState
from server.errors import ConfigError


class Slots(Protocol):
    """What the scheduler asks of the device arena; see server/adapters/slots.py."""

    def acquire(self, ref: AdapterRef) -> tuple[Acquire, int]: ...

    def release(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The scheduler's bounds. Raises ConfigError where they contradict each other."""

    max_num_seqs: int  # requests running at once
    max_step_tokens: int  # rows of a step
    max_adapters_per_step: int
    max_model_len: int  # prompt and output tokens of a request
    eos_token_ids: tuple[int, ...] = ()
    max_prefill_chunk: int | None = (
        None  # rows of one prompt in a step, so that a long one leaves room; None = all
    )
    max_wait_s: float = 60.0  # a request not started for so long gets 503
    max_pending_s: float = (
        600.0  # the same for one whose image is not on disk: a backstop to the store's own bounds
    )
    age_limit_s: float = 1.0  # held back by adapters for so long, a request goes first and others drain
    retry_after_s: int = 5  # what a 503 tells the client
    rope_switch: int | None = None  # longrope: known lengths above it use the long variant

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running request decodes one token a step"
            )
        for name in ("max_num_seqs", "max_adapters_per_step", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_prefill_chunk is not None and self.max_prefill_chunk < 1:
            raise ConfigError(f"max_prefill_chunk must be at least 1, not {self.max_prefill_chunk}")


@dataclass(slots=True)
class _Draft:
    """A step being planned."""

    now: float
    budget: int  # rows left
    adapters: set[str]  # image keys that have or may have rows in it
    plan: StepPlan = field(default_factory=StepPlan)


class Scheduler:
    """Owns every live request. All calls come from the engine's thread; collects come in schedule order."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool, slots: Slots) -> None:
        self.limits = limits
        self.num_preemptions = 0
        self._blocks = blocks
        self._slots = slots
        self._max_len = min(limits.max_model_len, blocks.num_usable * blocks.block_size)
        self._eos = frozenset(limits.eos_token_ids)
        self._step = 0
        self._requests: dict[str, Request] = {}
        self._running: dict[str, Request] = {}  # in order of admission
        self._queues = WaitingQueues(limits.age_limit_s)
        self._pending: dict[str, dict[str, Request]] = {}  # by pending key
        self._pending_since: dict[str, float] = {}  # by request id, ascending
        self._unstarted_since: dict[str, float] = {}  # WAITING and never admitted, by request id, ascending
        self._fresh: list[Request] = []  # became WAITING since the last schedule
        self._drain = Drain(self._queues)
        self._ended: list[Request] = []  # for the next plan

    # --- requests come and go --------------------------------------------------------------------------------

    def add(self, request: Request) -> RequestError | None:
        """Take a new request; or return why it can never run, and then keep nothing of it."""
        assert request.request_id not in self._requests, f"request id {request.request_id!r} is in use"
        assert request.num_prompt > 0, "an empty prompt has nothing to run"
        refusal = self._refusal(request)
        if refusal is not None:
            request.state, request.finish_reason, request.error = (
                RequestState.FINISHED,
                FinishReason.ERROR,
                refusal,
            )
            return refusal
        self._requests[request.request_id] = request
        if request.pending_key is not None and request.adapter is None:
            request.state = RequestState.PENDING
            request.adapter_wait_s = request.arrival_s
            self._pending.setdefault(request.pending_key, {})[request.request_id] = request
            self._pending_since[request.request_id] = request.arrival_s
        else:
            self._enqueue(request)
        return None

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        """The image behind a pending key is on disk: its requests may be scheduled."""
        for request in self._pending.pop(key, {}).values():
            del self._pending_since[request.request_id]
            request.adapter = ref
            self._enqueue(request)

    def adapter_failed(self, key: str, error: RequestError) -> None:
        """The image behind a pending key will not come: its requests end with `error`."""
        for request in list(self._pending.get(key, {}).values()):
            self._end(request, FinishReason.ERROR, error)

    def load_failed(self, image_key: str, error: RequestError) -> None:
        """An image on disk could not be loaded: the requests in line for it end with `error`."""
        for request in self._queues.waiting_on(image_key):
            self._end(request, FinishReason.ERROR, error)

    def abort(self, request_id: str) -> None:
        """End a request: with the next plan, or, when rows of it are in flight, when they are collected.

        An unknown id is a request that has already ended: clients and answers cross.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.is_in_flight:
            request.abort_requested = True
        else:
            self._end(request, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether schedule() may do something now. PENDING requests alone only need it for their bound on
        waiting, so an idle engine calls it every second or so while `num_pending` is not 0."""
        return bool(self._ended) or len(self._requests) > self.num_pending

    @property
    def num_pending(self) -> int:
        return len(self._pending_since)

    def _refusal(self, request: Request) -> RequestError | None:
        if request.num_prompt < self._max_len:
            return None
        if self._max_len < self.limits.max_model_len:
            why = f"; the KV memory of this server holds {self._max_len} tokens"
        else:
            why = ""
        message = (
            f"This model's maximum context length is {self._max_len} tokens, and the prompt has "
            f"{request.num_prompt}: it leaves no room for an answer{why}."
        )
        return RequestError(status=400, code="context_length_exceeded", message=message)

    def _enqueue(self, request: Request) -> None:
        request.state = RequestState.WAITING
        self._queues.append(request)
        self._fresh.append(request)

    def _end(self, request: Request, reason: FinishReason, error: RequestError | None = None) -> None:
        """Finish a request outside of collect(): its terminal event goes with the next plan."""
        self._finish(request, reason, error)
        self._ended.append(request)

    def _finish(self, request: Request, reason: FinishReason, error: RequestError | None = None) -> None:
        assert not request.is_in_flight, f"request {request.request_id!r} finishes with rows in flight"
        if request.state is RequestState.RUNNING:
            self._give_up(request)
        elif request.state is RequestState.WAITING:
            self._queues.remove(request)
        elif request.pending_key is not None:
            waiting = self._pending[request.pending_key]
            del waiting[request.request_id]
            if not waiting:
                del self._pending[request.pending_key]
        self._pending_since.pop(request.request_id, None)
        self._unstarted_since.pop(request.request_id, None)
        del self._requests[request.request_id]
        request.state, request.finish_reason, request.error = RequestState.FINISHED, reason, error

    def _give_up(self, request: Request) -> None:
        """Out of the running set: blocks and slot ref go."""
        assert not request.is_in_flight, f"request {request.request_id!r} has rows in flight"
        del self._running[request.request_id]
        self._queues.of(request).num_running -= 1
        self._blocks.free(request.blocks)
        request.blocks = []
        if request.slot:
            self._slots.release(request.slot)
            request.slot = 0

    # --- a step begins ---------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """Pick the rows of the next step. `now`: the monotonic clock that arrival_s is on."""
        self._step += 1
        self._expire(now)
        ready = [r for r in self._running.values() if r.num_remaining > 0 and not r.abort_requested]
        draft = _Draft(now, self.limits.max_step_tokens, self._choose_adapters(ready))
        self._schedule_running(
            draft, [r for r in ready if not r.adapter_key or r.adapter_key in draft.adapters]
        )
        if not draft.plan.num_preempted:  # what was preempted would be the first to come back
            self._admit(draft)
        draft.plan.items.sort(key=row_order)
        draft.plan.ended, self._ended = self._ended, []
        return draft.plan

    def _expire(self, now: float) -> None:
        """End what has waited for too long without ever having run."""
        for request in self._fresh:
            if request.state is RequestState.WAITING:
                self._unstarted_since[request.request_id] = now
        self._fresh.clear()
        after = self.limits.retry_after_s
        for request in self._older_than(self._unstarted_since, now - self.limits.max_wait_s):
            message = (
                f"The server is overloaded: no room for this request within {self.limits.max_wait_s:g} s."
            )
            self._end(request, FinishReason.ERROR, RequestError(503, "overloaded", message, after))
        for request in self._older_than(self._pending_since, now - self.limits.max_pending_s):
            message = f"The adapter could not be made ready within {self.limits.max_pending_s:g} s."
            self._end(request, FinishReason.ERROR, RequestError(503, "adapter_unavailable", message, after))

    def _older_than(self, since: dict[str, float], limit: float) -> Iterator[Request]:
        """Requests of an ascending dict, from the front; each is removed from it before the next is asked for."""
        while since:
            request_id, start = next(iter(since.items()))
            if start > limit:
                return
            yield self._requests[request_id]

    def _choose_adapters(self, ready: list[Request]) -> set[str]:
        """The adapters of this step: all that could have rows, or those that have not had any for the longest."""
        keys = dict.fromkeys(request.adapter_key for request in ready if request.adapter is not None)
        chosen = [self._queues[key] for key in keys]
        if len(chosen) > self.limits.max_adapters_per_step:
            chosen.sort(key=lambda queue: queue.last_turn)
            chosen = chosen[: self.limits.max_adapters_per_step]
        for queue in chosen:
            queue.last_turn = self._step
        return {queue.key for queue in chosen}

    def _schedule_running(self, draft: _Draft, requests: list[Request]) -> None:
        """Decodes, then prefill chunks, each in order of admission."""
        prefills = [request for request in requests if request.num_remaining > 1]
        for request in requests:
            is_next = request.num_remaining == 1 and request.state is RequestState.RUNNING
            if is_next and self._make_room(request, draft.plan):
                self._take_rows(request, draft)
        for request in prefills:
            if draft.budget and request.state is RequestState.RUNNING:
                self._take_rows(request, draft)

    def _take_rows(self, request: Request, draft: _Draft) -> None:
        count = min(request.num_remaining, draft.budget)
        if self.limits.max_prefill_chunk is not None:
            count = min(count, self.limits.max_prefill_chunk)
        start = request.num_scheduled
        samples = start + count == len(request.token_ids)
        draft.plan.items.append(ScheduledRequest(request, start, count, samples))
        draft.budget -= count
        request.num_scheduled += count
        request.is_in_flight = True
        self._queues.of(request).served += count

    def _make_room(self, request: Request, plan: StepPlan) -> bool:
        """Give a decode the block of its next position, if it needs one, preempting the latest admitted.

        False: it sits this step out, preempted itself or because rows in flight hold what it needs.
        """
        missing = self._blocks.blocks_for(len(request.token_ids)) - len(request.blocks)
        while not self._blocks.can_allocate(missing):
            victim = self._victim(request)
            if victim is None:
                return False
            self._preempt(victim)
            self.num_preemptions += 1
            plan.num_preempted += 1
            if victim is request:
                return False
        request.blocks += self._blocks.allocate(missing)
        return True

    def _victim(self, request: Request) -> Request | None:
        """The latest admitted without rows in flight, `request` being the last resort; None: wait for a collect."""
        is_any_in_flight = False
        for candidate in reversed(self._running.values()):
            if candidate is request:
                break
            if not candidate.is_in_flight:
                return candidate
            is_any_in_flight = True
        return None if is_any_in_flight else request

    def _preempt(self, request: Request) -> None:
        """Back to the front of the line with its tokens, to be computed anew."""
        self._give_up(request)
        request.num_computed = request.num_scheduled = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._queues.push_front(request)

    # --- admission -------------------------------------------------------------------------------------------

    def _admit(self, draft: _Draft) -> None:
        """Admit the heads of the queues by turns, passing over those whose adapter can't be had now.

        What lacks blocks ends the round: smaller requests that overtake a large one would starve it.
        """
        if not draft.budget or len(self._running) >= self.limits.max_num_seqs:
            return
        self._drain.begin(draft.now)
        turns = self._queues.turns(draft.now)
        while turns and draft.budget and len(self._running) < self.limits.max_num_seqs:
            queue = self._queues.next_of(turns)
            if not self._may_join(queue, draft):
                queue.hold(draft.now, None)
                continue
            request, prefix = queue.head, self._cached_prefix(queue.head)
            if not self._can_own(request, prefix):
                return
            if self._acquire(request, queue, draft.now):
                self._start(request, prefix, draft)
                if queue.waiting:
                    heapq.heappush(turns, self._queues.turn(queue, draft.now))

    def _may_join(self, queue: AdapterQueue, draft: _Draft) -> bool:
        """Whether this adapter may have one more running request: drain and adapter bound."""
        if not queue.key:
            return True
        if not self._drain.may_admit(queue):
            return False
        return (
            self._is_in_step(queue, draft)
            or queue.head.num_preemptions > 0
            or self._queues.is_aged(queue, draft.now)
        )

    def _is_in_step(self, queue: AdapterQueue, draft: _Draft) -> bool:
        is_room = len(draft.adapters) < self.limits.max_adapters_per_step
        return not queue.key or queue.key in draft.adapters or is_room

    def _cached_prefix(self, request: Request) -> list[int]:
        known = len(request.token_ids)
        namespace = self._namespace(request)
        self._blocks.extend_hashes(request.block_hashes, namespace, request.token_ids, known)
        return self._blocks.match_prefix(request.block_hashes, known)

    def _can_own(self, request: Request, prefix: list[int]) -> bool:
        """Whether there are blocks for all its known tokens, and one for each running request to grow into."""
        missing = self._blocks.blocks_for(len(request.token_ids)) - len(prefix)
        return self._blocks.can_allocate(missing + len(self._running), reuse=prefix)

    def _acquire(self, request: Request, queue: AdapterQueue, now: float) -> bool:
        """Take a ref on the slot of the request's adapter, if it is there."""
        if request.adapter is None:
            return True
        try:
            answer, slot = self._slots.acquire(request.adapter)
        except AdapterTooLarge as error:
            self.load_failed(queue.key, RequestError(error.http_status, error.code, error.message))
            return False
        if answer is Acquire.READY:
            request.slot = slot
            return True
        queue.hold(now, answer)
        if answer is Acquire.FULL:
            self._drain.widen(queue, self._running.values())
        return False

    def _start(self, request: Request, prefix: list[int], draft: _Draft) -> None:
        """Into the running set, with its blocks; rows at once if the step has a place for its adapter."""
        missing = self._blocks.blocks_for(len(request.token_ids)) - len(prefix)
        request.blocks = self._blocks.allocate(missing, reuse=prefix)
        request.num_computed = request.num_scheduled = len(prefix) * self._blocks.block_size
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
            request.first_scheduled_s = draft.now
            self._blocks.record_match(request.num_prompt, request.num_cached)
            del self._unstarted_since[request.request_id]
        queue = self._queues.of(request)
        self._queues.remove(request)
        queue.release_hold()
        queue.num_running += 1
        self._running[request.request_id] = request
        request.state = RequestState.RUNNING
        if self._is_in_step(queue, draft):
            if queue.key:
                draft.adapters.add(queue.key)
                queue.last_turn = self._step
            self._take_rows(request, draft)

    def _namespace(self, request: Request) -> KvNamespace:
        members = ((request.adapter_key, 1.0),) if request.adapter is not None else ()
        switch = self.limits.rope_switch
        rope = "" if switch is None else "long" if len(request.token_ids) > switch else "short"
        return KvNamespace(members=members, cache_salt=request.cache_salt, rope=rope)

    # --- a step's results ------------------------------------------------------------------------------------

    def collect(self, plan: StepPlan, tokens: Mapping[str, int], now: float) -> list[RequestOutput]:
        """Apply the results of the oldest uncollected plan. `tokens`: the new token of each item that samples."""
        outputs = [self._collect_item(item, tokens, now) for item in plan.items]
        return [output for output in outputs if output is not None]

    def _collect_item(
        self, item: ScheduledRequest, tokens: Mapping[str, int], now: float
    ) -> RequestOutput | None:
        request = item.request
        assert request.is_in_flight and request.num_computed == item.start, (
            "plans are collected in order, once"
        )
        request.num_computed = item.start + item.num_tokens
        request.is_in_flight = request.num_computed < request.num_scheduled
        if request.abort_requested:
            if request.is_in_flight:
                return None
            self._finish(request, FinishReason.ABORT)
            return RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT)
        self._cache_full_blocks(request, item.start)
        return self._append(request, tokens[request.request_id], now) if item.samples else None

    def _cache_full_blocks(self, request: Request, start: int) -> None:
        """Make the blocks findable that were filled by computing positions start : num_computed."""
        size, end = self._blocks.block_size, request.num_computed
        if not self._blocks.has_prefix_cache or start // size == end // size:
            return
        self._blocks.extend_hashes(request.block_hashes, self._namespace(request), request.token_ids, end)
        for index in range(start // size, end // size):
            self._blocks.cache(request.blocks[index], request.block_hashes[index])

    def _append(self, request: Request, token: int, now: float) -> RequestOutput:
        request.token_ids.append(token)
        is_first = request.num_output == 1
        reason, stop_token_id = self._stop(request, token)
        if reason is not None:
            self._finish(request, reason)
        elif self.limits.rope_switch is not None and len(request.token_ids) == self.limits.rope_switch + 1:
            request.block_hashes.clear()  # of the short variant; all its KV must be computed with the long one
            self._preempt(request)
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[token],
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=request.num_cached if is_first else None,
            phases=_phases(request, now) if is_first else None,
        )

    def _stop(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        """Why `token`, just appended, is the request's last, and the client's stop id if it is one."""
        params = request.params
        if request.num_output > params.min_tokens:  # a stop id at an index below min_tokens does not stop
            if token in self._eos and not params.ignore_eos:
                return FinishReason.STOP, None
            if token in params.stop_token_ids:
                return FinishReason.STOP, token
        if request.num_output >= params.max_tokens or len(request.token_ids) >= self._max_len:
            return FinishReason.LENGTH, None
        return None, None

    # --- what it holds ---------------------------------------------------------------------------------------

    def stats(self) -> StepStats:
        """The fields of StepStats that the scheduler knows."""
        queues = [queue for queue in self._queues if queue.key]
        return StepStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - len(self._running),
            running_adapters=tuple(sorted({queue.name for queue in queues if queue.num_running})),
            waiting_adapters=tuple(sorted({queue.name for queue in queues if queue.waiting})),
            kv_usage=self._blocks.usage,
            prefix_queries=self._blocks.num_queried_tokens,
            prefix_hits=self._blocks.num_hit_tokens,
            preemptions=self.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Assert that every request is in exactly one place and owns what its state says, and nothing leaks."""
        self._blocks.check_integrity(request.blocks for request in self._running.values())
        waiting = [request for queue in self._queues for request in queue.waiting.values()]
        pending = [request for requests in self._pending.values() for request in requests.values()]
        everyone = [*self._running.values(), *waiting, *pending]
        assert {id(r) for r in everyone} == {id(r) for r in self._requests.values()}, "a request was lost"
        assert len(everyone) == len(self._requests), "a request is in two places"
        for request in self._running.values():
            assert request.state is RequestState.RUNNING
            assert (request.slot != 0) == (request.adapter is not None), (
                "a running adapter request needs a slot"
            )
        for request in [*waiting, *pending]:
            assert not (request.blocks or request.slot or request.is_in_flight), "who waits owns nothing"
        assert all(r.state is RequestState.WAITING for r in waiting)
        assert set(self._pending_since) == {r.request_id for r in pending}
        unstarted = {r.request_id for r in waiting if not r.num_preemptions}
        fresh = {r.request_id for r in self._fresh}
        assert set(self._unstarted_since) | fresh >= unstarted >= set(self._unstarted_since)
        for queue in self._queues:
            assert queue.num_running == sum(r.adapter_key == queue.key for r in self._running.values())


def _phases(request: Request, now: float) -> dict[str, float]:
    """Seconds in line, waiting for the adapter, and from the first rows to the first token."""
    started = request.first_scheduled_s
    adapter_wait_s = started - request.adapter_wait_s if request.adapter_wait_s else 0.0
    return {
        "queue_s": started - request.arrival_s - adapter_wait_s,
        "adapter_wait_s": adapter_wait_s,
        "prefill_s": now - started,
    }
