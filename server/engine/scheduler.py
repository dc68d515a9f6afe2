"""Which requests get rows in the next step, and what became of the rows of the last one. No torch.

    add ──▶ PENDING ──adapter_ready──▶ WAITING ──admit──▶ RUNNING ──stop──▶ FINISHED
                                          ▲                  │
                                          └──── preempt ─────┘ (blocks and slot ref given up)

A step, one mixed batch under a token budget: decodes, then prefill chunks of running requests, then
admissions. Nothing here waits: what can't go now is passed over and ages.

- A running request owns the blocks of all its tokens and, with an adapter, a ref on its slot. Both are taken at
  admission and given up when it finishes or is preempted, never while rows are in flight.
- num_scheduled advances in schedule(), num_computed in collect(). With steps_in_flight 2 a request gets its next
  row while its token is being drawn, which only the device knows then. If that token ends it, the row in flight
  is one too many: its terminal event goes out at once, and what it holds goes when that row was collected.
- Who is to make way with rows in flight rests: it gets no more, and makes way at the next schedule().
- Fair shares: adapters are served by weight, in tokens (shares.py). The least served is admitted first
  (queues.py); a running one that is far ahead of it makes way (admission.py), and its prompts go on only with
  the rows that admissions leave.
- Distinct adapters: a step has at most max_adapters_per_step. New adapters are admitted up to that bound;
  beyond it only aged or preempted ones are, and then the running adapters take turns, the longest unserved
  first.
- More hot adapters than fit the arena: those that are there go first, within a quantum, so that one load serves
  all who wait for it; the next in line are loaded meanwhile.
- Drain: when the arena has been FULL for one adapter for longer than the age limit, no other adapter may
  take a slot, and the running adapter that will be idle soonest admits nothing more; one after another, until
  there is room. At the latest the arena has no refs left, and then it fits.
- Preemption: when blocks run out, the request of least priority goes first, of equals the latest admitted;
  it keeps its tokens. The first in that order never has to go, so something always finishes.
- Priority, lower first, decides admission before all else, and who takes rows and blocks first in a step.

The parts: `queues` and `shares` say whose turn it is, `admission` and `drain` who comes to run, `draft` has what is
left of a step, `outcomes` applies results, `waits` knows who has waited for too long.
"""

from __future__ import annotations

from collections.abc import Iterable

from adapters_store.ref import AdapterRef
from server.adapters.slots import Acquire
from server.engine.admission import Admission
from server.engine.batch import StepPlan, StepResult
from server.engine.blocks import BlockPool
from server.engine.draft import Draft
from server.engine.limits import SchedulerLimits
from server.engine.messages import RequestError, RequestOutput, StepStats
from server.engine.outcomes import Outcomes
from server.engine.queues import AdapterQueue, Turn, WaitingQueues
from server.engine.request import NO_PLACE, FinishReason, Request, RequestState, priority_of
from server.engine.running import RunningSet, Slots
from server.engine.shares import FairShares
from server.engine.waits import Waits


class Scheduler:
    """Owns every live request. All calls come from the engine's thread; collects come in schedule order."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool, slots: Slots) -> None:
        self.limits = limits
        self.num_preemptions = 0
        self._blocks = blocks
        self._max_len = min(limits.max_model_len, blocks.num_usable * blocks.block_size)
        self._num_turns = 0
        self._requests: dict[str, Request] = {}
        self._running = RunningSet(blocks, slots, limits)
        self._queues = WaitingQueues(limits, slots.is_ready, slots.want)
        self._shares = FairShares(limits)
        self._waits = Waits(limits)
        self._pending: dict[str, dict[str, Request]] = {}  # by pending key
        self._resting: set[Request] = set()  # no rows in this step, so that they can make way in the next
        self._admission = Admission(
            limits,
            self._queues,
            self._running,
            slots,
            self._shares,
            preempt=self._make_yield,
            rest=self._resting.add,
            started=self._started,
            load_failed=self.load_failed,
        )
        self._outcomes = Outcomes(
            self._running,
            eos_token_ids=limits.eos_token_ids,
            max_len=self._max_len,
            finish=self._finish,
            preempt=self._preempt,
        )
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
            self._waits.add(request)
        else:
            self._enqueue(request)
        return None

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        """The image behind a pending key is on disk: its requests may be scheduled."""
        for request in self._pending.pop(key, {}).values():
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
        return self._waits.num_pending

    def set_weight(self, name: str, weight: float) -> None:
        """From now on adapter `name` ("" for the base) is served in proportion to `weight`; 1 unless told.

        Raises ValueError for a weight out of bounds; see limits.py.
        """
        self._shares.set_weight(name, weight)

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
        self._waits.add(request)

    def _end(self, request: Request, reason: FinishReason, error: RequestError | None = None) -> None:
        """Finish a request outside of collect(): its terminal event goes with the next plan."""
        self._finish(request, reason, error)
        self._ended.append(request)

    def _finish(self, request: Request, reason: FinishReason, error: RequestError | None = None) -> None:
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
        self._waits.remove(request)
        del self._requests[request.request_id]
        _close(request, reason, error)

    # --- a step begins -------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """Pick the rows of the next step. `now`: the monotonic clock that arrival_s is on."""
        self._expire(now)
        self._resting.clear()
        turns = self._queues.turns(now)
        self._admission.make_way(now, turns)
        ready = [request for request in self._running if self._is_due(request)]
        chosen = self._choose_adapters(ready)
        draft = Draft.of(self.limits, now, chosen)
        self._schedule_running(draft, [r for r in ready if r.adapter is None or r.adapter_key in chosen], turns)
        draft.plan.ended, self._ended = self._ended, []
        return draft.plan

    def _is_due(self, request: Request) -> bool:
        """Whether a running request may have rows now."""
        if request.num_remaining <= 0 or request.abort_requested:
            return False
        if request.num_draws == 0:
            return True
        return request.num_draws < self.limits.steps_in_flight and self._outcomes.may_run_ahead(request)

    def _expire(self, now: float) -> None:
        """End what has waited for too long without ever having run."""
        self._waits.look(now)
        for request in self._waits.expired(now):
            self._end(request, FinishReason.ERROR, self._expiry(request))

    def _expiry(self, request: Request) -> RequestError:
        after = self.limits.retry_after_s
        if request.state is RequestState.PENDING:
            message = f"The adapter could not be made ready within {self.limits.max_pending_s:g} s."
            return RequestError(503, "adapter_unavailable", message, after)
        queue = self._queues.of(request)
        is_full = queue.last_answer is Acquire.FULL
        wanted = f"no device memory for adapter {queue.name!r}" if is_full else "no room for the request"
        message = f"The server is overloaded: {wanted} in {self.limits.max_wait_s:g} s."
        return RequestError(503, "overloaded", message, after)

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

    def _schedule_running(self, draft: Draft, requests: list[Request], turns: list[Turn]) -> None:
        """Decodes, then prefill chunks, each by priority and in order of admission, then admissions.

        Prompts of an adapter that is far ahead of the first in line come after the admissions.
        """
        requests.sort(key=priority_of)
        prefills = [request for request in requests if request.num_remaining > 1]
        for request in requests:
            if request.num_remaining == 1 and self._is_here(request) and self._make_room(request):
                self._give_rows(request, draft)
        if draft.plan.items and self.limits.max_mixed_prefill is not None:
            draft.budget = min(draft.budget, self.limits.max_mixed_prefill)
        deferred = {r.request_id for r in prefills if self._is_deferred(r, turns)}
        self._prefill(draft, [r for r in prefills if r.request_id not in deferred])
        self._admission.admit(draft, turns)
        self._prefill(draft, [r for r in prefills if r.request_id in deferred])

    def _is_deferred(self, request: Request, turns: list[Turn]) -> bool:
        if not turns:
            return False
        first = self._queues.first_of(turns)
        is_equal = first.head.priority <= request.priority
        return is_equal and self._shares.is_ahead(self._queues.of(request), first)

    def _prefill(self, draft: Draft, requests: list[Request]) -> None:
        for request in requests:
            if draft.budget and self._is_here(request):
                self._give_rows(request, draft)

    def _is_here(self, request: Request) -> bool:
        """Whether a request that was due has not made way, and is not to make way in the next step."""
        return request.state is RequestState.RUNNING and request not in self._resting

    def _give_rows(self, request: Request, draft: Draft) -> None:
        item = draft.give_rows(request)
        if item is not None:
            self._shares.charge(self._queues.of(request), item)

    def _make_room(self, request: Request) -> bool:
        """Give a decode the block of its position, preempting the latest admitted as long as there is none.

        False: it sits this step out, preempted itself or because rows in flight hold what it needs.
        """
        while not self._running.grow(request):
            victim = self._running.victim_for(request)
            if victim is None:
                return False
            if victim.is_in_flight:
                self._resting.add(victim)
                return False
            self._make_yield(victim)
            if victim is request:
                return False
        return True

    def _make_yield(self, request: Request) -> None:
        self._preempt(request)
        self.num_preemptions += 1

    def _preempt(self, request: Request) -> None:
        """Back to the front of the line with its tokens, to be computed anew."""
        assert not request.is_in_flight, f"request {request.request_id!r} has rows in flight"
        self._queues.of(request).num_running -= 1
        self._running.give_up(request)
        request.num_computed = request.num_scheduled = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._queues.push_front(request)

    def _started(self, request: Request, draft: Draft) -> None:
        """It was admitted: rows at once if the step has a place for its adapter."""
        self._waits.remove(request)
        if request.num_preemptions == 0:
            request.first_scheduled_s = draft.now
        if draft.has_place_for(request.adapter_key):
            if request.adapter is not None:
                draft.adapters.add(request.adapter_key)
                self._give_turn(self._queues.of(request))
            self._give_rows(request, draft)

    # --- a step's results ----------------------------------------------------------------------------------

    def collect(self, plan: StepPlan, result: StepResult, now: float) -> list[RequestOutput]:
        """Apply the results of the oldest uncollected plan."""
        return self._outcomes.collect(plan, result, now)

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
            assert request.place == NO_PLACE
        assert all(r.state is RequestState.WAITING for r in waiting)
        self._waits.check_integrity(waiting, pending)
        for queue in self._queues:
            assert queue.num_running == sum(r.adapter_key == queue.key for r in self._running)


def _close(request: Request, reason: FinishReason, error: RequestError | None) -> None:
    request.state = RequestState.FINISHED
    request.finish_reason = reason
    request.error = error


def _names(queues: Iterable[tuple[AdapterQueue, Iterable[Request]]]) -> tuple[str, ...]:
    """The adapters that requests named, sorted. Only queues of several names need a look at each request."""
    found: set[str] = set()
    for queue, requests in queues:
        if len(queue.names) == 1:
            found |= queue.names
        else:
            found |= {r.adapter.name for r in requests if r.adapter is not None and r.adapter_key == queue.key}
    return tuple(sorted(found))
