"""One engine request as the operator sees it: its share in the metrics and in the access log's line."""

from __future__ import annotations

import time
from collections.abc import Mapping

from server.api.access_log import current_entry
from server.api.door import current_ticket
from server.metrics import Metrics, RequestEnd, Siblings


class RequestMeter:
    """Told of a request's events, in order: sent(), start() with the first output, tokens() with every one, end() once.

    The line in the log sums over the engine requests of one HTTP request (its choices).
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        model: str,
        is_adapter: bool,
        prompt_ids: list[int],
        max_tokens: int,
        arrival_s: float,
        siblings: Siblings,
    ) -> None:
        """`model` is the name that answers; `arrival_s` is time.time() at the request's arrival."""
        self._metrics = metrics
        self._num_prompt = len(prompt_ids)
        self._prompt_key = id(prompt_ids)  # the choices of a prompt share its list
        self._max_tokens = max_tokens
        self._arrival_s = arrival_s
        self._siblings = siblings
        self._num_output = 0
        self._last_s = 0.0  # when the last output came; 0 = none yet
        self._first_s = 0.0
        self._phases: Mapping[str, float] = {}
        self._ticket = current_ticket()
        self._tally = metrics.adapters.of(model) if is_adapter else None
        self._entry = current_entry()
        self._entry.asked(model, is_adapter=is_adapter)
        self._entry.prompt(self._prompt_key, self._num_prompt, 0)

    def sent(self) -> None:
        """The engine gets it in this turn of the event loop."""
        self._ticket.sent()

    def start(self, *, image_key: str, num_cached: int, phases: Mapping[str, float]) -> None:
        """The first output came. `phases`: seconds by phase, the engine's queue_s, adapter_wait_s, prefill_s in it."""
        self._first_s = time.time()
        self._phases = phases
        ttft_s = self._first_s - self._arrival_s
        self._metrics.first_token(self._num_prompt, ttft_s)
        if self._tally is not None:
            self._tally.started(self._num_prompt, ttft_s)
        self._entry.started(image_key, ttft_s)
        self._entry.prompt(self._prompt_key, self._num_prompt, num_cached)

    def tokens(self, count: int) -> None:
        """An output of `count` tokens came."""
        now = time.time()
        self._metrics.tokens(count, now - self._last_s if self._last_s else None)
        if self._tally is not None:
            self._tally.generated(count)
        self._num_output += count
        self._last_s = now

    def end(self, reason: str) -> None:
        """It ended: one of FINISH_REASONS."""
        now = time.time()
        queue_s = self._phases.get("queue_s", 0.0) + self._phases.get("adapter_wait_s", 0.0)
        self._metrics.request_end(
            reason,
            now - self._arrival_s,
            RequestEnd(
                num_prompt=self._num_prompt,
                num_output=self._num_output,
                max_tokens=self._max_tokens,
                queue_s=queue_s,
                prefill_s=self._phases.get("prefill_s", 0.0),
                decode_s=self._last_s - self._first_s,
            )
            if self._first_s
            else None,
        )
        if self._tally is not None:
            self._tally.ended(is_error=reason == "error")
        self._metrics.choice_end(self._siblings, self._num_output)
        self._entry.ended(reason, self._num_output)
