"""The model as the engine sees it: dispatch a batch, collect its sampled ids and the logprobs asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from kernels.types import AttentionMetadata
from server.adapters.layer import StepState
from server.adapters.plan import SlotCheck, segments_of
from server.engine.batch import Batch, ScheduledRequest, StepResult
from server.engine.messages import TokenLogprobs
from server.model.copies import Copies, Fetched, copies_of, to_device
from server.model.forward import Forward, StepInputs
from server.model.logprobs import RowLogprobs, row_logprobs
from server.model.sampler import Sampler


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A dispatched step: `collect` waits for what is on its way to the host."""

    fetched: Fetched  # ids int64 [sampled items], then the tensors of a RowLogprobs where somebody asked
    sample_items: list[ScheduledRequest]
    logprobs: _StepLogprobs | None  # None: nobody asked


@dataclass(frozen=True, slots=True)
class _StepLogprobs:
    """Rows of `found`: one for each of sample_items, then the logprob_positions of each of prompt_items."""

    found: RowLogprobs
    sample_items: list[ScheduledRequest]  # those that ask
    prompt_items: list[ScheduledRequest]


class ModelRunner:
    """Runs steps of one base on one device. One thread calls it, and collects steps in the order of their dispatch.

    `forward` reads `step`, whose fields that change the runner sets before each forward pass. A step has at
    most `max_rows` rows. Nothing in a dispatch waits for the device, if `forward` doesn't; only a collect does.

    With two steps in flight it keeps the device's table of last tokens, `num_places` of them, for rows whose token is
    drawn by a step that is not collected: Request.place says where.
    """

    def __init__(
        self,
        forward: Forward,
        step: StepState,
        *,
        eos_token_ids: Sequence[int],
        block_size: int,
        max_rows: int,
        device: torch.device,
        holds: SlotCheck | None = None,
        steps_in_flight: int = 1,
        num_places: int = 0,
        copies: Copies | None = None,
    ) -> None:
        self._forward = forward
        self._step = step
        self._sampler = Sampler(eos_token_ids, forward.largest)
        self._copies = copies or copies_of(device)
        self._inputs = _InputBuffers(max_rows, self._copies, steps_in_flight, num_places if steps_in_flight > 1 else 0)
        self._block_size = block_size
        self._holds = holds

    def dispatch(self, batch: Batch) -> StepHandle:
        """Start one forward pass and the draws of its sampled rows."""
        logits = self.logits(batch)
        num_sampled = len(batch.sample_items)
        with torch.inference_mode():
            last_tokens = self._inputs.last_tokens(num_sampled) if len(batch.unknown_rows) else None
            requests = [item.request for item in batch.sample_items]
            tokens = self._sampler.sample(logits[:num_sampled], requests, last_tokens)
            self._inputs.keep(tokens)
            logprobs = _step_logprobs(batch, logits, tokens)
            fetched = self._copies.fetch([tokens] if logprobs is None else [tokens, *logprobs.found])
        return StepHandle(fetched, batch.sample_items, logprobs)

    def collect(self, handle: StepHandle) -> StepResult:
        """What the step gave; in place of an id NOT_FINITE (-1) or NO_TOKEN (-2) for a row that must fail."""
        tokens, *found = handle.fetched.wait()
        ids = (item.request.request_id for item in handle.sample_items)
        result = StepResult(tokens=dict(zip(ids, tokens.tolist(), strict=True)))
        if handle.logprobs is not None:
            _take_logprobs(handle.logprobs, RowLogprobs(*found), result)
        return result

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits of the batch's head_rows, [S + P, V] in the model's dtype. Writes the rows' KV."""
        assert batch.num_rows and batch.kv_slots.min() >= self._block_size, "block 0 is never written"
        inputs = self._inputs.fill(batch)
        segments, head_segments = segments_of(batch, self._holds)
        step = self._step
        step.segments, step.head_segments = segments, head_segments
        step.rope_lengths = inputs.rope_lengths
        step.attention = AttentionMetadata(
            num_decodes=batch.num_decodes,
            query_starts=batch.query_starts,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            slot_mapping=inputs.kv_slots,
            block_size=self._block_size,
        )
        with torch.inference_mode():
            return self._forward(inputs)


def _step_logprobs(batch: Batch, logits: torch.Tensor, tokens: torch.Tensor) -> _StepLogprobs | None:
    """The logprobs that the batch's requests ask for, of logits [S + P, V] and drawn tokens [S]."""
    asking = [row for row, item in enumerate(batch.sample_items) if item.request.params.logprobs is not None]
    if not asking and not batch.prompt_items:
        return None
    sample_items = [batch.sample_items[row] for row in asking]
    rows = to_device([*asking, *range(len(tokens), len(logits))], logits.device, torch.int64)
    following: list[int] = []  # a prompt row's token is the one that stands behind it
    for item in batch.prompt_items:
        positions = item.logprob_positions
        following += item.request.token_ids[positions.start + 1 : positions.stop + 1]
    chosen = tokens[rows[: len(asking)]].clamp(min=0)  # a failed row's value is never read
    token_ids = torch.cat([chosen, to_device(following, logits.device, torch.int64)])
    num_top = max(_num_top(sample_items, batch.prompt_items))
    return _StepLogprobs(row_logprobs(logits, rows, token_ids, num_top), sample_items, batch.prompt_items)


def _num_top(sample_items: list[ScheduledRequest], prompt_items: list[ScheduledRequest]) -> list[int]:
    """How many of the most likely tokens each row of a _StepLogprobs is asked for."""
    counts = [item.request.params.logprobs or 0 for item in sample_items]
    for item in prompt_items:
        counts += [item.request.params.prompt_logprobs or 0] * len(item.logprob_positions)
    return counts


def _take_logprobs(step: _StepLogprobs, found: RowLogprobs, result: StepResult) -> None:
    """Put what was found, on the host by now, where it belongs."""
    rows: Iterator[TokenLogprobs] = iter(found.to_host(_num_top(step.sample_items, step.prompt_items)))
    for item in step.sample_items:
        result.logprobs[item.request.request_id] = next(rows)
    for item in step.prompt_items:
        result.prompt_logprobs[item.request.request_id] = list(islice(rows, len(item.logprob_positions)))


_HEAD_ROWS = 4  # the last line of StepInputs; behind it:
_SAMPLE_PLACES, _UNKNOWN_ROWS, _UNKNOWN_PLACES, _NUM_LINES = 5, 6, 7, 8


class _InputBuffers:
    """The step's arrays at fixed device addresses: one copy a step, and what a captured graph will read.

    The table of last tokens is only on the device; the steps that write and read it run there one after the other.
    """

    def __init__(self, max_rows: int, copies: Copies, steps_in_flight: int, num_places: int) -> None:
        num_lines = _NUM_LINES if num_places else _SAMPLE_PLACES
        self._stage = copies.stage(num_lines, max_rows, num_steps=steps_in_flight)
        self._table = torch.zeros(num_places, dtype=torch.int64, device=copies.device)

    def fill(self, batch: Batch) -> StepInputs:
        """The inputs of a step, on the device as soon as it comes to them."""
        arrays = [batch.ids, batch.positions, batch.kv_slots, batch.rope_lengths, batch.head_rows]
        if len(self._table):
            arrays += [np.array(batch.sample_places, np.int64), batch.unknown_rows, batch.unknown_places]
        assert len(self._table) or not len(batch.unknown_rows), "a token that the host lacks, and no table of them"
        host = self._stage.begin().numpy()
        assert batch.num_rows <= host.shape[1], f"{batch.num_rows} rows in buffers of {host.shape[1]}"
        for line, array in enumerate(arrays):
            host[line, : len(array)] = array
        self._stage.send()
        lines = [self._stage.target[line, : len(array)] for line, array in enumerate(arrays)]
        if len(batch.unknown_rows):
            known = self._table.index_select(0, lines[_UNKNOWN_PLACES])
            lines[0].index_copy_(0, lines[_UNKNOWN_ROWS], known)
        return StepInputs(*lines[:_SAMPLE_PLACES])

    def last_tokens(self, num_sampled: int) -> torch.Tensor:
        """The tokens of the rows that the step of the last fill() samples, int64 [S]."""
        ids, rows = self._stage.target[0], self._stage.target[_HEAD_ROWS, :num_sampled]
        return ids.index_select(0, rows)

    def keep(self, tokens: torch.Tensor) -> None:
        """Put what the step of the last fill() drew into the table. An id that stands for a failure becomes 0: the
        row that may follow it is dropped, and has to have some token until then."""
        if len(self._table):
            places = self._stage.target[_SAMPLE_PLACES, : len(tokens)]
            self._table.index_copy_(0, places, tokens.clamp(min=0))
