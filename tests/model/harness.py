"""Driving a runner with hand-made mixed batches, the scheduler left out: what a step contains is chosen here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from adapters_store.manifest import BaseManifest
from kernels.ops import get_backend
from kernels.types import TABLE_COLUMNS, SlotWeights
from server.adapters.layer import StepState
from server.engine.batch import Batch, ScheduledRequest
from server.engine.messages import SamplingParams
from server.engine.request import Request
from server.model.forward import forward_of
from server.model.kv import KVCache
from server.model.loader import LoadedBase, load_base
from server.model.manifest import build_manifest
from server.model.runner import ModelRunner
from server.model.surgery import Replacement, adapt

BLOCK_SIZE = 4
NUM_BLOCKS = 400
MAX_ROWS = 128


@dataclass
class Served:
    """A base ready to run steps, without adapters unless `weights` says otherwise."""

    base: LoadedBase
    manifest: BaseManifest
    runner: ModelRunner
    kv: KVCache
    step: StepState
    replacements: list[Replacement]


def serve(path: Path, dtype: str = "float32", *, backend: str = "torch", weights: SlotWeights | None = None) -> Served:
    """Load the base at `path`; every KV block but the dummy starts as NaN, as if another request had left it.

    Without `weights` there are no adapters.
    """
    base = load_base(path, dtype)
    manifest = build_manifest(path, dtype)
    ops = get_backend(backend)
    if weights is None:
        table = torch.zeros(2, len(manifest.sites), TABLE_COLUMNS, dtype=torch.int64)
        weights = SlotWeights(torch.zeros(8, dtype=base.dtype), table)
    step = StepState(weights=weights, ops=ops)
    replacements = adapt(base.model, manifest, step)
    kv = KVCache(base.kv_shape, NUM_BLOCKS, BLOCK_SIZE, base.dtype, base.device)
    for cache in (*kv.keys, *kv.values):
        cache[1:] = torch.nan
    forward = forward_of(base, manifest, step, kv, ops, MAX_ROWS)
    runner = ModelRunner(
        forward,
        step,
        eos_token_ids=base.eos_token_ids,
        block_size=BLOCK_SIZE,
        max_rows=MAX_ROWS,
        device=base.device,
    )
    return Served(base, manifest, runner, kv, step, replacements)


def greedy(prompt: Sequence[int], name: str, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(name, list(prompt), len(prompt), params)


@dataclass
class Driver:
    """Continuous batching in a dozen lines: decodes first, then prefill chunks, under a row budget.

    Request i arrives at step i * `stagger`. Blocks come in a shuffled order, so tables are never runs.
    """

    served: Served
    row_budget: int = 11
    stagger: int = 2
    seed: int = 0
    batches: list[tuple[int, int]] = field(default_factory=list)  # (decodes, rows) of every step

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        """The output ids of each request, run to its max_tokens."""
        free = list(range(1, NUM_BLOCKS))
        random.Random(self.seed).shuffle(free)
        for number in range(10_000):
            arrived = requests[: number // self.stagger + 1] if self.stagger else requests
            waiting = [r for r in arrived if r.num_output < r.params.max_tokens]
            if not waiting and len(arrived) == len(requests):
                return [request.token_ids[request.num_prompt :] for request in requests]
            items = list(self._pick(waiting, free))
            if items:
                self._step(items)
        raise AssertionError("the requests never end")

    def _pick(self, waiting: Sequence[Request], free: list[int]) -> Iterator[ScheduledRequest]:
        budget = self.row_budget
        for request in sorted(waiting, key=lambda request: len(request.token_ids) - request.num_computed):
            num_tokens = min(budget, len(request.token_ids) - request.num_computed)
            if num_tokens == 0:
                continue
            end = request.num_computed + num_tokens
            while len(request.blocks) * BLOCK_SIZE < end:
                request.blocks.append(free.pop())
            budget -= num_tokens
            yield ScheduledRequest(request, request.num_computed, num_tokens, end == len(request.token_ids))

    def _step(self, items: list[ScheduledRequest]) -> None:
        batch = make_batch(items)
        self.batches.append((batch.num_decodes, batch.num_rows))
        result = self.served.runner.collect(self.served.runner.dispatch(batch))
        for item in items:
            item.request.num_computed = item.start + item.num_tokens
        for item in batch.sample_items:
            item.request.token_ids.append(result.tokens[item.request.request_id])
            if len(item.request.token_ids) - 1 == self.served.base.rope_switch:
                item.request.num_computed = 0  # as the scheduler does: all KV was rotated for a short length


def whole_prompts(requests: Sequence[Request]) -> list[ScheduledRequest]:
    """One step's worth: every request's whole prompt, in consecutive blocks from 1 on."""
    items, next_block = [], 1
    for request in requests:
        count = -(-len(request.token_ids) // BLOCK_SIZE)
        request.blocks = list(range(next_block, next_block + count))
        next_block += count
        items.append(ScheduledRequest(request, 0, len(request.token_ids), samples=True))
    return items


def make_batch(items: Sequence[ScheduledRequest]) -> Batch:
    """The flat arrays of a step of `items`, decodes moved to the front."""
    ordered = sorted(items, key=lambda item: not item.is_decode)
    positions = [np.arange(item.start, item.start + item.num_tokens) for item in ordered]
    counts = [item.num_tokens for item in ordered]
    starts = np.cumsum([0, *counts])
    width = max(len(item.request.blocks) for item in ordered)
    tables = np.zeros((len(ordered), width), np.int32)
    for row, item in enumerate(ordered):
        tables[row, : len(item.request.blocks)] = item.request.blocks
    slots = [tables[row, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for row, p in enumerate(positions)]
    sampled = [row for row, item in enumerate(ordered) if item.samples]
    return Batch(
        items=ordered,
        num_decodes=sum(item.is_decode for item in ordered),
        ids=np.concatenate(
            [item.request.token_ids[p[0] : p[-1] + 1] for item, p in zip(ordered, positions, strict=True)]
        ),
        positions=np.concatenate(positions),
        kv_slots=np.concatenate(slots).astype(np.int64),
        rope_lengths=np.repeat([len(item.request.token_ids) for item in ordered], counts),
        query_starts=starts.tolist(),
        context_lens=[item.start + item.num_tokens for item in ordered],
        block_tables=tables,
        row_slots=[item.request.slot for item in ordered],
        sample_rows=starts[1:][sampled] - 1,
        sample_items=[ordered[row] for row in sampled],
        prompt_rows=np.array(
            [
                int(start) + position - item.start
                for start, item in zip(starts, ordered, strict=False)
                for position in item.logprob_positions
            ],
            np.int64,
        ),
        prompt_items=[item for item in ordered if item.logprob_positions],
    )
