"""Batches against a row-by-row layout written out in plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.batch import Batch, BatchBuilder, ScheduledRequest, StepPlan
from server.engine.messages import SamplingParams, TokenLogprobs
from server.engine.request import Request

BLOCK_SIZE, MAX_BLOCKS, MAX_REQUESTS, MAX_ROWS = 4, 8, 6, 64


def make_builder() -> BatchBuilder:
    return BatchBuilder(MAX_ROWS, MAX_REQUESTS, MAX_BLOCKS, BLOCK_SIZE)


def make_request(name: str, length: int, *, slot: int = 0, spare_blocks: int = 0) -> Request:
    rng = random.Random(name)
    num_blocks = -(-length // BLOCK_SIZE) + spare_blocks
    return Request(
        request_id=name,
        token_ids=[rng.randrange(1000) for _ in range(length)],
        num_prompt=length,
        params=SamplingParams(max_tokens=9, prompt_logprobs=0 if length % 3 else None),
        blocks=rng.sample(range(1, 500), num_blocks),
        slot=slot,
    )


def make_item(request: Request, start: int, count: int) -> ScheduledRequest:
    samples = start + count == len(request.token_ids)
    return ScheduledRequest(request, start, count, samples, request.prompt_logprob_positions(start, count))


def check(batch: Batch, items: list[ScheduledRequest]) -> None:
    """Every field, from the definitions in Batch's docstring."""
    order = sorted(items, key=lambda item: (not item.is_decode, item.request.slot))
    assert batch.items == order, "decodes first, then by slot, else as planned"
    rows, sample_rows, prompt_rows = [], [], []
    for item in order:
        request = item.request
        for position in range(item.start, item.start + item.num_tokens):
            block, offset = divmod(position, BLOCK_SIZE)
            kv_slot = request.blocks[block] * BLOCK_SIZE + offset
            if position in item.logprob_positions:
                prompt_rows.append(len(rows))
            rows.append((request.token_ids[position], position, kv_slot, len(request.token_ids)))
        if item.samples:
            sample_rows.append(len(rows) - 1)
    arrays = (batch.ids, batch.positions, batch.kv_slots, batch.rope_lengths)
    assert list(zip(*(array.tolist() for array in arrays), strict=True)) == rows
    assert all(array.dtype == np.int64 for array in (*arrays, batch.sample_rows, batch.head_rows))
    assert batch.num_rows == len(rows)
    starts = [sum(item.num_tokens for item in order[:index]) for index in range(len(order) + 1)]
    assert batch.query_starts == starts and batch.num_decodes == sum(item.is_decode for item in order)
    assert batch.context_lens == [item.start + item.num_tokens for item in order]
    assert batch.row_slots == [item.request.slot for item in order]
    assert batch.sample_rows.tolist() == sample_rows
    assert batch.sample_items == [item for item in order if item.samples]
    assert batch.prompt_rows.tolist() == prompt_rows and batch.head_rows.tolist() == sample_rows + prompt_rows
    assert batch.prompt_items == [item for item in order if item.logprob_positions]
    width = max(len(item.request.blocks) for item in order)
    tables = [item.request.blocks + [0] * (width - len(item.request.blocks)) for item in order]
    assert batch.block_tables.tolist() == tables and batch.block_tables.dtype == np.int32


def build(builder: BatchBuilder, items: list[ScheduledRequest]) -> Batch:
    plan = StepPlan(items=list(items))
    batch = builder.build(plan)
    assert plan.items == batch.items
    return batch


def test_a_mixed_step():
    decode, prefill = make_request("decode", 9, slot=2), make_request("prefill", 20, slot=1)
    base, tail = make_request("base", 7), make_request("tail", 12, slot=2)
    one = make_request("one", 1)
    items = [
        make_item(prefill, 4, 9),  # a chunk in the middle: no sample
        make_item(tail, 6, 6),
        make_item(decode, 8, 1),
        make_item(one, 0, 1),  # a prompt of one token is a prefill
        make_item(base, 6, 1),
    ]
    batch = build(make_builder(), items)
    check(batch, items)
    assert [item.request.request_id for item in batch.items] == ["base", "decode", "one", "prefill", "tail"]
    assert batch.num_decodes == 2 and batch.sample_rows.tolist() == [0, 1, 2, 17]


def test_a_row_whose_token_is_being_drawn():
    """It is found in the device's table; its position, block and length are those of the token to come."""
    ahead, other = make_request("ahead", 8, slot=1, spare_blocks=1), make_request("other", 6)
    ahead.place, other.place = 4, 2
    item = ScheduledRequest(ahead, 8, 1, samples=True)
    batch = build(make_builder(), [item, make_item(other, 0, 6)])
    assert item.is_ahead and item.is_decode and batch.num_decodes == 1
    assert batch.unknown_rows.tolist() == [0] and batch.unknown_places.tolist() == [4]
    assert (batch.ids[0], batch.positions[0], batch.rope_lengths[0], batch.context_lens[0]) == (0, 8, 9, 9)
    assert batch.kv_slots[0] == ahead.blocks[2] * BLOCK_SIZE
    assert batch.sample_places == [4, 2] and batch.ids[1:].tolist() == other.token_ids
    known = build(make_builder(), [make_item(other, 0, 6)])
    assert not len(known.unknown_rows) and not len(known.unknown_places)


def test_buffers_are_reused_and_nothing_of_the_last_step_shows():
    builder = make_builder()
    first = build(builder, [make_item(make_request(f"r{i}", 8), 0, 8) for i in range(6)])
    address = first.ids.ctypes.data
    items = [make_item(make_request("only", 5), 0, 3)]
    batch = build(builder, items)
    check(batch, items)
    assert batch.ids.ctypes.data == address and batch.sample_rows.size == 0


def test_a_row_without_a_block_is_an_error():
    request = make_request("a", 8)
    request.blocks.pop()
    with pytest.raises(AssertionError, match="rows without a block"):
        build(make_builder(), [make_item(request, 0, 8)])


def test_more_requests_than_rows_of_the_table_is_an_error():
    items = [make_item(make_request(f"r{i}", 1), 0, 1) for i in range(MAX_REQUESTS + 1)]
    with pytest.raises(AssertionError, match="7 requests in a step"):
        build(make_builder(), items)


def test_tables_follow_growth_preemption_and_reuse_of_an_id():
    builder = make_builder()
    request = make_request("a", 6)
    for _ in range(20):  # grows by a token a step, across block bounds
        items = [make_item(request, len(request.token_ids) - 1, 1)]
        check(build(builder, items), items)
        request.token_ids.append(1)
        if len(request.token_ids) > len(request.blocks) * BLOCK_SIZE:
            request.blocks += [600 + len(request.blocks)]
    request.blocks = [9, 8, 7, 6, 5, 4, 3]  # preempted and back: as many blocks, all others
    items = [make_item(request, 0, 26)]
    check(build(builder, items), items)
    again = make_request("a", 5)
    items = [make_item(again, 0, 5)]
    check(build(builder, items), items)


@st.composite
def histories(draw: st.DrawFn) -> list[list[tuple[int, int, int, bool]]]:
    """Steps of (request number, chunk, new blocks, is preempted first)."""
    step = st.lists(
        st.tuples(st.integers(0, 11), st.integers(1, 10), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=MAX_REQUESTS,
        unique_by=lambda pick: pick[0],
    )
    return draw(st.lists(step, min_size=1, max_size=12))


@settings(max_examples=100, deadline=None)
@given(histories(), st.randoms(use_true_random=False))
def test_any_history_of_steps(history, rng):
    """More requests than table rows, coming and going, growing and starting over."""
    builder = make_builder()
    requests = [make_request(f"r{i}", rng.randint(1, 20), slot=i % 4) for i in range(12)]
    for step in history:
        items = []
        for number, chunk, grown, is_preempted in step:
            request = requests[number]
            if is_preempted:
                request.blocks = rng.sample(range(1, 500), len(request.blocks))
            request.blocks += rng.sample(range(500, 900), min(grown, MAX_BLOCKS - len(request.blocks)))
            start = rng.randrange(len(request.token_ids))
            items.append(make_item(request, start, min(chunk, len(request.token_ids) - start)))
        check(build(builder, items), items)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 20), st.integers(0, 19), st.integers(0, 12))
def test_prompt_rows_are_those_before_a_prompt_token_not_yet_told_of(num_prompt, start, count, num_told, num_output):
    """By the definition, position by position; after a preemption too, with output behind the prompt."""
    request = make_request("a", num_prompt + num_output)
    request.num_prompt = num_prompt
    request.params = SamplingParams(max_tokens=9, prompt_logprobs=0)
    request.prompt_logprobs = [TokenLogprobs(0, 0.0, 1)] * min(num_told, num_prompt - 1)
    wanted = [p for p in range(start, start + count) if len(request.prompt_logprobs) <= p < num_prompt - 1]
    assert list(request.prompt_logprob_positions(start, count)) == wanted
    assert request.lacks_prompt_logprobs == (len(request.prompt_logprobs) < num_prompt - 1)
    request.params = SamplingParams(max_tokens=9)
    assert not request.prompt_logprob_positions(start, count) and not request.lacks_prompt_logprobs
