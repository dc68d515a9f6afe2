"""Who is asked for: one of several names for each request.

uniform           each name alike
zipf:S            the k-th name (from 1) in proportion to k^-S
power:ALPHA       S-LoRA's: name floor(u^(1/ALPHA) * n), u uniform; 1 is uniform, less prefers the first names
distinct          every request another name, in a shuffled round
shares:W,W,...    the first names in these proportions, none of the others
shares:NAME=W,*=W by name; `*` is what the names not mentioned have together, evenly
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_MAX_SHARE = 1e100  # so that a sum is finite
Draw = Callable[[int, np.random.Generator], npt.NDArray[np.int64]]  # (requests, rng) -> indices of names


def parse_popularity(text: str, names: Sequence[str]) -> Draw:
    """What draws indices into `names`; without any it only checks `text`. Errors: ValueError: what is wrong in it."""
    kind, _, value = text.partition(":")
    num_names = max(1, len(names))
    if kind == "distinct" and not value:
        return lambda num, rng: np.resize(rng.permutation(len(names)), num)
    if kind == "shares":
        return _weighted(_shares(text, value, names))
    if kind == "uniform" and not value:
        return _weighted(np.ones(num_names))
    if kind in ("zipf", "power"):
        exponent = _exponent(text, value)
        return _weighted(zipf_weights(exponent, num_names) if kind == "zipf" else power_weights(exponent, num_names))
    raise ValueError(f"popularity {text!r}: uniform, zipf:S, power:ALPHA, distinct or shares:...")


def zipf_weights(s: float, num: int) -> npt.NDArray[np.float64]:
    """Unnormalised. [num]"""
    return np.arange(1, num + 1, dtype=np.float64) ** -s


def power_weights(alpha: float, num: int) -> npt.NDArray[np.float64]:
    """Name i has P((i / num)^alpha <= U < ((i + 1) / num)^alpha): the cells of numpy's `power` (CDF x^alpha). [num]"""
    return np.diff((np.arange(num + 1) / num) ** alpha)


def _weighted(weights: npt.NDArray[np.float64]) -> Draw:
    return lambda num, rng: rng.choice(len(weights), size=num, p=weights / weights.sum())


def _exponent(text: str, value: str) -> float:
    try:
        exponent = float(value)
    except ValueError:
        exponent = math.nan
    if not 0 < exponent < math.inf:
        raise ValueError(f"popularity {text!r}: {value!r} must be a number above 0")
    return exponent


def _shares(text: str, value: str, names: Sequence[str]) -> npt.NDArray[np.float64]:
    weights = np.zeros(len(names))
    rest = 0.0
    taken: set[int] = set()
    for position, part in enumerate(value.split(",")):
        name, equals, number = part.rpartition("=")
        share = _share(text, number)
        if name == "*":
            rest += share
            continue
        index = _index(text, name, names) if equals else position
        if index >= len(names) or index in taken:
            raise ValueError(f"popularity {text!r}: {part!r} is one share too many for {len(names)} names")
        taken.add(index)
        weights[index] = share
    others = [index for index in range(len(names)) if index not in taken]
    if rest and not others:
        raise ValueError(f"popularity {text!r}: `*` stands for no name")
    weights[others] = rest / max(1, len(others))
    if not weights.sum():
        raise ValueError(f"popularity {text!r}: every share is 0")
    return weights


def _share(text: str, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not 0 <= share <= _MAX_SHARE:
        raise ValueError(f"popularity {text!r}: {number!r} must be a number from 0 to {_MAX_SHARE:g}")
    return share


def _index(text: str, name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ValueError(f"popularity {text!r}: there is no {name!r}")
    return list(names).index(name)
