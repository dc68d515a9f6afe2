"""The backend "cpu": native kernels for bf16, built on first use; all else goes to the torch backend.

`is_available` says whether there is a library for this machine (kernels/cpu/build.py logs which, or why not).
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from kernels.cpu.attention import PagedAttention
from kernels.cpu.build import load
from kernels.cpu.check import is_right
from kernels.cpu.lora import Lora
from kernels.native_library import Library
from kernels.types import AttentionMetadata, Segments, SiteGroup, SlotWeights

log = logging.getLogger(__name__)

__all__ = ["is_available", "library", "paged_attention", "segmented_embedding", "segmented_lora", "write_kv"]


class _Native(NamedTuple):
    lora: Lora
    attention: PagedAttention


@functools.cache
def library() -> Library | None:
    """The process's library of native kernels, loaded (or built) at the first call; None where there is none.

    One that computes wrongly on this processor is told of and not used; without tiles it is tried again.
    """
    found = load()
    while found is not None and not is_right(found):
        fallback = "avx512" if found.level == "amx" else "none"
        log.error("native CPU kernels: level %s computes wrongly on this processor; %s instead", found.level, fallback)
        found = load(fallback)
    return found


def is_available() -> bool:
    return library() is not None


@functools.cache
def _native() -> _Native:
    found = library()
    if found is None:
        raise RuntimeError("the backend 'cpu' has no native kernels on this machine; the backend 'torch' needs none")
    return _Native(Lora(found), PagedAttention(found))


def segmented_lora(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
) -> None:
    """See kernels/ops.py."""
    _native().lora.segmented_lora(y, x, weights, group, segments)


def segmented_embedding(y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments) -> None:
    """See kernels/ops.py."""
    _native().lora.segmented_embedding(y, ids, weights, row, segments)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See kernels/ops.py."""
    _native().attention.write_kv(k, v, k_cache, v_cache, slot_mapping)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See kernels/ops.py."""
    return _native().attention.paged_attention(
        q, k_cache, v_cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )
