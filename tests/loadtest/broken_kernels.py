"""Backends for tests of loadtest.gpu: torch's, each with one fault of a kind that kernels have had."""

from __future__ import annotations

import dataclasses
import types

import torch

from kernels import torch_backend as right
from kernels.types import Segments

OPS = ("segmented_lora", "segmented_embedding", "write_kv", "paged_attention")


def backend(**faulty) -> types.SimpleNamespace:
    """torch's ops, but for these."""
    return types.SimpleNamespace(**{name: getattr(right, name) for name in OPS} | faulty)


def _nothing(y, x, weights, group, segments):
    """The delta is never added."""


def _neighbour(y, x, weights, group, segments):
    """The last segment has the first one's adapter."""
    members = segments.members[:-1] + segments.members[:1]
    right.segmented_lora(y, x, weights, group, Segments(segments.starts, segments.ends, members))


def _base_rows(y, x, weights, group, segments):
    """Rows of no segment are written, by zeros times what lies there."""
    right.segmented_lora(y, x, weights, group, segments)
    y += 0 * y
    y[torch.isnan(y)] = 0


def _unsteady(y, x, weights, group, segments):
    """Sums whose order changes from call to call."""
    right.segmented_lora(y, x, weights, group, segments)
    y *= 1 + 2e-7 * torch.rand(())


def _short(y, ids, weights, row, segments):
    """An embedding's last row is left out."""
    ends = [min(end, len(y) - 1) for end in segments.ends]
    starts = [min(start, end) for start, end in zip(segments.starts, ends, strict=True)]
    right.segmented_embedding(y, ids, weights, row, Segments(starts, ends, segments.members))


def _misplaced(k, v, k_cache, v_cache, slot_mapping):
    """One row too far."""
    right.write_kv(k, v, k_cache, v_cache, slot_mapping + (slot_mapping == slot_mapping.max()))


def _late(q, k_cache, v_cache, meta, **options):
    """A row sees the key behind its own."""
    longer = dataclasses.replace(meta, context_lens=[length + 1 for length in meta.context_lens], scratch={})
    return right.paged_attention(q, k_cache, v_cache, longer, **options)


def _raises(*arguments, **options):
    raise RuntimeError("no such image\nand more")


FAULTS = {
    "nothing": ({"segmented_lora": _nothing}, {"adapters", "adapters in a graph"}),
    "neighbour": ({"segmented_lora": _neighbour}, {"adapters", "adapters in a graph"}),
    "base rows": ({"segmented_lora": _base_rows}, {"adapters", "adapters in a graph"}),
    "unsteady": ({"segmented_lora": _unsteady}, {"adapters"}),
    "short": ({"segmented_embedding": _short}, {"embedding"}),
    "misplaced": ({"write_kv": _misplaced}, {"KV writes", "attention in a graph"}),
    "late": ({"paged_attention": _late}, {"attention", "attention in a graph"}),
}
"""Fault -> the faulty ops, and the kinds of cases in which the check has to see it"""


def register(monkeypatch, **faulty) -> str:
    """The name under which kernels/ops.py has such a backend until the test's end."""
    module = backend(**faulty)
    monkeypatch.setitem(__import__("sys").modules, "kernels.broken_for_tests", module)
    monkeypatch.setitem(__import__("kernels.ops").ops.MODULES, "broken", "kernels.broken_for_tests")
    return "broken"
