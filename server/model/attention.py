"""The attention function that every layer calls: paged KV, the requests side by side in the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from kernels.types import AttentionMetadata
from server.adapters.layer import StepState
from server.model.kv import KVCache

ATTENTION_NAME = "multilora_paged"
"""Name in transformers' AttentionInterface. It has no entry in the mask interface, so models make no mask."""

HARMLESS_KWARGS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_hidden_states", "return_dict", "is_causal"}
)
"""What models pass along that changes nothing here: positions are in the metadata, there is no HF cache."""


class AttentionOps(Protocol):
    """What attention needs of a kernel backend; see kernels/ops.py."""

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """Travels as `model(..., step=context)` to each layer's attention. One per runner, for its whole life.

    The runner sets `step.attention` before each forward pass.
    """

    step: StepState
    kv: KVCache
    ops: AttentionOps


def register_attention() -> None:
    """Make ATTENTION_NAME a valid `attn_implementation`. Idempotent; the mapping is transformers' own."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


def paged_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    step: AttentionContext,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over all rows of the step, in the shape transformers asks for.

    query [1, heads, rows, head_dim], key and value [1, kv_heads, rows, head_dim] -> [1, rows, heads,
    head_dim]. Writes the rows' keys and values into the cache first. Raises RuntimeError for anything that
    it would have to ignore: a mask, dropout, an argument it does not know.
    """
    problems = refusals(module, attention_mask, dropout, kwargs)
    if problems:
        raise RuntimeError(f"{type(module).__name__} asks for attention that is not served: {'; '.join(problems)}")
    metadata = step.step.attention
    assert metadata is not None, "the runner sets the attention metadata before the forward pass"
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [rows, heads, head_dim]
    k_cache, v_cache = step.kv.keys[module.layer_idx], step.kv.values[module.layer_idx]
    step.ops.write_kv(k, v, k_cache, v_cache, metadata.slot_mapping)
    out = step.ops.paged_attention(
        q,
        k_cache,
        v_cache,
        metadata,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def refusals(
    module: nn.Module, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> list[str]:
    """Why these arguments of an attention call can't be honoured; empty when they can."""
    problems = []
    if attention_mask is not None:
        problems.append("a mask of its own")
    if dropout:
        problems.append(f"dropout {dropout} at inference")
    if not _is_causal(module, kwargs):
        problems.append("bidirectional attention")
    unknown = [name for name, value in kwargs.items() if name not in HARMLESS_KWARGS and _is_set(value)]
    if unknown:
        problems.append(f"unknown arguments {', '.join(sorted(unknown))}")
    return problems


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """The argument decides; without one the module's attribute; without that, attention is causal."""
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _is_set(value: object) -> bool:
    return value is not None and value is not False
