"""A backend whose kernels need a CUDA device, behind the interface that the tests' CPU tensors know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kernels.ops import Backend
from kernels.types import AttentionMetadata, Segments, SiteGroup, SlotWeights


class OnCuda:
    """Copies every argument to the device, and what a call changed back. Scratch stays the caller's."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def segmented_lora(
        self, y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
    ) -> None:
        there = y.cuda()
        self.backend.segmented_lora(there, x.cuda(), _weights(weights), group, segments)
        y.copy_(there)

    def segmented_embedding(
        self, y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments
    ) -> None:
        there = y.cuda()
        self.backend.segmented_embedding(there, ids.cuda(), _weights(weights), row, segments)
        y.copy_(there)

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        caches = k_cache.cuda(), v_cache.cuda()
        self.backend.write_kv(k.cuda(), v.cuda(), *caches, slot_mapping.cuda())
        k_cache.copy_(caches[0])
        v_cache.copy_(caches[1])

    def paged_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMetadata, **options: Any
    ) -> torch.Tensor:
        meta = replace(meta, slot_mapping=meta.slot_mapping.cuda())
        sinks = options.get("sinks")
        options["sinks"] = None if sinks is None else sinks.cuda()
        return self.backend.paged_attention(q.cuda(), k_cache.cuda(), v_cache.cuda(), meta, **options).cpu()


def _weights(weights: SlotWeights) -> SlotWeights:
    return replace(weights, arena=weights.arena.cuda(), table=weights.table.cuda())
