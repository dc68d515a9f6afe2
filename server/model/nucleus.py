"""Top-k, top-p and the draw on a device: no sort, no look at the values, and sums that are the same in any order.

    logits  ──bits in the logits' order──▶ digits of 16 bits, the larger logit's the smaller
    weights ──fixed point──▶ integers

    first digit   the weight at each of its 65,536 values, summed up: the value at which the mass is reached
    second digit  the same among the tokens of that value; a bf16 has but one digit

So a call takes as long for a flat distribution as for a peaked one, and a row's result depends on nothing but the row:
sums of floats would depend on how a device splits them, which changes with the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from server.model.logprobs import ordered_bits

_DIGIT_BITS = 16
NUM_BINS = 1 << _DIGIT_BITS
"""Integers that a search keeps for each row and part of a mass"""

_PART_BITS = 40  # sums of 2^22 weights fit into an int64
_UNITS = (2.0**-_PART_BITS, 2.0 ** (-2 * _PART_BITS))


class Ordered(NamedTuple):
    """The order of logits [R, V] by digits int64 [R, V] below NUM_BINS, the highest digit first."""

    digits: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, logits: torch.Tensor) -> Ordered:
        bits = ordered_bits(logits.float())
        first = (NUM_BINS // 2 - 1 - (bits >> _DIGIT_BITS)).long()
        if logits.dtype == torch.bfloat16:
            return cls((first,))
        return cls((first, NUM_BINS - 1 - (bits & (NUM_BINS - 1)).long()))


def floor_by_count(weights: torch.Tensor, order: Ordered, counts: torch.Tensor) -> torch.Tensor:
    """The weight of each row's counts[r]-th largest token: weights fp64 [R, V], counts [R, 1] -> fp64 [R, 1]."""
    return _floor(weights, order, [torch.ones_like(order.digits[0])], (1.0,), counts.double())


def floor_by_mass(weights: torch.Tensor, order: Ordered, shares: torch.Tensor) -> torch.Tensor:
    """The weight of the token with which the largest reach a share of all: shares fp64 [R, 1] in (0, 1] -> [R, 1].

    weights fp64 [R, V], each at most 1 and not falling with the logit but where it is 0.
    """
    parts = _parts(weights)
    total = _value([part.sum(dim=-1, keepdim=True) for part in parts], _UNITS)
    return _floor(weights, order, parts, _UNITS, shares * total)


def exact_cumsum(weights: torch.Tensor) -> torch.Tensor:
    """weights.cumsum(-1) of fp64 [R, V] from 0 to 1, each sum rounded at its end alone; it never falls."""
    return _value([part.cumsum(dim=-1) for part in _parts(weights)], _UNITS)


def _parts(weights: torch.Tensor) -> list[torch.Tensor]:
    """int64 [R, V] each: the weights in the first unit, rounded down, and what that leaves in the second."""
    scaled = weights / _UNITS[0]
    high = scaled.long()
    return [high, scaled.sub_(high).div_(_UNITS[0]).long()]


def _value(parts: Sequence[torch.Tensor], units: Sequence[float]) -> torch.Tensor:
    value = parts[0].double() * units[0]
    for part, unit in zip(parts[1:], units[1:], strict=True):
        value += part.double() * unit
    return value


def _floor(
    weights: torch.Tensor,
    order: Ordered,
    parts: Sequence[torch.Tensor],
    units: Sequence[float],
    target: torch.Tensor,
) -> torch.Tensor:
    """The smallest weight of the logit at which `parts`, summed from the largest logit on, reach `target` [R, 1]."""
    first, *others = order.digits
    sums = [_summed(part, first) for part in parts]
    place = _reached(sums, units, target)
    is_here = first == place
    above = [torch.zeros_like(place) for _ in parts]  # of the tokens whose former digits are before the place
    for digit in others:
        parts = [part * is_here for part in parts]
        previous = (place - 1).clamp_(min=0)
        for before, found in zip(above, sums, strict=True):
            before += found.gather(1, previous) * (place > 0)
        sums = [_summed(part, digit) for part in parts]
        place = _reached([found + before for found, before in zip(sums, above, strict=True)], units, target)
        is_here &= digit == place
    return torch.where(is_here, weights, torch.inf).amin(dim=-1, keepdim=True)


def _summed(part: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
    """int64 [R, NUM_BINS]: the sum of a part over the tokens whose digit is at most this."""
    return part.new_zeros(len(part), NUM_BINS).scatter_add_(1, digit, part).cumsum(dim=-1)


def _reached(sums: Sequence[torch.Tensor], units: Sequence[float], target: torch.Tensor) -> torch.Tensor:
    """int64 [R, 1]: the digit at which `target` [R, 1] is reached; some digit in a row of NaN."""
    return (_value(sums, units) < target).sum(dim=-1, keepdim=True).clamp_(max=NUM_BINS - 1)
