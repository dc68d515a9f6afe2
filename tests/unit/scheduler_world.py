"""The scheduler with all its real parts and a model small enough to know every answer beforehand.

The model's next token is a checksum of (adapter, rotary variant, all tokens so far). Its KV is a list that
says, per position, whose it is and of which tokens. So a step that would read a wrong block, a stale one
or one of another adapter or tenant is seen at once, and every answer can be worked out without an engine.

A dispatched step is run at once, as a device runs its queue in order; what it drew is told at collect. Until then
only the table of last tokens has it, and rows that need it have to find it there.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from adapters_store.ref import AdapterRef
from server.adapters.slots import AdapterSlots
from server.engine.batch import Batch, BatchBuilder, ScheduledRequest, StepPlan, StepResult
from server.engine.blocks import BlockPool
from server.engine.limits import SchedulerLimits
from server.engine.messages import RequestError, RequestOutput, SamplingParams, TokenLogprobs
from server.engine.request import NOT_FINITE, FinishReason, Request, RequestState
from server.engine.scheduler import Scheduler
from tests.unit.byte_device import PAGE, ByteDevice, make_ref

VOCAB = 50
EOS = 7
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_step_tokens": 32,
    "max_adapters_per_step": 8,
    "max_model_len": 64,
    "eos_token_ids": (EOS,),
}


def adapter(name: str, pages: int = 1) -> AdapterRef:
    """An adapter whose image takes so many pages of the arena."""
    return make_ref(f"image-{name}", pages * PAGE, name)


def known_logprobs(image_key: str, token_ids: Sequence[int], position: int) -> TokenLogprobs:
    """What the model says of the token at `position`: a checksum of who asks, and of all up to it."""
    seen = zlib.crc32(repr((image_key, list(token_ids[: position + 1]))).encode())
    return TokenLogprobs(token_ids[position], -float(seen), 1)


def next_token(image_key: str, rope: str, token_ids: Sequence[int]) -> int:
    return zlib.crc32(repr((image_key, rope, list(token_ids))).encode()) % VOCAB


class World:
    """A scheduler over real blocks, slots and batches. Steps run only when the test says so."""

    def __init__(
        self,
        *,
        num_blocks: int = 65,
        block_size: int = 4,
        arena_pages: int = 8,
        max_slots: int = 32,
        has_prefix_cache: bool = True,
        **limits: Any,
    ) -> None:
        self.now = 1000.0
        self.limits = SchedulerLimits(**(DEFAULTS | limits))
        self.blocks = BlockPool(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
        self.device = ByteDevice(bytearray(arena_pages * PAGE))
        self.slots = AdapterSlots(
            arena_bytes=arena_pages * PAGE, max_slots=max_slots, device=self.device, clock=lambda: self.now
        )
        self.scheduler = Scheduler(self.limits, self.blocks, self.slots)
        self.max_len = min(self.limits.max_model_len, (num_blocks - 1) * block_size)
        self.batches = BatchBuilder(self.limits.max_step_tokens, self.limits.max_num_seqs, num_blocks, block_size)
        self.kv: list[object] = [None] * (num_blocks * block_size)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.table: dict[int, int] = {}  # the device's last tokens, by place
        self.drawing: dict[Request, list[int]] = defaultdict(list)  # tokens drawn by steps in flight, in order
        self.broken: set[str] = set()  # ids of requests whose logits are NaN from now on
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)
        self.ended: dict[str, str] = {}  # terminal events
        self.queued: dict[str, list[str]] = defaultdict(list)  # by image key: ids in order of their WAITING
        self.started: list[str] = []  # ids in order of their first admission

    # --- what the engine's loop would do -----------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: Sequence[int] | int = 4,
        ref: AdapterRef | None = None,
        *,
        pending: str | None = None,
        salt: str = "",
        priority: int = 0,
        max_tokens: int = 4,
        ignore_eos: bool = True,
        **params: Any,
    ) -> Request:
        """Add a request; a number stands for a prompt of so many tokens, all its own."""
        if isinstance(prompt, int):
            prompt = [zlib.crc32(f"{request_id}/{i}".encode()) % VOCAB for i in range(prompt)]
        request = Request(
            request_id=request_id,
            token_ids=list(prompt),
            num_prompt=len(prompt),
            params=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **params),
            cache_salt=salt,
            arrival_s=self.now,
            pending_key=pending,
            adapter=ref,
            priority=priority,
        )
        self.requests[request_id] = request
        refusal = self.scheduler.add(request)
        if refusal is not None:
            self._end(request_id, "refused")
        elif request.state is RequestState.WAITING:
            self.queued[request.adapter_key].append(request_id)
            if ref is not None:
                self.slots.prefetch(ref)
        return request

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        pending = [r for r in self.requests.values() if r.state is RequestState.PENDING]
        self.scheduler.adapter_ready(key, ref)
        self.slots.prefetch(ref)
        self.queued[ref.image_key] += [r.request_id for r in pending if r.state is RequestState.WAITING]

    def finish_loads(self) -> None:
        while self.device.pending:
            self.device.finish(0)

    def poll(self) -> None:
        for key, error in self.slots.poll():
            self.scheduler.load_failed(key, RequestError(503, "adapter_unavailable", str(error)))

    def schedule(self) -> StepPlan:
        """Schedule, check the plan's bounds, and run it; its results wait for collect()."""
        self.poll()
        running = [r for r in self.requests.values() if r.state is RequestState.RUNNING]
        was_free = {r.request_id: r.num_preemptions for r in running if not r.is_in_flight}
        plan = self.scheduler.schedule(self.now)
        self._check_victims([r for r in running if r.request_id in was_free], was_free)
        for request in plan.ended:
            assert request.finish_reason is not None
            self._end(request.request_id, str(request.finish_reason))
        self._check_bounds(plan, {r.request_id for r in running})
        self._note_started()
        if plan.items:
            self._dispatch(plan)
        return plan

    def collect(self) -> list[RequestOutput]:
        plan, result = self.in_flight.popleft()
        for item in plan.items:
            self.device.in_use[item.request.slot] -= 1
            if item.samples:
                self.drawing[item.request].pop(0)
        outputs = self.scheduler.collect(plan, result, self.now)
        for output in outputs:
            self.outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                self._end(output.request_id, str(output.finish_reason))
        return outputs

    def step(self, *, is_loading: bool = False, seconds: float = 0.01) -> dict[str, int]:
        """Schedule a step, and collect the oldest one once `steps_in_flight` are, or there is nothing to schedule.

        The rows of each request in what was scheduled. Loads finish first unless `is_loading`.
        """
        if not is_loading:
            self.finish_loads()
        plan = self.schedule()
        self.now += seconds
        if self.in_flight and (len(self.in_flight) >= self.limits.steps_in_flight or not plan.items):
            self.collect()
        return {item.request.request_id: item.num_tokens for item in plan.items}

    def run(self, max_steps: int = 2000) -> None:
        """Step until everything has ended, and was collected."""
        self.run_until(lambda: not (self.scheduler.has_work or self.in_flight), max_steps)

    def run_until(
        self, is_reached: Callable[[], bool], max_steps: int = 500, *, seconds: float = 0.01
    ) -> dict[str, int]:
        """Step until something is so; the rows of the last step."""
        rows: dict[str, int] = {}
        for _ in range(max_steps):
            if is_reached():
                return rows
            rows = self.step(seconds=seconds)
        raise AssertionError(f"not reached in {max_steps} steps: {self.scheduler.stats()}")

    # --- what must hold ----------------------------------------------------------------------------------

    def answer(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def expected(self, request: Request) -> list[int]:
        """The request's whole answer, from the model alone."""
        params = request.params
        tokens = request.token_ids[: request.num_prompt]
        answer: list[int] = []
        while len(answer) < params.max_tokens and len(tokens) < self.max_len:
            token = next_token(request.adapter_key, self._rope(len(tokens)), tokens)
            answer.append(token)
            tokens = [*tokens, token]
            is_eos = token == EOS and not params.ignore_eos
            if len(answer) > params.min_tokens and (is_eos or token in params.stop_token_ids):
                break
        return answer

    def check(self) -> None:
        """All that must hold between any two calls."""
        self.scheduler.check_integrity()
        self.slots.check_integrity()
        refs: dict[str, int] = defaultdict(int)
        in_flight = {item.request for plan, _ in self.in_flight for item in plan.items}
        for request in self.requests.values():
            is_leaving = request.state is RequestState.FINISHED and request in in_flight
            is_owner = request.state is RequestState.RUNNING or is_leaving
            if is_owner and request.slot:
                assert self.slots.holds(request.slot, request.adapter_key)
                refs[request.adapter_key] += 1
            is_told = request.request_id in self.ended or request in self.scheduler._ended
            assert (request.state is RequestState.FINISHED) == is_told
            assert bool(request.blocks) == is_owner and (is_owner or not request.slot)
            assert request.is_in_flight == (request in in_flight)
        held = {key: image.refs for key, image in self.slots._images.items() if image.refs}
        assert held == dict(refs), "slot refs are not the requests of each adapter that have or had rows"

    def check_ended(self) -> None:
        """Everything has ended: right answers, one terminal event each, and nothing left behind."""
        self.check()
        assert not self.in_flight and not self.scheduler.has_work and not self.scheduler.num_pending
        assert set(self.ended) == set(self.requests)
        assert self.blocks.num_free == self.blocks.num_usable, "blocks leaked"
        for request_id, request in self.requests.items():
            answer, expected = self.answer(request_id), self.expected(request)
            self.check_logprobs(request)
            if self.ended[request_id] in (FinishReason.STOP, FinishReason.LENGTH):
                assert answer == expected, f"{request_id}: {answer} is not {expected}"
            else:
                assert answer == expected[: len(answer)]

    def check_logprobs(self, request: Request) -> None:
        """Those of the prompt come once, with the first output; a token's with the token; none unasked."""
        outputs = self.outputs[request.request_id]
        has_output = bool(outputs) and outputs[0].num_cached_tokens is not None
        wanted = [
            known_logprobs(request.adapter_key, request.token_ids, position)
            for position in range(1, request.num_prompt)
        ]
        is_told = has_output and request.params.prompt_logprobs is not None
        given = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        assert given == ([wanted] if is_told else [])
        assert not is_told or outputs[0].prompt_logprobs is not None, "they came late"
        position = request.num_prompt
        for output in outputs:
            if request.params.logprobs is None:
                assert output.logprobs is None
                continue
            for token, logprobs in zip(output.token_ids, output.logprobs or (), strict=True):
                assert logprobs == known_logprobs(request.adapter_key, [*request.token_ids[:position], token], position)
                position += 1

    def _rope(self, num_known: int) -> str:
        switch = self.limits.rope_switch
        return "" if switch is None else "long" if num_known > switch else "short"

    def _end(self, request_id: str, reason: str) -> None:
        assert request_id not in self.ended, f"{request_id} ended twice: {self.ended[request_id]}, {reason}"
        self.ended[request_id] = reason

    def _check_bounds(self, plan: StepPlan, ran_before: set[str]) -> None:
        requests = [item.request for item in plan.items]
        assert len({r.request_id for r in requests}) == len(requests) <= self.limits.max_num_seqs
        assert plan.num_rows <= self.limits.max_step_tokens
        keys = {r.adapter_key for r in requests} - {""}
        assert len(keys) <= self.limits.max_adapters_per_step
        logprob_rows = sum(len(item.logprob_positions) for item in plan.items)
        assert logprob_rows <= (self.limits.max_logprob_rows or self.limits.max_step_tokens)
        assert all(item.num_tokens > 0 for item in plan.items)
        decodes = [i for i in plan.items if i.samples and i.num_tokens == 1 and i.request.request_id in ran_before]
        if decodes and self.limits.max_mixed_prefill is not None:
            assert plan.num_rows - len(decodes) <= self.limits.max_mixed_prefill
        running = [r for r in self.requests.values() if r.state is RequestState.RUNNING]
        assert len(running) <= self.limits.max_num_seqs

    def _check_victims(self, running: list[Request], num_preemptions: dict[str, int]) -> None:
        """Who was preempted in this schedule is of no more priority than any that it could have taken instead."""
        victims = [r for r in running if r.num_preemptions > num_preemptions[r.request_id]]
        kept = [r for r in running if r.state is RequestState.RUNNING and r not in victims]
        if victims and kept:
            assert min(r.priority for r in victims) >= max(r.priority for r in kept), "a victim of too much priority"

    def _note_started(self) -> None:
        """First come, first served inside an adapter and priority: nobody starts before one who waited longer."""
        running = [r for r in self.requests.values() if r.state is RequestState.RUNNING]
        new = [r for r in running if r.request_id not in self.started]
        self.started += [r.request_id for r in new]
        for request in new:
            line = self.queued[request.adapter_key]
            place = line.index(request.request_id)
            ahead = [i for i in line if (self.requests[i].priority, line.index(i)) < (request.priority, place)]
            assert all(i in self.started or i in self.ended for i in ahead), f"{request.request_id} overtook in {ahead}"

    def _dispatch(self, plan: StepPlan) -> None:
        """The model's part: write the rows' KV, then read each request's whole context."""
        batch = self.batches.build(plan)
        places = dict(zip(batch.unknown_rows.tolist(), batch.unknown_places.tolist(), strict=True))
        known = {item.request: [*item.request.token_ids, *self.drawing[item.request]] for item in batch.items}
        for item, first, end in zip(batch.items, batch.query_starts[:-1], batch.query_starts[1:], strict=True):
            request = item.request
            if request.slot:
                assert self.device.table[request.slot][0].image_key == request.adapter_key
            self.device.in_use[request.slot] += 1
            for row in range(first, end):
                position = int(batch.positions[row])
                token = self.table[places.pop(row)] if row in places else batch.ids[row]
                assert token == known[request][position], f"{request.request_id}@{position} runs with another token"
                assert batch.rope_lengths[row] == len(known[request]) == request.length - item.samples
                kv_slot = int(batch.kv_slots[row])
                assert kv_slot >= self.blocks.block_size, "a row writes to the dummy block"
                self.kv[kv_slot] = self._content(request, known[request][: position + 1], int(batch.rope_lengths[row]))
        assert not places
        result = StepResult()
        for index, item in enumerate(batch.items):
            request = item.request
            table = batch.block_tables[index].tolist()
            for position in range(batch.context_lens[index]):
                block, offset = divmod(position, self.blocks.block_size)
                seen = self.kv[table[block] * self.blocks.block_size + offset]
                wanted = self._content(request, known[request][: position + 1], len(known[request]))
                assert seen == wanted, f"{request.request_id}@{position} reads {seen}, not {wanted}"
            if item.samples:
                self._draw(item, known[request], result)
            if item.logprob_positions:
                result.prompt_logprobs[request.request_id] = [
                    known_logprobs(request.adapter_key, request.token_ids, position + 1)
                    for position in item.logprob_positions
                ]
        self._check_head_rows(batch)
        for item, place in zip(batch.sample_items, batch.sample_places, strict=True):
            self.table[place] = self.drawing[item.request][-1]
        assert len(set(batch.sample_places)) == len(batch.sample_items), "two requests share a place"
        self.in_flight.append((plan, result))

    def _draw(self, item: ScheduledRequest, tokens: list[int], result: StepResult) -> None:
        """The token that follows `tokens`."""
        request = item.request
        assert request.draw_index == len(tokens) - request.num_prompt
        assert request.draw_index < max(1, request.params.max_tokens), "its end by length was known"
        assert len(tokens) < self.max_len or not request.params.max_tokens, "its end by length was known"
        assert not (request.reads_last_token and self.drawing[request]), "it draws by tokens that the host lacks"
        is_broken = request.request_id in self.broken
        token = NOT_FINITE if is_broken else next_token(request.adapter_key, self._rope(len(tokens)), tokens)
        result.tokens[request.request_id] = token
        self.drawing[request].append(max(token, 0))
        logprobs = known_logprobs(request.adapter_key, [*tokens, token], len(tokens))
        result.logprobs[request.request_id] = logprobs

    def _check_head_rows(self, batch: Batch) -> None:
        """The head sees the last row of who samples, then the rows of all positions that give prompt logprobs."""
        rows = {
            (item.request.request_id, item.start + offset): first + offset
            for item, first in zip(batch.items, batch.query_starts[:-1], strict=True)
            for offset in range(item.num_tokens)
        }
        sampled = [rows[item.request.request_id, item.start + item.num_tokens - 1] for item in batch.sample_items]
        given = [rows[item.request.request_id, p] for item in batch.prompt_items for p in item.logprob_positions]
        assert batch.head_rows.tolist() == sampled + given and len(set(sampled + given)) == len(sampled + given)
        assert batch.prompt_items == [item for item in batch.items if item.logprob_positions]

    def _content(self, request: Request, prefix: list[int], num_known: int) -> object:
        return request.adapter_key, request.cache_salt, self._rope(num_known), tuple(prefix)
