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
- Preemption: when blocks run out, the request of least priority goes first, of equals the latest admitted;
  it keeps its tokens. The first in that order never has to go, so something always finishes.
- Priority, lower first, decides admission before all else, and who takes rows and blocks first in a step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from adapters_store.errors import AdapterTooLarge
from adapters_store.ref import AdapterRef
from server.adapters.slots import Acquire
from server.engine.batch import ScheduledRequest, StepPlan, StepResult
from server.engine.blocks import BlockPool
from server.engine.drain import Drain
from server.engine.limits import SchedulerLimits
from server.engine.messages import RequestError, RequestOutput, StepStats
from server.engine.queues import AdapterQueue, WaitingQueues
from server.engine.request import NO_TOKEN, NOT_FINITE, FinishReason, Request, RequestState, priority_of
from server.engine.running import RunningSet, Slots


@dataclass(slots=True)
class _Draft:
    """A step being planned."""

    now: float
    budget: int  # rows left
    logprob_rows: int  # of those, how many may give prompt logprobs
    adapters: set[str]  # image keys that have or may have rows in it
    plan: StepPlan = field(default_factory=StepPlan)


_OVERFLOW = RequestError(
    status=500,
    code="not_finite",
    message="The model's output for this request is not finite (NaN or infinity), so no token can be drawn. "
    "With an adapter, its weights overflow in the base's dtype.",
)
_NOTHING_TO_DRAW = RequestError(
    status=400,
    code="no_token_allowed",
    message="No token is left to draw: allowed_token_ids, bad_words and min_tokens together rule out all of them.",
)
_FAILURES = {NOT_FINITE: _OVERFLOW, NO_TOKEN: _NOTHING_TO_DRAW}  # by what stands in place of a sampled id


class Scheduler:
    """Owns every live request. All calls come from the engine's thread; collects come in schedule order."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool, slots: Slots) -> None:
        self.limits = limits
        self.num_preemptions = 0
        self._blocks = blocks
        self._slots = slots
        self._max_len = min(limits.max_model_len, blocks.num_usable * blocks.block_size)
        self._eos = frozenset(limits.eos_token_ids)
        self._num_turns = 0
        self._requests: dict[str, Request] = {}
        self._running = RunningSet(blocks, slots, limits.rope_switch)
        self._queues = WaitingQueues(limits.age_limit_s)
        self._pending: dict[str, dict[str, Request]] = {}  # by pending key
        self._pending_since: dict[str, float] = {}  # by request id, ascending
        self._unstarted_since: dict[str, float] = {}  # WAITING and never admitted, by request id, ascending
        self._fresh: list[Request] = []  # became WAITING since the last schedule
        self._drain = Drain(self._queues)
        self._ended: list[Request] = []  # for the next plan

    # --- requests come and go ------------------------------------------------------------------------------

    def add(self, request: Request) -> RequestError | None:
        """Take a new request; or return why it can never run, and then keep nothing of it."""
        assert request.request_id not in self._requests, f"request id {request.request_id!r} is in use"
        assert request.num_prompt > 0, "an empty prompt has nothing to run"
        refusal = self._refusal(request)
        if refusal is not None:
            _close(request, FinishReason.ERROR, refusal)
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
        if request.num_prompt + min(1, request.params.max_tokens) <= self._max_len:
            return None
        why = ""
        if self._max_len < self.limits.max_model_len:
            why = f" (the KV memory of this server bounds it; the model has {self.limits.max_model_len})"
        message = (
            f"This model's maximum context length is {self._max_len} tokens{why}, and the prompt has "
            f"{request.num_prompt}: that leaves no room for an answer."
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
            self._queues.of(request).num_running -= 1
            self._running.give_up(request)
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
        _close(request, reason, error)

    # --- a step begins -------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """Pick the rows of the next step. `now`: the monotonic clock that arrival_s is on."""
        self._expire(now)
        ready = [r for r in self._running if r.num_remaining > 0 and not r.abort_requested]
        chosen = self._choose_adapters(ready)
        logprob_rows = self.limits.max_logprob_rows or self.limits.max_step_tokens
        draft = _Draft(now, self.limits.max_step_tokens, logprob_rows, chosen)
        self._schedule_running(draft, [r for r in ready if r.adapter is None or r.adapter_key in chosen])
        self._admit(draft)
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
            queue = self._queues.of(request)
            is_full = queue.last_answer is Acquire.FULL
            wanted = f"no device memory for adapter {queue.name!r}" if is_full else "no room for the request"
            message = f"The server is overloaded: {wanted} in {self.limits.max_wait_s:g} s."
            self._end(request, FinishReason.ERROR, RequestError(503, "overloaded", message, after))
        for request in self._older_than(self._pending_since, now - self.limits.max_pending_s):
            message = f"The adapter could not be made ready within {self.limits.max_pending_s:g} s."
            self._end(request, FinishReason.ERROR, RequestError(503, "adapter_unavailable", message, after))

    def _older_than(self, since: dict[str, float], limit: float) -> Iterator[Request]:
        """Requests of an ascending dict, from the front; each ended before the next."""
        while since:
            request_id, start = next(iter(since.items()))
            if start > limit:
                return
            yield self._requests[request_id]

    def _choose_adapters(self, ready: list[Request]) -> set[str]:
        """The adapters of this step: all that could have rows, or those without any for the longest time."""
        keys = dict.fromkeys(request.adapter_key for request in ready if request.adapter is not None)
        chosen = [self._queues[key] for key in keys]
        if len(chosen) > self.limits.max_adapters_per_step:
            chosen.sort(key=lambda queue: queue.last_turn)
            chosen = chosen[: self.limits.max_adapters_per_step]
        for queue in chosen:
            self._give_turn(queue)
        return {queue.key for queue in chosen}

    def _give_turn(self, queue: AdapterQueue) -> None:
        self._num_turns += 1  # every turn has a number of its own, so equals go round in a ring
        queue.last_turn = self._num_turns

    def _schedule_running(self, draft: _Draft, requests: list[Request]) -> None:
        """Decodes, then prefill chunks, each by priority and in order of admission."""
        requests.sort(key=priority_of)
        prefills = [request for request in requests if request.num_remaining > 1]
        for request in requests:
            is_next = request.num_remaining == 1 and request.state is RequestState.RUNNING
            if is_next and self._make_room(request, draft.plan):
                self._take_rows(request, draft)
        if draft.plan.items and self.limits.max_mixed_prefill is not None:
            draft.budget = min(draft.budget, self.limits.max_mixed_prefill)
        for request in prefills:
            if draft.budget and request.state is RequestState.RUNNING:
                self._take_rows(request, draft)

    def _take_rows(self, request: Request, draft: _Draft) -> None:
        count = min(request.num_remaining, draft.budget)
        start = request.num_scheduled
        positions = request.prompt_logprob_positions(start, count)
        if len(positions) > draft.logprob_rows:
            positions = positions[: draft.logprob_rows]
            count = positions.stop - start
            if not count:
                return
        samples = start + count == len(request.token_ids)
        draft.plan.items.append(ScheduledRequest(request, start, count, samples, positions))
        draft.budget -= count
        draft.logprob_rows -= len(positions)
        request.num_scheduled += count
        request.is_in_flight = True
        self._queues.of(request).served += count

    def _make_room(self, request: Request, plan: StepPlan) -> bool:
        """Give a decode the block of its position, preempting the latest admitted as long as there is none.

        False: it sits this step out, preempted itself or because rows in flight hold what it needs.
        """
        while not self._running.grow(request):
            victim = self._running.victim_for(request)
            if victim is None:
                return False
            self._preempt(victim)
            self.num_preemptions += 1
            plan.num_preempted += 1
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the front of the line with its tokens, to be computed anew."""
        self._queues.of(request).num_running -= 1
        self._running.give_up(request)
        request.num_computed = request.num_scheduled = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._queues.push_front(request)

    # --- admission -----------------------------------------------------------------------------------------

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
            request, prefix = queue.head, self._running.find_prefix(queue.head)
            if not self._running.can_start(request, prefix):
                return
            slot = self._acquire(request, queue, draft.now)
            if slot is not None:
                self._start(request, prefix, slot, draft)
                if queue.waiting:
                    heapq.heappush(turns, self._queues.turn(queue, draft.now))

    def _may_join(self, queue: AdapterQueue, draft: _Draft) -> bool:
        """Whether this adapter may have one more running request: drain and adapter bound."""
        if not queue.key:
            return True
        if not self._drain.may_admit(queue):
            return False
        may_exceed = queue.head.num_preemptions > 0 or self._queues.is_aged(queue, draft.now)
        return may_exceed or self._is_in_step(queue, draft)

    def _is_in_step(self, queue: AdapterQueue, draft: _Draft) -> bool:
        is_room = len(draft.adapters) < self.limits.max_adapters_per_step
        return not queue.key or queue.key in draft.adapters or is_room

    def _acquire(self, request: Request, queue: AdapterQueue, now: float) -> int | None:
        """Take a ref on the slot of the request's adapter; None: it can't be had now. The base has slot 0."""
        if request.adapter is None:
            return 0
        try:
            answer, slot = self._slots.acquire(request.adapter)
        except AdapterTooLarge as error:
            self.load_failed(queue.key, RequestError(error.http_status, error.code, error.message))
            return None
        if answer is Acquire.READY:
            return slot
        queue.hold(now, answer)
        if answer is Acquire.FULL:
            self._drain.widen(queue, self._running)
        return None

    def _start(self, request: Request, prefix: list[int], slot: int, draft: _Draft) -> None:
        """Into the running set; rows at once if the step has a place for its adapter."""
        queue = self._queues.of(request)
        self._queues.remove(request)
        queue.release_hold()
        queue.num_running += 1
        self._running.start(request, prefix, slot)
        if request.num_preemptions == 0:
            request.first_scheduled_s = draft.now
            del self._unstarted_since[request.request_id]
        if self._is_in_step(queue, draft):
            if queue.key:
                draft.adapters.add(queue.key)
                self._give_turn(queue)
            self._take_rows(request, draft)

    # --- a step's results ----------------------------------------------------------------------------------

    def collect(self, plan: StepPlan, result: StepResult, now: float) -> list[RequestOutput]:
        """Apply the results of the oldest uncollected plan."""
        outputs = [self._collect_item(item, result, now) for item in plan.items]
        return [output for output in outputs if output is not None]

    def _collect_item(self, item: ScheduledRequest, result: StepResult, now: float) -> RequestOutput | None:
        request = item.request
        assert request.is_in_flight, f"request {request.request_id!r} is collected twice"
        assert request.num_computed == item.start, "plans are collected in the order of their schedule()"
        request.num_computed = item.start + item.num_tokens
        request.is_in_flight = request.num_computed < request.num_scheduled
        if request.abort_requested:
            if request.is_in_flight:
                return None
            self._finish(request, FinishReason.ABORT)
            return RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT)
        self._running.cache_full_blocks(request, item.start)
        if item.logprob_positions:
            assert item.logprob_positions.start == len(request.prompt_logprobs), "a prompt logprob is lost or doubled"
            request.prompt_logprobs += result.prompt_logprobs[request.request_id]
        return self._append(request, result, now) if item.samples else None

    def _append(self, request: Request, result: StepResult, now: float) -> RequestOutput:
        token = result.tokens[request.request_id]
        is_first = request.num_output == 0
        error = _FAILURES.get(token)
        if is_first and any(math.isnan(position.logprob) for position in request.prompt_logprobs):
            error = _OVERFLOW
        if error is not None:
            self._finish(request, FinishReason.ERROR, error)
            return RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=error)
        new = [token] if request.params.max_tokens else []  # 0: only what the prompt gives is asked for
        request.token_ids += new
        logprobs = None if request.params.logprobs is None else [result.logprobs[request.request_id]][: len(new)]
        has_prompt_logprobs = request.params.prompt_logprobs is not None
        reason, stop_token_id = self._stop(request, token)
        if reason is not None:
            self._finish(request, reason)
        elif self._running.is_rope_crossed(request):
            request.block_hashes.clear()  # the other variant's; all KV must be computed anew
            self._preempt(request)
        return RequestOutput(
            request_id=request.request_id,
            token_ids=new,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=request.num_cached if is_first else None,
            phases=_phases(request, now) if is_first else None,
            logprobs=logprobs,
            prompt_logprobs=request.prompt_logprobs if is_first and has_prompt_logprobs else None,
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

    # --- what it holds -------------------------------------------------------------------------------------

    def stats(self) -> StepStats:
        """The fields of StepStats that the scheduler knows."""
        queues = [queue for queue in self._queues if queue.key]
        return StepStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - len(self._running),
            running_adapters=_names((queue, self._running) for queue in queues if queue.num_running),
            waiting_adapters=_names((queue, queue.waiting) for queue in queues if queue.waiting),
            kv_usage=self._blocks.usage,
            prefix_queries=self._blocks.num_queried_tokens,
            prefix_hits=self._blocks.num_hit_tokens,
            preemptions=self.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Assert that each request is in one place, owns what its state says, and that nothing leaks."""
        self._running.check_integrity()
        waiting = [request for queue in self._queues for request in queue.waiting]
        pending = [request for requests in self._pending.values() for request in requests.values()]
        everyone = [*self._running, *waiting, *pending]
        assert {id(r) for r in everyone} == {id(r) for r in self._requests.values()}, "a request was lost"
        assert len(everyone) == len(self._requests), "a request is in two places"
        for request in [*waiting, *pending]:
            assert not (request.blocks or request.slot or request.is_in_flight), "who waits owns nothing"
        assert all(r.state is RequestState.WAITING for r in waiting)
        assert set(self._pending_since) == {r.request_id for r in pending}
        unstarted = {r.request_id for r in waiting if not r.num_preemptions}
        fresh = {r.request_id for r in self._fresh}
        assert set(self._unstarted_since) | fresh >= unstarted >= set(self._unstarted_since)
        for queue in self._queues:
            assert queue.num_running == sum(r.adapter_key == queue.key for r in self._running)


def _close(request: Request, reason: FinishReason, error: RequestError | None) -> None:
    request.state = RequestState.FINISHED
    request.finish_reason = reason
    request.error = error


def _phases(request: Request, now: float) -> dict[str, float]:
    """Seconds in line, waiting for the adapter, and from the first rows to the first token."""
    started = request.first_scheduled_s
    held = request.adapter_wait_s or started
    return {
        "queue_s": held - request.arrival_s,
        "adapter_wait_s": started - held,
        "prefill_s": now - started,
    }


def _names(queues: Iterable[tuple[AdapterQueue, Iterable[Request]]]) -> tuple[str, ...]:
    """The adapters that requests named, sorted. Only queues of several names need a look at each request."""
    found: set[str] = set()
    for queue, requests in queues:
        if len(queue.names) == 1:
            found |= queue.names
        else:
            found |= {r.adapter.name for r in requests if r.adapter is not None and r.adapter_key == queue.key}
    return tuple(sorted(found))
