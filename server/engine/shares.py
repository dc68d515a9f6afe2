"""Fair shares between adapters: a virtual token counter for each, divided by its weight.

    cost of a step's rows = input_cost x prompt rows computed for the first time + output_cost x tokens drawn
    AdapterQueue.served  += cost / weight of the request's name

Prompt tokens found in the prefix cache are no rows and cost nothing. What is computed again after a preemption
was paid for: to preempt was this server's choice. The base is an adapter too, by the name "".

Turns go to the least served, and an adapter that comes back from idleness starts at the least served of those at
work (queues.py). That alone is fair among who waits, not against who already runs: so who runs and is far ahead
of who is in line yields to it (admission.py). "Far" is the quantum and what the server would compute again.

The bound. While two adapters of equal priority have requests in line whose images are on the device, the
difference of their counters stays below

    2 x quantum + (input_cost x most known tokens of a request + most cost of a step) / the lesser weight

One quantum until who runs makes way, one for the precedence of those that were preempted or are on the device
already. What is computed again counts in full before anyone makes way, so that costs less than it is for.
"""

from __future__ import annotations

from server.engine.batch import ScheduledRequest
from server.engine.limits import MAX_WEIGHT, MIN_WEIGHT, SchedulerLimits
from server.engine.queues import AdapterQueue
from server.engine.request import Request


class FairShares:
    """Weights by adapter name, and what rows cost."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.quantum = limits.fair_quantum
        self._input_cost = limits.input_cost
        self._output_cost = limits.output_cost
        self._weights: dict[str, float] = {}  # where it is not 1

    def set_weight(self, name: str, weight: float) -> None:
        """From now on `name` ("" for the base) gets `weight` times what one of weight 1 gets.

        Raises ValueError for a weight outside MIN_WEIGHT .. MAX_WEIGHT.
        """
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ValueError(f"the weight of adapter {name!r} is {weight}, not from {MIN_WEIGHT} to {MAX_WEIGHT}")
        self._weights.pop(name, None)
        if weight != 1.0:
            self._weights[name] = weight

    def charge(self, queue: AdapterQueue, item: ScheduledRequest) -> None:
        """Count the rows of an item that was just scheduled."""
        request, end = item.request, item.start + item.num_tokens
        new_rows = min(end, request.num_prompt) - max(item.start, request.num_charged)
        request.num_charged = max(request.num_charged, end)
        is_drawn = item.samples and request.params.max_tokens > 0
        cost = self._input_cost * max(0, new_rows) + self._output_cost * is_drawn
        queue.served += cost / self.weight(request)

    def recompute(self, request: Request) -> float:
        """At most what it costs the server if this running request yields, as its adapter's counter would have it."""
        return self._input_cost * len(request.token_ids) / self.weight(request)

    def is_ahead(self, queue: AdapterQueue, other: AdapterQueue, margin: float = 0.0) -> bool:
        """Whether `queue` was given more than a quantum, and `margin`, above `other`."""
        return queue.served > other.served + self.quantum + margin

    def weight(self, request: Request) -> float:
        name = request.adapter.name if request.adapter is not None else ""
        return self._weights.get(name, 1.0)
