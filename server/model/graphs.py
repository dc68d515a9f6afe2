"""Decode steps as replays of captured graphs: the host gives the device one graph in place of a thousand kernels.

    captured at start, for each number of rows and each rank bucket (one more for sets of adapters):
        base and deltas, reading only memory at fixed addresses
    a step of 13 decodes, largest rank 24:
        inputs, segments, block tables ──fill──▶ buffers of (16 rows, bucket 64) ──replay──▶ logits[:13]

What differs from step to step is in buffers that are refilled before each replay; Python's arguments are those of the
capture for ever. Which adapters there are is in the slot table, at a fixed address too, so graphs stay valid while
adapters come and go. Rows 13 to 15 above are padding: in no segment, of no request, their KV goes to the dummy block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kernels.triton.metadata import SCRATCH_KEY, DeviceAttention
from kernels.triton.plan import RANK_BUCKETS, DeviceSegments, bucket_of, rank_bucket
from kernels.types import AttentionMetadata, Segments
from server.adapters.layer import StepState
from server.model.forward import Forward, StepInputs
from server.model.sampler import Largest

logger = logging.getLogger(__name__)

NO_ADAPTER = 0
"""The bucket of steps without any adapter: their graphs have no kernels for deltas"""
WITH_SETS = -1
"""In place of a bucket: steps with sets of adapters of any rank. Their kernels are larger and their v is as wide as the
largest rank, so steps of single adapters have graphs of their own"""

IDS, POSITIONS, KV_SLOTS, ROPE_LENGTHS, HEAD_ROWS = range(5)


class Graph(Protocol):
    """One captured pass."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record what `run` gives to the device; called once. Nothing of it may need a result on the host."""

    def replay(self) -> None:
        """Give all that to the device again, in the current stream, with the arguments that it had then."""


class CudaGraph:
    """An NVIDIA graph; all that are made with one `pool` share its memory, so only one may run at a time."""

    def __init__(self, pool: tuple[int, int]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, run: Callable[[], None]) -> None:
        # other threads may use the device meanwhile
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What graphs are captured for."""

    max_num_seqs: int  # rows of a decode step at most
    max_rank: int
    max_blocks: int  # of a request
    block_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    max_members: int = 1  # of a request's weighted set; 1: nobody can ask for one, and there are no graphs for them

    @property
    def sizes(self) -> list[int]:
        """Rows of a graph, ascending: at most a sixteenth more than a large step has, or seven."""
        steps = [1, 2, 4, *range(8, 257, 8), *range(272, self.max_num_seqs, 16)]
        return [size for size in steps if size < self.max_num_seqs] + [self.max_num_seqs]

    @property
    def buckets(self) -> list[int]:
        """NO_ADAPTER and the rank buckets that adapters may fall into."""
        return [NO_ADAPTER, *(bucket for bucket in RANK_BUCKETS if bucket <= bucket_of(self.max_rank))]

    @property
    def families(self) -> list[int]:
        """What there is a graph for at each of `sizes`: the buckets, and WITH_SETS where there may be sets."""
        return [*self.buckets, *([WITH_SETS] if self.max_members > 1 else [])]


@dataclass(slots=True)
class _Captured:
    graph: Graph
    plan: DeviceSegments | None  # over the body's rows and the head's: in a decode step they are the same
    filled: Segments | None = None  # what the plan holds

    def fill(self, segments: Segments) -> None:
        """In most steps the requests are those of the last one, and the plan stays as it is."""
        if self.plan is not None and segments != self.filled:
            self.plan.fill(segments)
            self.filled = segments


class GraphForward:
    """A Forward that replays graphs for steps of decodes alone, and leaves all other steps to `eager`.

    The logits it returns are overwritten by the next call; work given to the device before that reads them whole.
    """

    def __init__(self, eager: Forward, step: StepState, shape: GraphShape, new_graph: Callable[[], Graph]) -> None:
        """Captures everything. `step` is the eager forward's; its fields that change are None again afterwards."""
        self._eager = eager
        self._step = step
        self._shape = shape
        rows = shape.max_num_seqs
        self._inputs = torch.zeros(5, rows, dtype=torch.int64, device=shape.device)
        self._inputs[HEAD_ROWS] = torch.arange(rows)  # every row of a decode step is sampled
        self._attention = DeviceAttention(rows, shape.max_blocks, shape.device)  # a graph reads as much as it has rows
        self._logits = torch.empty(rows, shape.vocab_size, dtype=shape.dtype, device=shape.device)
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._size_of = [next(size for size in shape.sizes if size >= count) for count in range(rows + 1)]
        started = time.monotonic()
        with torch.inference_mode():
            for size in reversed(shape.sizes):  # the largest first: the others fit into its memory
                for family in shape.families:
                    self._graphs[size, family] = self._capture(size, family, new_graph())
        step.segments = step.head_segments = step.attention = step.rope_lengths = None
        logger.info(
            "captured %d graphs in %.1f s: up to %d rows, rank buckets %s%s",
            len(self._graphs),
            time.monotonic() - started,
            rows,
            shape.buckets[1:],
            f", sets of up to {shape.max_members}" if shape.max_members > 1 else "",
        )

    @property
    def largest(self) -> Largest:
        return self._eager.largest

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        captured = self._captured_for(inputs)
        if captured is None:
            return self._eager(inputs)
        rows = len(inputs.ids)
        self._fill(captured, inputs, rows)
        captured.graph.replay()
        return self._logits[:rows]

    def _captured_for(self, inputs: StepInputs) -> _Captured | None:
        step, rows = self._step, len(inputs.ids)
        assert step.attention is not None, "the runner sets the attention metadata before the forward pass"
        if rows > self._shape.max_num_seqs or step.attention.num_decodes != rows or len(inputs.head_rows) != rows:
            return None
        segments = step.segments
        if not segments:
            return self._graphs[self._size_of[rows], NO_ADAPTER]
        if segments != step.head_segments:
            return None
        bucket, most = rank_bucket(segments, step.weights), max(map(len, segments.members))
        if bucket not in self._shape.buckets or most > self._shape.max_members:
            return None
        return self._graphs[self._size_of[rows], WITH_SETS if most > 1 else bucket]

    def _fill(self, captured: _Captured, inputs: StepInputs, rows: int) -> None:
        """Everything that the graph reads and that differs from the last replay, in stream order."""
        sources = [inputs.ids, inputs.positions, inputs.kv_slots, inputs.rope_lengths]
        torch._foreach_copy_([self._inputs[line, :rows] for line in (IDS, POSITIONS, KV_SLOTS, ROPE_LENGTHS)], sources)
        # the last step's rows behind these would write into blocks that are others' now
        self._inputs[KV_SLOTS, rows : self._size_of[rows]].zero_()
        step = self._step
        assert step.attention is not None
        self._attention.fill(step.attention)
        if step.segments is not None:
            captured.fill(step.segments)

    def _capture(self, size: int, family: int, graph: Graph) -> _Captured:
        """A graph over `size` rows, each of a request and with an adapter of its own, as far as the grid goes."""
        segments = None
        if family == WITH_SETS:
            bucket = self._shape.buckets[-1]
            segments = DeviceSegments(size, size * self._shape.max_members, bucket, self._shape.device)
        elif family != NO_ADAPTER:
            segments = DeviceSegments(size, size, family, self._shape.device)
        self._pose(size, segments)
        inputs = StepInputs(*self._inputs[:, :size])

        def run() -> None:
            self._logits[:size].copy_(self._eager(inputs))

        run()  # compiles what is to be compiled and makes what is made once: a capture may do neither
        graph.capture(run)
        return _Captured(graph, segments)

    def _pose(self, size: int, segments: DeviceSegments | None) -> None:
        """Set the step's fields as for a step of `size` decodes; the kernels read the two device forms alone."""
        step = self._step
        rows = list(range(size))
        plan = None
        if segments is not None:
            # slot 1 is absent as yet, or whatever was loaded first: what is computed here goes nowhere
            members = ((1, 1.0),) * (segments.max_members // size)
            plan = Segments(rows, [row + 1 for row in rows], [members] * size, {SCRATCH_KEY: segments})
            segments.fill(plan)
        step.segments = step.head_segments = plan
        step.rope_lengths = self._inputs[ROPE_LENGTHS, :size]
        step.attention = AttentionMetadata(
            num_decodes=size,
            query_starts=[*rows, size],
            context_lens=[1] * size,
            block_tables=np.zeros((size, self._shape.max_blocks), np.int32),
            slot_mapping=self._inputs[KV_SLOTS, :size],
            block_size=self._shape.block_size,
            scratch={SCRATCH_KEY: self._attention},
        )
        self._attention.fill(step.attention)
