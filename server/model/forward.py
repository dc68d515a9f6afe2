"""The forward pass of a step: the base's own modules, or the native pass that computes the same in one call."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from adapters_store.manifest import BaseManifest
from kernels import cpu
from kernels.cpu.forward import Decoder
from kernels.cpu.gemm import Gemm
from server.adapters.layer import StepState
from server.model.attention import AttentionContext, AttentionOps
from server.model.kv import KVCache
from server.model.loader import LoadedBase
from server.model.native import decoder_spec, refusal
from server.model.sampler import Largest, largest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What differs from row to row; int64 all, views of the runner's persistent buffers."""

    ids: torch.Tensor  # [rows]
    positions: torch.Tensor  # [rows]
    kv_slots: torch.Tensor  # [rows]
    rope_lengths: torch.Tensor  # [rows]
    head_rows: torch.Tensor  # [S + P]: sampled rows, then those that give prompt logprobs


class Forward(Protocol):
    """One forward pass over the rows of a step; the rest of the step is in the StepState."""

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """The head rows' logits [S + P, V] in the base's dtype. Writes the rows' KV."""

    @property
    def largest(self) -> Largest:
        """How the sampler finds each row's largest logit."""


class ModuleForward:
    """The Hugging Face modules, unchanged in meaning: any base, any dtype, any backend."""

    def __init__(self, model: nn.Module, step: StepState, kv: KVCache, ops: AttentionOps) -> None:
        self._model = model
        self._context = AttentionContext(step, kv, ops)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        out = self._model(
            input_ids=inputs.ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            logits_to_keep=inputs.head_rows,
            step=self._context,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    @property
    def largest(self) -> Largest:
        return largest


class NativeForward:
    """The native pass over packed weights; takes the weights out of the modules, which are of no use after it."""

    def __init__(self, base: LoadedBase, manifest: BaseManifest, step: StepState, kv: KVCache, max_rows: int) -> None:
        """`base` has no native.refusal and is adapted with this `step`; there is a library."""
        library = cpu.library()
        assert library is not None
        self._step = step
        self._gemm = Gemm(library)
        self._decoder = Decoder(library, decoder_spec(base, manifest, kv), step.weights, max_rows)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        step = self._step
        assert step.attention is not None, "the runner sets the attention metadata before the forward pass"
        return self._decoder.run(inputs, step.attention, step.segments, step.head_segments)

    @property
    def largest(self) -> Largest:
        return self._largest

    def _largest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._gemm.argmax(logits)  # -1 reads the last logit, which is then put right
        best = logits[torch.arange(len(logits)), tokens].masked_fill_(tokens < 0, torch.nan)
        return best, tokens


def forward_of(
    base: LoadedBase, manifest: BaseManifest, step: StepState, kv: KVCache, ops: AttentionOps, max_rows: int
) -> Forward:
    """The native pass where the backend is "cpu" and computes this base, else its modules; says which."""
    reason = refusal(base) if ops is cpu else "another kernel backend than cpu"
    if reason is None:
        logger.info("forward pass: native, weights packed")
        return NativeForward(base, manifest, step, kv, max_rows)
    logger.info("forward pass: the base's modules (%s)", reason)
    return ModuleForward(base.model, step, kv, ops)
