"""What a kernel sees: pointers and shapes, never a request. Plain containers, no logic of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

# Columns of a slot-table entry, all in elements of the arena (not bytes); rank 0 = site absent.
A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, STRIDE = range(5)
TABLE_COLUMNS = 5


@dataclass(slots=True)
class SlotWeights:
    """The device arena and the table through which kernels reach a (slot, site).

    table[slot, row] = (A offset, B offset, bias offset or -1, true rank, padded rank).
    A is [padded rank, K] row-major, B is [N, padded rank] row-major (an embedding's A is
    [V, padded rank]), bias is [N]; padding is zeros. Rank 0 with a bias is legal. Slot 0 is "no
    adapter": its table rows are all absent and kernels never see it in a segment.
    """

    arena: torch.Tensor  # [elements] in the model's dtype, one allocation
    table: torch.Tensor  # int64 [slots, site rows, 5], at a fixed address
    version: int = 0  # raised by the slots whenever a table row changes; keys backends' cached views
    scratch: dict[object, object] = field(default_factory=dict, repr=False, compare=False)
    """what a backend derives from the table and keeps between calls (views, never copies of weights);
    one entry per backend, dies with the arena"""
    slot_ranks: np.ndarray | None = None
    """int64 [slots] on the host: the largest rank of each slot, as of `version`; None: not kept, read the table"""


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Static geometry of one packed projection: slice i is y[:, offsets[i] : offsets[i] + widths[i]]."""

    rows: tuple[int, ...]  # row in the slot table, per slice
    offsets: tuple[int, ...]
    widths: tuple[int, ...]  # N per slice
    in_features: int  # K


@dataclass(slots=True)
class Segments:
    """The segments of one step (a SegmentPlan as kernels see it), made once and shared by every layer.

    Segment s covers rows starts[s] : ends[s] of the batch; rows in no segment are base rows. Its
    members are (slot, weight) pairs members[s]; its delta is their weighted sum. A slot may own
    several segments. Segments are ascending and disjoint.
    """

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    members: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    scratch: dict[object, object] = field(default_factory=dict, repr=False, compare=False)
    """the segments in a backend's own form, one entry per backend; checked against the lists at each call"""

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(slots=True)
class AttentionMetadata:
    """The KV geometry of one step. Requests are in row order; the first num_decodes have one row each.

    Request i owns rows query_starts[i] : query_starts[i + 1]; after this step its KV length is
    context_lens[i], so its first row is at position context_lens[i] - (number of its rows).
    """

    num_decodes: int
    query_starts: Sequence[int]  # [requests + 1]
    context_lens: Sequence[int]  # [requests]
    block_tables: np.ndarray  # int32 [requests, max blocks]; unused entries 0 (the dummy block)
    slot_mapping: torch.Tensor  # int64 [rows]: flat KV position (block * block_size + offset) of each row
    block_size: int
    scratch: dict[object, object] = field(default_factory=dict)
    """index and mask tensors that a backend makes at its first layer and reuses for the rest of the step"""
