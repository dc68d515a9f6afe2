"""A step's decision turned into flat arrays. numpy only; the runner makes tensors of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.engine.messages import TokenLogprobs
from server.engine.request import Request

_NO_ROWS = np.zeros(0, np.int64)
_UNKNOWN = [0]  # in place of a row's token that only the device has


@dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a step: rows for positions start : start + num_tokens of its token_ids.

    Set by the scheduler. `samples` says that the last row is the request's last token, so a new token is drawn
    from it. `logprob_positions` are positions of its prompt whose rows reach the head too.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    logprob_positions: range = range(0)

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.samples and self.start > 0

    @property
    def is_ahead(self) -> bool:
        """Whether its token is still being drawn by a step in flight. It is its only row then."""
        return self.start >= len(self.request.token_ids)


def row_order(item: ScheduledRequest) -> tuple[bool, int]:
    """Sort key of a step's items: decodes first, then by slot; equal ones stay in the scheduler's order."""
    return not item.is_decode, item.request.slot


@dataclass(slots=True)
class StepPlan:
    """What Scheduler.schedule() decided. `ended` are requests that reached a terminal state without a row."""

    items: list[ScheduledRequest] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(slots=True)
class StepResult:
    """What the model gave for a step, by request id. Made by the runner, applied by the scheduler."""

    tokens: dict[str, int] = field(default_factory=dict)  # of items that sample, in the order of sample_items
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)  # of those tokens, where asked for
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # one a logprob_position


@dataclass(slots=True)
class Batch:
    """Rows ordered by (decode | prefill, slot, request). Made by BatchBuilder, read by the runner.

    All arrays are views of persistent buffers, valid until the next build.
    """

    items: list[ScheduledRequest]  # in row order
    num_decodes: int  # leading items with exactly one row
    ids: np.ndarray  # int64 [rows]; 0 where the token is not known yet
    positions: np.ndarray  # int64 [rows]
    kv_slots: np.ndarray  # int64 [rows]: block * block_size + offset
    rope_lengths: np.ndarray  # int64 [rows]: the owning request's length (per-row rotary variants)
    query_starts: list[int]  # [items + 1]
    context_lens: list[int]  # [items]
    block_tables: np.ndarray  # int32 [items, max blocks in use], 0 beyond a request's own
    row_slots: list[int]  # [items]: device slot of each item; 0 = base
    sample_rows: np.ndarray  # int64 [sampled items]: row whose hidden state reaches the head
    sample_items: list[ScheduledRequest]  # in the order of sample_rows
    prompt_rows: np.ndarray = field(default_factory=lambda: _NO_ROWS)  # int64: rows of all logprob_positions
    prompt_items: list[ScheduledRequest] = field(default_factory=list)  # those that have any, in row order
    unknown_rows: np.ndarray = field(default_factory=lambda: _NO_ROWS)  # int64: rows whose token only the device has
    unknown_places: np.ndarray = field(default_factory=lambda: _NO_ROWS)  # int64: where, in its table of last tokens

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @property
    def head_rows(self) -> np.ndarray:
        """int64: the rows whose hidden states reach the head, the sampled ones first."""
        return np.concatenate([self.sample_rows, self.prompt_rows]) if len(self.prompt_rows) else self.sample_rows

    @property
    def sample_places(self) -> list[int]:
        """Where the drawn tokens go in the device's table of last tokens, in the order of sample_rows."""
        return [item.request.place for item in self.sample_items]


class BatchBuilder:
    """Lays out plans as batches, into buffers that every build reuses.

    Python work is O(requests) and slices of token lists; what is per row is numpy. Block tables are kept
    from step to step and only grow by what is new.
    """

    def __init__(self, max_rows: int, max_requests: int, max_blocks_per_seq: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = _BlockTables(max_requests, max_blocks_per_seq)
        self._ids = np.zeros(max_rows, np.int64)
        self._positions = np.zeros(max_rows, np.int64)
        self._kv_slots = np.zeros(max_rows, np.int64)
        self._rope_lengths = np.zeros(max_rows, np.int64)
        self._sample_rows = np.zeros(max_requests, np.int64)
        self._rows = np.arange(max_rows)

    def build(self, plan: StepPlan) -> Batch:
        """The batch of a plan with at least one item. The plan's own items are put in row order too."""
        items = plan.items
        assert len(items) <= len(self._sample_rows), f"{len(items)} requests in a step"
        items.sort(key=row_order)
        counts = np.fromiter((item.num_tokens for item in items), np.int64, len(items))
        ends = np.cumsum(counts)
        block_tables = self._tables.gather([item.request for item in items])
        self._fill_rows(items, counts, ends, block_tables)
        unknown = [index for index, item in enumerate(items) if item.is_ahead]
        rows = int(ends[-1])
        sample_items = [item for item in items if item.samples]
        samples = np.fromiter((item.samples for item in items), np.bool_, len(items))
        sample_rows = self._sample_rows[: len(sample_items)]
        sample_rows[:] = ends[samples] - 1
        prompt_items = [item for item in items if item.logprob_positions]
        return Batch(
            items=list(items),
            num_decodes=sum(item.is_decode for item in items),
            ids=self._ids[:rows],
            positions=self._positions[:rows],
            kv_slots=self._kv_slots[:rows],
            rope_lengths=self._rope_lengths[:rows],
            query_starts=[0, *ends.tolist()],
            context_lens=[item.start + item.num_tokens for item in items],
            block_tables=block_tables,
            row_slots=[item.request.slot for item in items],
            sample_rows=sample_rows,
            sample_items=sample_items,
            prompt_rows=_prompt_rows(items, ends) if prompt_items else _NO_ROWS,
            prompt_items=prompt_items,
            unknown_rows=ends[unknown] - 1 if unknown else _NO_ROWS,
            unknown_places=np.array([items[index].request.place for index in unknown], np.int64),
        )

    def _fill_rows(
        self,
        items: Sequence[ScheduledRequest],
        counts: npt.NDArray[np.int64],  # [items]
        ends: npt.NDArray[np.int64],  # [items]: row after each one's last
        block_tables: npt.NDArray[np.int32],
    ) -> None:
        ids: list[int] = []
        for item in items:
            end = item.start + item.num_tokens
            assert end <= len(item.request.blocks) * self._block_size, "rows without a block to write to"
            ids += item.request.token_ids[item.start : end] or _UNKNOWN
        rows = len(ids)
        starts = np.fromiter((item.start for item in items), np.int64, len(items))
        known = np.fromiter((len(item.request.token_ids) for item in items), np.int64, len(items))
        positions = self._positions[:rows]
        self._ids[:rows] = ids
        np.add(self._rows[:rows], np.repeat(starts - ends + counts, counts), out=positions)
        blocks = block_tables[np.repeat(self._rows[: len(items)], counts), positions // self._block_size]
        np.add(blocks * np.int64(self._block_size), positions % self._block_size, out=self._kv_slots[:rows])
        self._rope_lengths[:rows] = np.repeat(np.maximum(known, starts + counts), counts)


def _prompt_rows(items: Sequence[ScheduledRequest], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of the items' logprob_positions, int64, ascending."""
    parts = []
    for item, end in zip(items, ends.tolist(), strict=True):
        shift = end - item.num_tokens - item.start  # from a position to its row
        parts.append(np.arange(item.logprob_positions.start + shift, item.logprob_positions.stop + shift))
    return np.concatenate([part for part in parts if len(part)])


@dataclass(slots=True)
class _TableRow:
    row: int
    blocks: list[int]  # the request's own list: it only grows, and blocks given up leave another list behind
    num_written: int = 0


class _BlockTables:
    """Block tables of the requests that ran last, one row each; the longest unused row is taken over."""

    def __init__(self, max_requests: int, max_blocks: int) -> None:
        self._table = np.zeros((max_requests, max_blocks), np.int32)
        self._gathered = np.zeros(max_requests * max_blocks, np.int32)
        self._rows: OrderedDict[str, _TableRow] = OrderedDict()  # by request id, longest out of use first

    def gather(self, requests: Sequence[Request]) -> npt.NDArray[np.int32]:
        """The tables of these requests, in order: int32 [requests, most blocks of any], 0 beyond each one's."""
        rows = [self._row_of(request) for request in requests]
        width = max(len(request.blocks) for request in requests)
        gathered = self._gathered[: len(rows) * width].reshape(len(rows), width)
        gathered[:] = self._table[rows, :width]
        return gathered

    def _row_of(self, request: Request) -> int:
        """The row of a request, brought up to date."""
        entry = self._rows.pop(request.request_id, None)
        if entry is None:
            is_row_left = len(self._rows) < len(self._table)
            row = len(self._rows) if is_row_left else self._rows.popitem(last=False)[1].row
            entry = _TableRow(row, [])
        self._rows[request.request_id] = entry
        if entry.blocks is not request.blocks:
            self._table[entry.row] = 0
            entry.blocks, entry.num_written = request.blocks, 0
        if entry.num_written < len(request.blocks):
            new = request.blocks[entry.num_written :]
            self._table[entry.row, entry.num_written : len(request.blocks)] = new
            entry.num_written = len(request.blocks)
        return entry.row
