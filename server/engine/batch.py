"""A step's decision turned into flat arrays. numpy only; the runner makes tensors of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from server.engine.request import Request


@dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a step: rows for positions start : start + num_tokens of its token_ids.

    Set by the scheduler. `samples` says that the last row is the request's last known token, so a new
    token is drawn from it.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.samples and self.start > 0


def row_order(item: ScheduledRequest) -> tuple[bool, int]:
    """Sort key of a step's items: decodes first, then by slot; equal ones stay in the scheduler's order."""
    return not item.is_decode, item.request.slot


@dataclass(slots=True)
class StepPlan:
    """What Scheduler.schedule() decided. `ended` are requests that reached a terminal state without a row."""

    items: list[ScheduledRequest] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def num_rows(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(slots=True)
class Batch:
    """Rows ordered by (decode | prefill, slot, request). Made by BatchBuilder, read by the runner.

    All arrays are views of persistent buffers, valid until the next build.
    """

    items: list[ScheduledRequest]  # in row order
    num_decodes: int  # leading items with exactly one row
    ids: np.ndarray  # int64 [rows]
    positions: np.ndarray  # int64 [rows]
    kv_slots: np.ndarray  # int64 [rows]: block * block_size + offset
    rope_lengths: np.ndarray  # int64 [rows]: the owning request's known length (per-row rotary variants)
    query_starts: list[int]  # [items + 1]
    context_lens: list[int]  # [items]
    block_tables: np.ndarray  # int32 [items, max blocks in use], 0 beyond a request's own
    row_slots: list[int]  # [items]: device slot of each item; 0 = base
    sample_rows: np.ndarray  # int64 [sampled items]: row whose hidden state reaches the head
    sample_items: list[ScheduledRequest]  # in the order of sample_rows

    @property
    def num_rows(self) -> int:
        return len(self.ids)
