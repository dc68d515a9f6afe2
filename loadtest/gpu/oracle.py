"""What the ops should give, in fp64 from the tensors apart, and how far rounding may take a result from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kernels.types import AttentionMetadata, Segments, SiteGroup
from loadtest.gpu.adapters import Delta

_HALF_ULP32 = torch.finfo(torch.float32).eps / 2
MAX_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of a whole result, by norm: fp32 products in a matrix unit's shorter format stay within each element's bound."""


@dataclass
class Expected:
    """A result and its bound, both fp64 in the result's shape."""

    exact: torch.Tensor
    bound: torch.Tensor
    touched: torch.Tensor  # bool: elsewhere the op may not write, and `exact` means nothing


def half_ulp(dtype: torch.dtype) -> float:
    """Relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def lora(
    y: torch.Tensor,
    x: torch.Tensor,
    group: SiteGroup,
    segments: Segments,
    deltas: Mapping[tuple[int, int], Delta],
    ids: torch.Tensor | None = None,
) -> Expected:
    """Of segmented_lora, or with `ids` of segmented_embedding.

    Allowed are one rounding of the result, one of v = A x and of each member's B v, and fp32 sums.
    """
    exact = y.double()
    rounded, summed = torch.zeros_like(exact), torch.zeros_like(exact)
    touched = torch.zeros(y.shape, dtype=torch.bool, device=y.device)
    for rows, columns, weight, delta in _parts(group, segments, deltas):
        a, b = delta.a.double(), delta.b.double()
        if ids is None:
            v = x[rows].double() @ a.T
            summed[rows, columns] += abs(weight) * (x[rows].double().abs() @ a.abs().T @ b.abs().T)
        else:
            v = a[ids[rows]]
        exact[rows, columns] += weight * (v @ b.T)
        rounded[rows, columns] += abs(weight) * (v.abs() @ b.abs().T)
        if delta.bias is not None:
            exact[rows, columns] += weight * delta.bias.double()
            summed[rows, columns] += abs(weight) * delta.bias.double().abs()
        touched[rows, columns] = True
    u = half_ulp(y.dtype)
    terms = 4 * (group.in_features + 512) ** 0.5 * _HALF_ULP32  # of sums over K and the rank
    tiny = torch.finfo(y.dtype).tiny * u * 4  # gradual underflow (fp16)
    bound = 1.01 * u * exact.abs() + 4 * u * rounded + terms * (summed + rounded + exact.abs()) + tiny
    return Expected(exact, bound, touched)


def _parts(
    group: SiteGroup, segments: Segments, deltas: Mapping[tuple[int, int], Delta]
) -> Iterator[tuple[slice, slice, float, Delta]]:
    """(rows, columns, weight, delta) of each segment, slice and member that has the site."""
    for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
        for row, offset, width in zip(group.rows, group.offsets, group.widths, strict=True):
            for slot, weight in members:
                if (slot, row) in deltas:
                    yield slice(start, end), slice(offset, offset + width), weight, deltas[slot, row]


def attention(
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> Expected:
    """Of paged_attention. `keys`, `values`: per request [context, kv_heads, head_dim].

    Allowed are one rounding of the result, one of each probability, and fp32 scores and sums.
    """
    exact, magnitude = torch.zeros(2, *q.shape, dtype=torch.float64, device=q.device)
    largest = torch.ones((), dtype=torch.float64, device=q.device)  # score, for the error of its fp32 sum
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = slice(meta.query_starts[i], meta.query_starts[i + 1])
        own, repeats = q[rows].double(), q.shape[1] // k.shape[1]
        k, v = (kept.double().repeat_interleave(repeats, 1) for kept in (k, v))
        scores = torch.einsum("qhd,khd->hqk", own, k) * scale
        largest = torch.maximum(largest, own.norm(dim=-1).max() * k.norm(dim=-1).max() * scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        last = torch.arange(len(k) - len(own), len(k), device=q.device)[:, None]
        at = torch.arange(len(k), device=q.device)[None]
        hidden = at > last
        if sliding_window is not None:
            hidden |= at <= last - sliding_window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(-1, len(own), 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        exact[rows] = torch.einsum("hqk,khd->qhd", weights, v)
        magnitude[rows] = torch.einsum("hqk,khd->qhd", weights, v.abs())
    u = half_ulp(q.dtype)
    bound = 1.01 * u * exact.abs() + (2 * u + (200 + 4 * largest) * _HALF_ULP32) * magnitude + 1e-7
    return Expected(exact, bound, torch.ones(q.shape, dtype=torch.bool, device=q.device))


def verdict(got: torch.Tensor, before: torch.Tensor | None, expected: Expected) -> dict[str, float | bool]:
    """How right `got` is. `before` is what lay there: outside `touched` its bits must still be there.

    error  norm of the difference over that of what was expected, at most MAX_ERROR
    off    the worst element's difference over its bound; infinite for NaN
    """
    touched = expected.touched
    difference = (got.double() - expected.exact)[touched]
    off = (difference.abs() / expected.bound[touched]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    error = difference.norm() / expected.exact[touched].norm().clamp_min(1e-30)
    kept = before is None or same_bits(got[~touched], before[~touched])
    worst = float(off.max()) if off.numel() else 0.0
    is_right = kept and worst <= 1.0 and float(error) <= MAX_ERROR[got.dtype]
    return {"error": float(error), "off": worst, "kept": kept, "right": is_right}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bytes: NaN equals itself."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
