"""The records of kernels/triton/plan.py against the segments they stand for. No kernel runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.triton.plan import (
    FEW_ROWS,
    ROWS,
    SLOT,
    START,
    V_ROW,
    WEIGHT,
    DeviceSegments,
    bucket_of,
    device_segments,
    rank_bucket,
)
from kernels.triton.plan import OTHERS as FIRST_OTHER
from kernels.triton.plan import OTHERS_END as LAST_OTHER
from kernels.types import Segments
from tests.kernels.test_lora_edges import make_case, plain, two_adapters

Delta = dict[tuple[int, int], list[tuple[int, float]]]

members = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1.0, 0.5, -0.75])), max_size=3)
spans = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 70), members), max_size=12)


def segments_of(drawn: list[tuple[int, int, list[tuple[int, float]]]]) -> tuple[Segments, int]:
    """From (base rows before, rows, members)."""
    segments, row = Segments(), 0
    for gap, count, its in drawn:
        segments.starts.append(row + gap)
        segments.ends.append(row + gap + count)
        segments.members.append(tuple(its))
        row += gap + count
    return segments, max(row, 1)


def by_row(segments: Segments) -> dict[int, list[tuple[int, float]]]:
    spans = zip(segments.starts, segments.ends, segments.members, strict=True)
    return {row: list(its) for start, end, its in spans for row in range(start, end) if its}


def read(plan: DeviceSegments) -> tuple[dict[int, list[tuple[int, float]]], list[int]]:
    """What the kernels see: each row's members in order, and the rows of v that are used."""
    records = plan.records.numpy()
    num_tiles, num_entries = records[0, :2].tolist()
    entries = records[1 : 1 + num_entries]
    weights = entries[:, WEIGHT].copy().view(np.float32)
    found: dict[int, list[tuple[int, float]]] = {}
    used = [v for entry in entries for v in range(entry[V_ROW], entry[V_ROW] + entry[ROWS])]
    for tile in range(num_tiles):
        others = range(entries[tile, FIRST_OTHER] - 1, entries[tile, LAST_OTHER] - 1)
        for index in (tile, *others):
            assert (entries[index, [START, ROWS]] == entries[tile, [START, ROWS]]).all()
        its = [(int(entries[i, SLOT]), float(weights[i])) for i in (tile, *others)]
        start, rows = entries[tile, [START, ROWS]].tolist()
        assert 0 < rows <= plan.tile_rows
        assert not found.keys() & set(range(start, start + rows)), "one tile for each row"
        found |= dict.fromkeys(range(start, start + rows), its)
    return found, used


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(spans, min_size=1, max_size=3), st.sampled_from([0, 1, 200]))
def test_the_records_are_the_segments(steps, more_rows):
    """Filled with one step after the other, whatever was in it before."""
    made = [segments_of(drawn) for drawn in steps]
    rows = max(row for _, row in made) + more_rows
    plan = DeviceSegments(rows, 3 * rows + 1, 16)
    for segments, _ in made:
        plan.fill(segments)
        found, used = read(plan)
        assert found == by_row(segments)
        assert sorted(used) == list(range(len(used))) and len(used) <= plan.max_members


def test_rows_decide_the_form():
    forms = {rows: DeviceSegments(rows, rows, 16) for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1, 256, 257)}
    assert [(plan.form, plan.tile_rows) for plan in forms.values()] == [
        ("few", 1), ("few", 4), ("few", 4), ("decode", 16), ("decode", 16), ("prefill", 64),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (plain((0, 2, 1), (3, 9, 2)), "9 rows"),
        (Segments([0], [8], [((1, 1.0), (2, 1.0))]), "16 members' rows"),
        (Segments([0], [1], [((1, 1.0), (2, 1.0))]), "without sets"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_former_stays(segments, message):
    plan = DeviceSegments(8, 8, 16)
    plan.fill(plain((0, 2, 1)))
    before = plan.records.clone()
    with pytest.raises(ValueError, match=message):
        plan.fill(segments)
    assert torch.equal(plan.records, before)


def test_fewer_tiles_than_rows_are_a_bound_too():
    plan = DeviceSegments(300, 300, 16, max_tiles=5)
    plan.fill(plain((0, 300, 1)))
    with pytest.raises(ValueError, match="6 tiles"):
        plan.fill(plain(*[(i, i + 1, 1) for i in range(6)]))


def test_a_step_s_own_plan_is_kept_until_something_changes():
    case = make_case(two_adapters(), plain((0, 2, 1), (2, 3, 2)))
    first = device_segments(case.segments, case.weights, 12)
    assert device_segments(case.segments, case.weights, 12) is first
    case.segments.ends[1] = 5
    second = device_segments(case.segments, case.weights, 12)
    assert second is not first and read(second)[0] == by_row(case.segments)
    case.weights.version += 1  # the ranks may be others
    assert device_segments(case.segments, case.weights, 12) is not second


def test_an_owner_s_plan_is_taken_as_it_is():
    """At a graph's replay the lists are those of the capture: what counts is what was filled in."""
    case = make_case(two_adapters(), plain((0, 2, 1)))
    mine = DeviceSegments(12, 12, 16)
    case.segments.scratch["triton"] = mine
    later = plain((3, 9, 2))
    mine.fill(later)
    assert device_segments(case.segments, case.weights, 12) is mine
    assert read(mine)[0] == by_row(later)


def test_the_bucket_is_that_of_the_largest_rank_in_use():
    weights = make_case(two_adapters(ranks=(8, 24)), Segments()).weights
    assert rank_bucket(plain((0, 1, 1)), weights) == 16
    assert rank_bucket(plain((0, 1, 1), (1, 2, 2)), weights) == 64
    assert rank_bucket(Segments(), weights) == 16
    weights.table[1, 1, 3] = 65
    assert rank_bucket(plain((0, 1, 1)), weights) == 16, "as of the table's version"
    weights.version += 1
    assert rank_bucket(plain((0, 1, 1)), weights) == 512
    weights.slot_ranks = np.array([0, 4, 700, 0])
    assert rank_bucket(plain((0, 1, 1)), weights) == 16 and rank_bucket(plain((0, 1, 2)), weights) == 704
    assert [bucket_of(rank) for rank in (1, 16, 17, 64, 65, 512, 513)] == [16, 16, 64, 64, 512, 512, 576]
