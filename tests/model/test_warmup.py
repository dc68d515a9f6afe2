"""The steps before the first request: every form, nobody's data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.triton.plan import rank_bucket
from kernels.types import SlotWeights
from server.adapters.layer import StepState
from server.model.forward import StepInputs
from server.model.graphs import GraphForward, GraphShape
from server.model.warmup import warm_up
from tests import device_ops
from tests.model.test_graphs import fill_in_place, serve_graphed
from tests.zoo import tiny_base

MAX_HEADS = 500


class Seen:
    """A Forward that notes what it was asked for and checks that it is a step."""

    def __init__(self, step: StepState, shape: GraphShape) -> None:
        self.step, self.shape = step, shape
        self.forms: set[tuple[int, int | None, int, bool]] = set()
        self.sets: set[tuple[int, int | None, int]] = set()  # rows, bucket, members of each segment
        self.heads: set[tuple[int, int | None]] = set()  # rows with logits, bucket

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        meta, segments = self.step.attention, self.step.segments
        rows = len(inputs.ids)
        counts = np.diff(meta.query_starts)
        assert meta.query_starts[-1] == rows and (counts[: meta.num_decodes] == 1).all() and counts.min() > 0
        assert (np.array(meta.context_lens) >= counts).all() and not meta.block_tables.any()
        assert max(meta.context_lens) <= meta.block_tables.shape[1] * meta.block_size, "positions without a block"
        assert not inputs.kv_slots.any(), "a row's KV goes elsewhere than to the dummy block"
        heads = len(inputs.head_rows)
        assert heads in (len(counts), min(rows, MAX_HEADS)) and inputs.head_rows.max() < rows
        bucket = rank_bucket(segments, self.step.weights) if segments else None
        assert not segments or (segments.ends[-1] == rows and self.step.head_segments.ends[-1] == heads)
        for plan in (segments, self.step.head_segments) if segments else ():
            self.sets |= {(rows, bucket, len(members)) for members in plan.members}
        self.forms.add((rows, bucket, meta.num_decodes, max(meta.context_lens) > rows))
        self.heads.add((heads, bucket))
        return torch.zeros(heads, self.shape.vocab_size)


@pytest.mark.parametrize(("max_rows", "max_blocks"), [(1, 100), (512, 1000), (700, 3), (3000, 300)])
def test_every_form(max_rows: int, max_blocks: int) -> None:
    shape = GraphShape(24, 64, max_blocks, 16, 7, torch.float32, torch.device("cpu"))
    weights = SlotWeights(torch.zeros(8), torch.zeros(3, 2, 5, dtype=torch.int64), slot_ranks=np.zeros(3, np.int64))
    step = StepState(weights=weights, ops=device_ops)
    forward = Seen(step, shape)
    warm_up(forward, step, shape, max_rows, MAX_HEADS)
    sizes = {rows for rows, *_ in forward.forms}
    assert {1, max_rows} <= sizes and max(sizes) == max_rows
    for rows in sizes:
        forms = {form[1:] for form in forward.forms if form[0] == rows}
        assert {bucket for bucket, *_ in forms} == {None, 16, 64}
        assert rows == 1 or any(num_decodes for _, num_decodes, _ in forms)
        assert any(is_long for _, _, is_long in forms) == (rows < min(4096, max_blocks * 16))
    # the logprobs of a prompt give the head as many rows as a step has, up to its own bound
    assert {(min(rows, MAX_HEADS), bucket) for rows in sizes for bucket in (None, 16, 64)} <= forward.heads
    assert not weights.slot_ranks.any() and step.segments is step.attention is step.rope_lengths is None


@pytest.mark.parametrize("max_members", [1, 3])
def test_kernels_of_sets_are_compiled_where_there_may_be_sets(max_members: int) -> None:
    shape = GraphShape(24, 64, 100, 16, 7, torch.float32, torch.device("cpu"), max_members)
    weights = SlotWeights(torch.zeros(8), torch.zeros(3, 2, 5, dtype=torch.int64), slot_ranks=np.zeros(3, np.int64))
    step = StepState(weights=weights, ops=device_ops)
    forward = Seen(step, shape)
    warm_up(forward, step, shape, 300, MAX_HEADS)
    sizes = {rows for rows, *_ in forward.forms}
    assert forward.sets == {(rows, bucket, n) for rows in sizes for bucket in (16, 64) for n in {1, max_members}}


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No block but the dummy's and no byte of the arena changes; graphs answer as before."""
    served = serve_graphed(tiny_base(tmp_path, "llama"))
    fill_in_place(served)
    step, forward = served.step, served.runner._forward
    assert isinstance(forward, GraphForward)
    step.weights.slot_ranks = np.zeros(3, np.int64)
    caches = [*served.kv.keys, *served.kv.values]
    before = [tensor.clone() for tensor in (*(cache[1:] for cache in caches), step.weights.arena, step.weights.table)]
    warm_up(forward._eager, step, forward._shape, 40, 40)
    after = [*(cache[1:] for cache in caches), step.weights.arena, step.weights.table]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, equal_nan=True, atol=0, rtol=0)
    assert served.replays == 0
