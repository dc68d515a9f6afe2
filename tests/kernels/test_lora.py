"""segmented_lora of every backend against fp64, over popularity x ranks x dtype x shape x phase, pairwise."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.types import Segments
from tests.kernels.builders import DTYPES, PHASES, POPULARITIES, RANKS, SHAPES, LoraCase, lora_case, pairwise

FACTORS = {
    "popularity": POPULARITIES,
    "ranks": tuple(RANKS),
    "dtype": DTYPES,
    "shape": tuple(SHAPES),
    "phase": PHASES,
}
CASES = list(pairwise(**FACTORS))


def name_of(case: dict[str, object]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture(params=CASES, ids=name_of)
def case(request) -> LoraCase:
    return lora_case(**request.param)


def run(backend, case: LoraCase, segments: Segments | None = None) -> torch.Tensor:
    """The result for a copy of y."""
    y = case.y.clone()
    backend.segmented_lora(y, case.x, case.weights, case.group, case.segments if segments is None else segments)
    return y


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bytes: NaN equals itself, and -0 differs from 0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_every_pair_of_factors_is_covered():
    for first in FACTORS:
        for second in FACTORS:
            if first != second:
                seen = {(case[first], case[second]) for case in CASES}
                assert len(seen) == len(FACTORS[first]) * len(FACTORS[second])


def test_matches_fp64(backend, case):
    touched = case.touched()
    assert touched.any()
    off = (run(backend, case).double() - case.exact()).abs() / case.bound()
    assert off[touched].max() <= 1  # false for NaN too


def test_matches_the_reference(backend, case):
    touched = case.touched()
    difference = (run(backend, case).double() - run(reference, case).double()).abs()
    assert (difference / (case.bound() + case.bound(rounds_v=False)))[touched].max() <= 1


def test_the_reference_rounds_once(case):
    off = (run(reference, case).double() - case.exact()).abs() / case.bound(rounds_v=False)
    assert off[case.touched()].max() <= 1


def test_what_has_no_delta_keeps_its_bits(backend, case):
    """Base rows, columns of no slice and absent sites hold NaN; so does x in base rows."""
    untouched = ~case.touched()
    assert untouched.any()
    before = [t.clone() for t in (case.x, case.weights.arena, case.weights.table)]
    got = run(backend, case)
    assert same_bits(got[untouched], case.y[untouched])
    assert not got[~untouched].isnan().any()
    after = [case.x, case.weights.arena, case.weights.table]
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


def test_same_arguments_give_the_same_bits(backend, case):
    first = run(backend, case)
    assert same_bits(first, run(backend, case))
    case.weights.scratch.clear()  # nothing hangs on what an earlier call left behind
    assert same_bits(first, run(backend, case))


def test_a_segment_alone_equals_the_same_rows_in_the_batch(backend, case):
    together, bound, touched = run(backend, case), case.bound(), case.touched()
    s = case.segments
    for start, end, members in zip(s.starts, s.ends, s.members, strict=True):
        alone = run(backend, case, Segments([start], [end], [members]))
        rows = torch.zeros_like(touched)
        rows[start:end] = touched[start:end]
        difference = (alone.double() - together.double()).abs() / bound
        assert not rows.any() or difference[rows].max() <= 2
        assert same_bits(alone[~rows], case.y[~rows])
