"""Steps of every form that kernels are compiled for, run before the first request: none waits for a compiler."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import torch

from kernels.triton.plan import WARM_ROWS
from kernels.types import AttentionMetadata, Segments
from server.adapters.layer import StepState
from server.model.forward import Forward, StepInputs
from server.model.graphs import NO_ADAPTER, GraphShape

logger = logging.getLogger(__name__)

LONG_CONTEXT = 4096  # positions: kernels cut contexts in pieces, and are compiled for one piece and for several


def warm_up(forward: Forward, step: StepState, shape: GraphShape, max_rows: int, max_head_rows: int) -> None:
    """Run `forward` on steps of up to `max_rows` rows that belong to nobody, and wait for the device.

    `max_head_rows`: of a step, those with logits: more than one a request where the logprobs of prompts are asked for.

    Their KV goes to the dummy block and slot 1 of the table is absent, with whatever rank is claimed for it.
    """
    assert step.weights.slot_ranks is not None, "the arena keeps the ranks"
    started = time.monotonic()
    count = 0
    sizes = [*(rows for rows in WARM_ROWS if rows < max_rows), max_rows]
    with torch.inference_mode():
        lines = torch.zeros(5, max_rows, dtype=torch.int64, device=shape.device)
        for rows, (bucket, num_members) in product(sizes, _plans(shape)):
            step.weights.slot_ranks[1] = bucket
            for num_decodes, context, has_logprobs in _forms(rows, shape):
                starts = _starts(num_decodes, rows, shape)
                heads = min(rows, max_head_rows) if has_logprobs else len(starts) - 1
                _pose(step, shape, lines, starts, num_decodes, context, num_members, heads)
                counts = (rows, rows, rows, rows, heads)
                forward(StepInputs(*(line[:length] for line, length in zip(lines, counts, strict=True))))
                count += 1
        step.weights.slot_ranks[1] = 0
        step.segments = step.head_segments = step.attention = step.rope_lengths = None
        if shape.device.type == "cuda":
            torch.cuda.synchronize(shape.device)
    logger.info("warmed up by %d steps of up to %d rows in %.1f s", count, max_rows, time.monotonic() - started)


def _plans(shape: GraphShape) -> list[tuple[int, int]]:
    """(largest rank, adapters of each request): kernels of sets are others than those of single adapters."""
    buckets = [bucket for bucket in shape.buckets if bucket != NO_ADAPTER]
    return [(0, 0), *product(buckets, sorted({1, shape.max_members}))]


def _forms(rows: int, shape: GraphShape) -> Iterator[tuple[int, int, bool]]:
    """(decodes before the prompts' rows, context of the prompts, whether all rows have logits):

    a prompt with logprobs, one behind others, some beside decodes.
    """
    yield 0, 1, True
    yield 0, min(LONG_CONTEXT, shape.max_blocks * shape.block_size), False
    if rows > 1:
        yield min(rows // 2, shape.max_num_seqs), 1, False


def _starts(num_decodes: int, rows: int, shape: GraphShape) -> list[int]:
    """Where each request's rows begin, and the end: decodes, then prompts as long as a request may be."""
    return [*range(num_decodes), *range(num_decodes, rows, shape.max_blocks * shape.block_size), rows]


def _pose(
    step: StepState,
    shape: GraphShape,
    lines: torch.Tensor,
    starts: list[int],
    num_decodes: int,
    context: int,
    num_members: int,
    num_heads: int,
) -> None:
    """Set the step's fields: every request has adapters of its own, all of them slot 1's."""
    rows = starts[-1]
    step.segments = step.head_segments = None
    if num_members:
        step.segments = _segments(starts, num_members)
        step.head_segments = _segments(list(range(num_heads + 1)), num_members)
    step.rope_lengths = lines[3, :rows]
    counts = [end - start for start, end in pairwise(starts)]
    step.attention = AttentionMetadata(
        num_decodes=num_decodes,
        query_starts=starts,
        context_lens=counts[:num_decodes] + [max(count, context) for count in counts[num_decodes:]],
        block_tables=np.zeros((len(counts), shape.max_blocks), np.int32),
        slot_mapping=lines[2, :rows],
        block_size=shape.block_size,
    )


def _segments(starts: list[int], num_members: int) -> Segments:
    ranges = list(pairwise(starts))
    return Segments([a for a, _ in ranges], [b for _, b in ranges], [((1, 1.0),) * num_members for _ in ranges])
