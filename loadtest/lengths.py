"""How many tokens: of prompts, and of answers.

128                             always
uniform:LOW:HIGH                every length from LOW to HIGH alike, both ends included
lognormal:MEDIAN:SIGMA[:LOW:HIGH]   exp(N(ln median, sigma)), rounded, then held within LOW (1) to HIGH (none)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_MAX_LENGTH = 2**31 - 1
DrawLengths = Callable[[int, np.random.Generator], npt.NDArray[np.int64]]  # (requests, rng) -> tokens


def parse_lengths(text: str) -> DrawLengths:
    """What draws lengths, each at least 1. Errors: ValueError that says what is wrong with `text`."""
    kind, *values = text.split(":")
    if not values:
        kind, values = "fixed", [kind]
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        raise ValueError(f"lengths {text!r}: {':'.join(values)!r} is not a number") from None
    match kind, numbers:
        case "fixed", [length] if _is_length(length):
            return lambda num, rng: np.full(num, int(length), dtype=np.int64)
        case "uniform", [low, high] if _is_length(low) and _is_length(high) and low <= high:
            return lambda num, rng: rng.integers(int(low), int(high), size=num, endpoint=True)
        case "lognormal", [median, sigma, *bounds] if 1 <= median <= _MAX_LENGTH and 0 <= sigma < math.inf:
            low, high = bounds if len(bounds) == 2 else (1.0, math.inf)
            if len(bounds) in (0, 2) and _is_length(low) and low <= high:
                return lambda num, rng: _lognormal(median, sigma, low, high, num, rng)
    kinds = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:LOW:HIGH]"
    raise ValueError(f"lengths {text!r}: {kinds}, from 1 to {_MAX_LENGTH}")


def _is_length(number: float) -> bool:
    return 1 <= number <= _MAX_LENGTH and number.is_integer()


def _lognormal(
    median: float, sigma: float, low: float, high: float, num: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    drawn = rng.lognormal(math.log(median), sigma, num)
    return np.clip(np.rint(drawn), low, min(high, _MAX_LENGTH)).astype(np.int64)
