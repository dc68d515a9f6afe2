"""When requests are sent: an open loop by the clock, or a closed loop by answers.

poisson:RATE          open loop, exponential gaps, RATE requests a second
gamma:RATE:CV         open loop, gaps ~ Gamma(shape 1/cv^2, scale cv^2/rate); cv 1 is Poisson, more is burstier;
                      from 0.01 to 100, beyond which the gaps are equal or all but a few are none
constant:RATE         open loop, equal gaps
all                   everything at once
closed:CONCURRENCY    closed loop: so many at a time, the next one when one has ended
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MIN_CV, _MAX_CV = 0.01, 100.0


@dataclass(frozen=True)
class Arrivals:
    """One way of arriving. `rate` is requests a second (inf: at once), `cv` the gaps' standard deviation over mean."""

    rate: float = math.inf
    cv: float = 0.0
    concurrency: int | None = None  # of a closed loop

    @property
    def is_open(self) -> bool:
        """Sent by the clock, whatever the server does."""
        return self.concurrency is None

    @property
    def burstiness(self) -> float:
        """The gaps' Gamma shape, as `vllm bench serve` calls it; inf for equal gaps, and its 1 where there are none."""
        if math.isinf(self.rate):
            return 1.0
        return 1 / self.cv**2 if self.cv else math.inf

    def bounded(self, max_concurrency: int | None) -> int | None:
        """Most requests at once: of the closed loop's bound and a further one the lower; None without either."""
        return min((bound for bound in (self.concurrency, max_concurrency) if bound is not None), default=None)

    def times(self, num_requests: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Seconds from the start for each request, rising; zeros for a closed loop. [num_requests]"""
        if math.isinf(self.rate):
            return np.zeros(num_requests)
        if self.cv == 0:
            return np.arange(num_requests) / self.rate
        shape = 1 / self.cv**2
        return np.cumsum(rng.gamma(shape, 1 / (self.rate * shape), num_requests))


def parse_arrivals(text: str) -> Arrivals:
    """Errors: ValueError that says what is wrong with `text`."""
    kind, *values = text.split(":")
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        raise ValueError(f"arrivals {text!r}: {':'.join(values)!r} is not a number") from None
    if any(not 0 < number < math.inf for number in numbers):
        raise ValueError(f"arrivals {text!r}: numbers must be above 0")
    match kind, numbers:
        case "poisson", [rate]:
            return Arrivals(rate, cv=1.0)
        case "gamma", [rate, cv]:
            if not _MIN_CV <= cv <= _MAX_CV:
                raise ValueError(f"arrivals {text!r}: CV from {_MIN_CV:g} to {_MAX_CV:g}")
            return Arrivals(rate, cv=cv)
        case "constant", [rate]:
            return Arrivals(rate)
        case "all", []:
            return Arrivals()
        case "closed", [concurrency] if concurrency.is_integer():
            return Arrivals(concurrency=int(concurrency))
    raise ValueError(f"arrivals {text!r}: poisson:RATE, gamma:RATE:CV, constant:RATE, all or closed:CONCURRENCY")
