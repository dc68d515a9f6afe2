"""What became of a step's rows: tokens appended, requests ended, one output for each that drew a token."""

from __future__ import annotations

import math
from collections.abc import Callable

from server.engine.batch import ScheduledRequest, StepPlan, StepResult
from server.engine.messages import RequestError, RequestOutput
from server.engine.request import NO_TOKEN, NOT_FINITE, FinishReason, Request, RequestState
from server.engine.running import RunningSet

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

Finish = Callable[[Request, FinishReason, RequestError | None], None]


class Outcomes:
    """Applies the results of plans, in the order of their schedule(). `finish` and `preempt` are the scheduler's."""

    def __init__(
        self,
        running: RunningSet,
        *,
        eos_token_ids: tuple[int, ...],
        max_len: int,
        finish: Finish,
        preempt: Callable[[Request], None],
    ) -> None:
        self._running = running
        self._eos = frozenset(eos_token_ids)
        self._max_len = max_len
        self._finish = finish
        self._preempt = preempt

    def collect(self, plan: StepPlan, result: StepResult, now: float) -> list[RequestOutput]:
        """Apply the results of the oldest uncollected plan."""
        outputs = [self._collect_item(item, result, now) for item in plan.items]
        return [output for output in outputs if output is not None]

    def may_run_ahead(self, request: Request) -> bool:
        """Whether a row may follow one in flight that draws. Not where it is foreseen that the token will end the
        request or have all its KV computed anew, nor where the host needs the token for the next draw."""
        return (
            request.num_output + request.num_draws < request.params.max_tokens
            and request.length < self._max_len
            and not self._running.is_rope_crossed(request.length)
            and not request.reads_last_token
        )

    def _collect_item(self, item: ScheduledRequest, result: StepResult, now: float) -> RequestOutput | None:
        request = item.request
        assert request.is_in_flight, f"request {request.request_id!r} is collected twice"
        assert request.num_computed == item.start, "plans are collected in the order of their schedule()"
        request.num_computed = item.start + item.num_tokens
        request.num_draws -= item.samples
        request.is_in_flight = request.num_computed < request.num_scheduled
        if request.state is RequestState.FINISHED:  # the row was one too many: what it drew and wrote is nobody's
            if not request.is_in_flight:
                self._running.let_go(request)
            return None
        if request.abort_requested:
            if request.is_in_flight:
                return None
            self._finish(request, FinishReason.ABORT, None)
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
            self._finish(request, reason, None)
        elif self._running.is_rope_crossed(len(request.token_ids)):
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


def _phases(request: Request, now: float) -> dict[str, float]:
    """Seconds in line, waiting for the adapter, and from the first rows to the first token."""
    started = request.first_scheduled_s
    held = request.adapter_wait_s or started
    return {
        "queue_s": held - request.arrival_s,
        "adapter_wait_s": started - held,
        "prefill_s": now - started,
    }
