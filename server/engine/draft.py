"""A step being planned: who gets its rows, under the bounds on a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.batch import ScheduledRequest, StepPlan
from server.engine.limits import SchedulerLimits
from server.engine.request import Request


@dataclass(slots=True)
class Draft:
    """What is left of a step, and what was given out."""

    now: float
    budget: int  # rows left
    logprob_rows: int  # of those, how many may give prompt logprobs
    max_adapters: int
    adapters: set[str]  # image keys that have or may have rows in it
    plan: StepPlan = field(default_factory=StepPlan)

    @classmethod
    def of(cls, limits: SchedulerLimits, now: float, adapters: set[str]) -> Draft:
        """An empty one."""
        rows = limits.max_step_tokens
        return cls(now, rows, limits.max_logprob_rows or rows, limits.max_adapters_per_step, adapters)

    def has_place_for(self, image_key: str) -> bool:
        """Whether rows of this adapter are within the bound on distinct ones."""
        return not image_key or image_key in self.adapters or len(self.adapters) < self.max_adapters

    def give_rows(self, request: Request) -> ScheduledRequest | None:
        """As many of its remaining tokens as there are rows for; None: not one."""
        count = min(request.num_remaining, self.budget)
        start = request.num_scheduled
        positions = request.prompt_logprob_positions(start, count)
        if len(positions) > self.logprob_rows:
            positions = positions[: self.logprob_rows]
            count = positions.stop - start
            if not count:
                return None
        samples = start + count == request.length
        item = ScheduledRequest(request, start, count, samples, positions)
        self.plan.items.append(item)
        self.budget -= count
        self.logprob_rows -= len(positions)
        request.num_scheduled += count
        request.num_draws += samples
        request.is_in_flight = True
        return item
