"""segments_of: every row in its own slot's segment, base rows in none, and no batch with a wrong slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.types import Segments
from server.adapters.plan import segments_of
from server.engine.batch import Batch, BatchBuilder, ScheduledRequest, StepPlan
from server.engine.messages import SamplingParams
from server.engine.request import Request
from tests.unit.byte_device import make_ref

BLOCK = 16


def make_item(
    index: int, slot: int, num_tokens: int, start: int = 0, samples: bool = True, asks: bool = False
) -> ScheduledRequest:
    known = start + num_tokens if samples else start + num_tokens + 1
    request = Request(
        request_id=f"r{index}",
        token_ids=list(range(known)),
        num_prompt=known,
        params=SamplingParams(max_tokens=4, prompt_logprobs=0 if asks else None),
        adapter=make_ref(f"key{slot}", 1) if slot else None,
        blocks=list(range(1, 2 + known // BLOCK)),
        slot=slot,
    )
    return ScheduledRequest(request, start, num_tokens, samples, request.prompt_logprob_positions(start, num_tokens))


def build(items: list[ScheduledRequest]) -> Batch:
    return BatchBuilder(512, 32, 8, BLOCK).build(StepPlan(items=items))


def slots_by_row(segments: Segments, num_rows: int) -> list[int]:
    """Spell the plan out; asserts that segments are ascending, disjoint, non-empty and of one full-weight member."""
    rows = [0] * num_rows
    last = 0
    for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
        assert last <= start < end <= num_rows
        ((slot, weight),) = members
        assert weight == 1.0 and slot > 0
        rows[start:end] = [slot] * (end - start)
        last = end
    return rows


items_strategy = st.lists(
    st.tuples(
        st.integers(0, 3), st.one_of(st.just(1), st.integers(1, 9)), st.integers(0, 5), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(items_strategy)
def test_rows_and_sampled_rows_get_their_own_slot(drawn):
    items = [make_item(i, *one) for i, one in enumerate(drawn)]
    batch = build(items)
    body, head = segments_of(batch, lambda slot, key: key == f"key{slot}")
    by_row = [item.request.slot for item in batch.items for _ in range(item.num_tokens)]
    assert slots_by_row(body, batch.num_rows) == by_row
    sampled = [item.request.slot for item in batch.sample_items]
    sampled += [item.request.slot for item in batch.items for _ in item.logprob_positions]
    assert len(batch.head_rows) == len(sampled)
    assert slots_by_row(head, len(sampled)) == sampled
    for segments, rows in ((body, by_row), (head, sampled)):
        changes = sum(1 for left, right in zip([0, *rows], rows, strict=False) if right and right != left)
        assert len(segments) == changes, "neighbours of one slot are not merged"


def test_a_slot_may_own_several_segments():
    batch = build([make_item(0, 1, 1, 3), make_item(1, 2, 1, 3), make_item(2, 1, 4), make_item(3, 0, 2)])
    body, head = segments_of(batch)
    assert body.members == [((1, 1.0),), ((2, 1.0),), ((1, 1.0),)]
    assert (body.starts, body.ends) == ([0, 1, 4], [1, 2, 8])
    assert (head.starts, head.ends) == ([0, 1, 3], [1, 2, 4])


def test_only_base_rows_have_no_segments():
    body, head = segments_of(build([make_item(0, 0, 3), make_item(1, 0, 1, 5)]))
    assert not body and not head


def test_items_that_sample_nothing_are_not_in_the_heads_plan():
    body, head = segments_of(build([make_item(0, 1, 4, samples=False)]))
    assert len(body) == 1 and not head


@pytest.mark.parametrize("sound", [True, False])
def test_a_batch_whose_slot_holds_another_image_is_refused(sound):
    batch = build([make_item(0, 1, 1, 3), make_item(1, 2, 1, 3)])
    asked = []

    def holds(slot: int, key: str) -> bool:
        asked.append((slot, key))
        return sound or slot == 1

    if sound:
        segments_of(batch, holds)
        assert asked == [(1, "key1"), (2, "key2")]
    else:
        with pytest.raises(RuntimeError, match=r"'r1': slot 2 does not hold its adapter 'key2'"):
            segments_of(batch, holds)


def test_a_request_with_an_adapter_never_runs_as_base_nor_the_other_way_round():
    lost = make_item(0, 1, 2)
    lost.request.slot = 0
    with pytest.raises(RuntimeError, match="slot 0 does not hold its adapter 'key1'"):
        segments_of(build([lost]))
    stray = make_item(0, 0, 2)
    stray.request.slot = 3
    with pytest.raises(RuntimeError, match="slot 3 does not hold its adapter '"):
        segments_of(build([stray]))


def test_the_plans_are_plain_lists_of_ints():
    batch = build([make_item(0, 1, 2), make_item(1, 2, 1, 3)])
    batch.row_slots = [int(slot) for slot in np.asarray(batch.row_slots)]
    for segments in segments_of(batch):
        assert all(type(value) is int for value in [*segments.starts, *segments.ends])
