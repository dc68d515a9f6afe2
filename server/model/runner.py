"""The model as the engine sees it: dispatch a batch, collect its sampled ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.types import AttentionMetadata
from server.adapters.layer import AdapterOps, StepState
from server.adapters.plan import SlotCheck, segments_of
from server.engine.batch import Batch
from server.model.attention import AttentionContext, AttentionOps
from server.model.kv import KVCache
from server.model.loader import LoadedBase
from server.model.sampler import Sampler


class KernelOps(AdapterOps, AttentionOps, Protocol):
    """A kernel backend: all that a runner needs of one."""


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A dispatched step; `collect` turns it into ids."""

    token_ids: torch.Tensor  # int64 [sampled items], on the device


class ModelRunner:
    """Runs steps of one base on one device. One thread calls it, and collects a step before the next.

    base: loaded and adapted (surgery.adapt) with this `step`. The runner sets the fields of `step` that
    change, before each forward pass; its rows are bounded by `max_rows`.
    """

    def __init__(
        self,
        base: LoadedBase,
        kv: KVCache,
        step: StepState,
        ops: KernelOps,
        *,
        max_rows: int,
        holds: SlotCheck | None = None,
    ) -> None:
        self._model = base.model
        self._step = step
        self._context = AttentionContext(step, kv, ops)
        self._sampler = Sampler(base.eos_token_ids)
        self._inputs = _InputBuffers(max_rows, base.device)
        self._block_size = kv.block_size
        self._holds = holds

    def dispatch(self, batch: Batch) -> StepHandle:
        """Start one forward pass and the draws of its sampled rows."""
        logits = self.logits(batch)
        with torch.inference_mode():
            tokens = self._sampler.sample(logits, [item.request for item in batch.sample_items])
        return StepHandle(tokens)

    def collect(self, handle: StepHandle) -> npt.NDArray[np.int64]:
        """The sampled ids in the order of `batch.sample_items`; NOT_FINITE (-1) for a row that must fail."""
        ids: npt.NDArray[np.int64] = handle.token_ids.cpu().numpy()
        return ids

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits of the sampled rows, [S, V] in the model's dtype. Writes the rows' KV."""
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
            out = self._model(
                input_ids=inputs.ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.sample_rows,
                step=self._context,
            )
        logits: torch.Tensor = out.logits[0]
        return logits


@dataclass(frozen=True, slots=True)
class _StepInputs:
    """Views of the persistent buffers, as long as the step; int64 all."""

    ids: torch.Tensor  # [rows]
    positions: torch.Tensor  # [rows]
    kv_slots: torch.Tensor  # [rows]
    rope_lengths: torch.Tensor  # [rows]
    sample_rows: torch.Tensor  # [S]


class _InputBuffers:
    """The step's arrays at fixed device addresses: one copy a step, and what a captured graph will read."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._host = torch.zeros(5, max_rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else self._host.to(device)

    def fill(self, batch: Batch) -> _StepInputs:
        arrays = (batch.ids, batch.positions, batch.kv_slots, batch.rope_lengths, batch.sample_rows)
        host = self._host.numpy()
        assert batch.num_rows <= host.shape[1], f"{batch.num_rows} rows in buffers of {host.shape[1]}"
        for line, array in enumerate(arrays):
            host[line, : len(array)] = array
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return _StepInputs(*(self._device[line, : len(array)] for line, array in enumerate(arrays)))
