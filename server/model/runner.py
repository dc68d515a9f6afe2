"""The model as the engine sees it: dispatch a batch, collect its sampled ids and the logprobs asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from kernels.types import AttentionMetadata
from server.adapters.layer import StepState
from server.adapters.plan import SlotCheck, segments_of
from server.engine.batch import Batch, ScheduledRequest, StepResult
from server.engine.messages import TokenLogprobs
from server.model.forward import Forward, StepInputs
from server.model.logprobs import RowLogprobs, row_logprobs
from server.model.sampler import Sampler


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A dispatched step; `collect` brings its tensors to the host."""

    token_ids: torch.Tensor  # int64 [sampled items], on the device
    sample_items: list[ScheduledRequest]
    logprobs: _StepLogprobs | None  # None: nobody asked


@dataclass(frozen=True, slots=True)
class _StepLogprobs:
    """Rows of `found`: one for each of sample_items, then the logprob_positions of each of prompt_items."""

    found: RowLogprobs
    sample_items: list[ScheduledRequest]  # those that ask
    prompt_items: list[ScheduledRequest]


class ModelRunner:
    """Runs steps of one base on one device. One thread calls it, and collects a step before the next.

    `forward` reads `step`, whose fields that change the runner sets before each forward pass. A step has at
    most `max_rows` rows.
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
    ) -> None:
        self._forward = forward
        self._step = step
        self._sampler = Sampler(eos_token_ids, forward.largest)
        self._inputs = _InputBuffers(max_rows, device)
        self._block_size = block_size
        self._holds = holds

    def dispatch(self, batch: Batch) -> StepHandle:
        """Start one forward pass and the draws of its sampled rows."""
        logits = self.logits(batch)
        num_sampled = len(batch.sample_items)
        with torch.inference_mode():
            tokens = self._sampler.sample(logits[:num_sampled], [item.request for item in batch.sample_items])
            return StepHandle(tokens, batch.sample_items, _step_logprobs(batch, logits, tokens))

    def collect(self, handle: StepHandle) -> StepResult:
        """What the step gave; in place of an id NOT_FINITE (-1) or NO_TOKEN (-2) for a row that must fail."""
        ids = (item.request.request_id for item in handle.sample_items)
        result = StepResult(tokens=dict(zip(ids, handle.token_ids.tolist(), strict=True)))
        if handle.logprobs is not None:
            _take_logprobs(handle.logprobs, result)
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
    rows = torch.tensor([*asking, *range(len(tokens), len(logits))], device=logits.device)
    following: list[int] = []  # a prompt row's token is the one that stands behind it
    for item in batch.prompt_items:
        positions = item.logprob_positions
        following += item.request.token_ids[positions.start + 1 : positions.stop + 1]
    chosen = tokens[rows[: len(asking)]].clamp(min=0)  # a failed row's value is never read
    token_ids = torch.cat([chosen, torch.tensor(following, dtype=torch.int64, device=logits.device)])
    num_top = max(_num_top(sample_items, batch.prompt_items))
    return _StepLogprobs(row_logprobs(logits, rows, token_ids, num_top), sample_items, batch.prompt_items)


def _num_top(sample_items: list[ScheduledRequest], prompt_items: list[ScheduledRequest]) -> list[int]:
    """How many of the most likely tokens each row of a _StepLogprobs is asked for."""
    counts = [item.request.params.logprobs or 0 for item in sample_items]
    for item in prompt_items:
        counts += [item.request.params.prompt_logprobs or 0] * len(item.logprob_positions)
    return counts


def _take_logprobs(step: _StepLogprobs, result: StepResult) -> None:
    found: Iterator[TokenLogprobs] = iter(step.found.to_host(_num_top(step.sample_items, step.prompt_items)))
    for item in step.sample_items:
        result.logprobs[item.request.request_id] = next(found)
    for item in step.prompt_items:
        result.prompt_logprobs[item.request.request_id] = list(islice(found, len(item.logprob_positions)))


class _InputBuffers:
    """The step's arrays at fixed device addresses: one copy a step, and what a captured graph will read."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._host = torch.zeros(5, max_rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else self._host.to(device)

    def fill(self, batch: Batch) -> StepInputs:
        arrays = (batch.ids, batch.positions, batch.kv_slots, batch.rope_lengths, batch.head_rows)
        host = self._host.numpy()
        assert batch.num_rows <= host.shape[1], f"{batch.num_rows} rows in buffers of {host.shape[1]}"
        for line, array in enumerate(arrays):
            host[line, : len(array)] = array
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return StepInputs(*(self._device[line, : len(array)] for line, array in enumerate(arrays)))
