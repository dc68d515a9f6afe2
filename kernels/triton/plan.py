"""The segments of a step in the device's memory, where a captured graph finds them at fixed addresses.

    segments: rows 0:1 slot 3 | rows 1:40 slots 5 + 7          tiles of 16 rows, one record for each member:

        record 0   number of tiles, number of entries          a header: nothing behind the last entry counts
        record 1   rows 0:1    slot 3                          tiles, with their first member,
        record 2   rows 1:17   slot 5  others: records 5 to 6  in the order of their rows
        record 3   rows 17:33  slot 5  others: records 6 to 7
        record 4   rows 33:40  slot 5  others: records 7 to 8
        record 5   rows 1:17   slot 7                          then the tiles' other members
        ...

The shrink goes over all entries and writes v = A x for each (entry, row); the expand goes over the tiles
and sums what their members' v give. Grids are sized by what a plan may hold; programs read the header and
do no more than is in it. This file needs no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from kernels.types import RANK, Segments, SlotWeights

RECORD = 8  # int32 fields of a record: 32 bytes, what a GPU reads at once
START, ROWS, SLOT, V_ROW, WEIGHT, OTHERS, OTHERS_END = range(7)
"""Of an entry: first row, number of rows, slot, row of v of its first row, weight (the fp32's bits), and of a
tile's first entry the records of its other members."""

RANK_BUCKETS = (16, 64, 512)
FEW_ROWS = 4
"""Up to this many rows in a step are multiplied and summed without tensor cores ("few")."""
DECODE_ROWS = 256
"""Up to this many rows in a step are taken in tiles of 16 ("decode": most segments are short), more in tiles of 64."""

Records = npt.NDArray[np.int32]
Signature = tuple[Any, ...]


WARM_ROWS = (1, FEW_ROWS, 16, 64, DECODE_ROWS, 512, 1024, 2048, 4096)
"""Steps of so many rows, with each bucket of ranks, compile between them what a step of any number of rows needs."""

Form = Literal["few", "decode", "prefill"]
TILE_ROWS: dict[Form, int] = {"few": 4, "decode": 16, "prefill": 64}


def form_of(rows: int) -> Form:
    """How a step of `rows` rows, padding included, is computed: kernels/triton/launch.py."""
    if rows <= FEW_ROWS:
        return "few"
    return "decode" if rows <= DECODE_ROWS else "prefill"


def tile_rows_of(form: Form, rows: int) -> int:
    return 1 if form == "few" and rows <= 1 else TILE_ROWS[form]


def usual_tiles(form: Form, rows: int) -> int:
    """Tiles that kernels are shaped for: of a step of decodes one a row, of a prefill full ones.

    By powers of two between bounds, so that few kernels are compiled: see WARM_ROWS.
    """
    rounded = power_above(rows)
    return min(max(rounded, 512), 4096) // TILE_ROWS[form] if form == "prefill" else min(max(rounded, 16), DECODE_ROWS)


def power_above(number: int) -> int:
    """The first power of two that is at least `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def bucket_of(rank: int) -> int:
    """The bucket of a largest rank: what the kernels' grid and v are sized for."""
    return next((bucket for bucket in RANK_BUCKETS if rank <= bucket), -(-rank // 64) * 64)


def rank_bucket(segments: Segments, weights: SlotWeights) -> int:
    """The bucket of the largest rank of the slots in `segments`; the smallest one where there are none.

    Where the arena keeps no `slot_ranks` on the host, the table is read whenever its version has changed:
    with CUDA that waits for the device.
    """
    slots = {slot for members in segments.members for slot, _ in members}
    if not slots:
        return RANK_BUCKETS[0]
    return bucket_of(int(_slot_ranks(weights)[list(slots)].max()))


def _slot_ranks(weights: SlotWeights) -> npt.NDArray[np.int64]:
    if weights.slot_ranks is not None:
        return weights.slot_ranks
    kept = cast(tuple[int, npt.NDArray[np.int64]] | None, weights.scratch.get("triton ranks"))
    if kept is None or kept[0] != weights.version:
        ranks = weights.table[:, :, RANK].amax(1).cpu().numpy()
        kept = weights.scratch["triton ranks"] = (weights.version, ranks)
    return kept[1]


class DeviceSegments:
    """The records of one plan in persistent device memory, and the integers by which its kernels are launched.

    max_rows     rows of the step, padding included: decides the form and the tiles' size, bounds their number
    max_members  (row, member) pairs at most: a row in a set of three counts three. As many as rows means that
                 there are no sets, which makes for a smaller kernel
    rank_bucket  what `rank_bucket` gave, at least: a larger rank than it would be cut off
    max_tiles    tiles at most, if fewer than max_rows

    All of these are fixed for the object's life, as is `records`' address; `fill` changes only what is in it.
    """

    def __init__(
        self,
        max_rows: int,
        max_members: int,
        rank_bucket: int,
        device: torch.device | str = "cpu",
        max_tiles: int | None = None,
        max_entries: int | None = None,
    ) -> None:
        self.max_rows = max_rows
        self.max_members = max_members
        self.rank_bucket = rank_bucket
        self.form = form_of(max_rows)
        self.tile_rows = tile_rows_of(self.form, max_rows)
        self.usual_tiles = usual_tiles(self.form, max_rows)
        self.has_sets = max_members > max_rows
        self.max_tiles = max_rows if max_tiles is None else max_tiles
        self.max_entries = (max_members if self.has_sets else self.max_tiles) if max_entries is None else max_entries
        with torch.inference_mode(False):  # else `fill` would be refused outside of it
            self.records = torch.zeros(1 + self.max_entries, RECORD, dtype=torch.int32, device=device)

    def fill(self, segments: Segments) -> None:
        """Take on another step's segments, in stream order: kernels launched before still see the former ones.

        Raises ValueError for segments that don't fit the maxima.
        """
        self._put(segments, _records(segments, self.tile_rows))

    def _put(self, segments: Segments, records: Records) -> None:
        tiles, entries = int(records[0, 0]), int(records[0, 1])
        end = max(segments.ends, default=0)
        pairs = sum((e - s) * len(m) for s, e, m in zip(segments.starts, segments.ends, segments.members, strict=True))
        if end > self.max_rows or tiles > self.max_tiles or entries > self.max_entries or pairs > self.max_members:
            raise ValueError(
                f"segments of {end} rows, {pairs} members' rows, {tiles} tiles and {entries} entries don't fit a plan "
                f"for {self.max_rows}, {self.max_members}, {self.max_tiles} and {self.max_entries}"
            )
        if entries > tiles and not self.has_sets:
            raise ValueError("a set of adapters does not fit a plan without sets (max_members = max_rows)")
        if self.records.device.type == "cpu":
            self.records[: len(records)].copy_(torch.from_numpy(records))
            return
        # Pinned memory from torch's own cache: it is not given out again before this copy has happened.
        staged = torch.empty(records.shape, dtype=torch.int32, pin_memory=True)
        staged.numpy()[:] = records
        self.records[: len(records)].copy_(staged, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _StepPlan:
    """What is kept in a Segments' scratch for its one step, while the lists are what they were."""

    signature: Signature
    rows: int
    device: DeviceSegments


def device_segments(segments: Segments, weights: SlotWeights, rows: int) -> DeviceSegments:
    """The device form of `segments` in a step of `rows` rows.

    A DeviceSegments in `segments.scratch["triton"]` is its owner's, who fills it before each step: it is
    taken as it is, whatever the lists say (at a graph's replay they are those of the capture). Else one is
    made for this step, and made anew when the lists or the arena's table have changed.
    """
    kept = segments.scratch.get("triton")
    if isinstance(kept, DeviceSegments):
        return kept
    signature = (weights.version, id(weights), *segments.starts, *segments.ends, *segments.members)
    if isinstance(kept, _StepPlan) and kept.signature == signature and kept.rows == rows:
        return kept.device
    device = _made(segments, weights, rows)
    segments.scratch["triton"] = _StepPlan(signature, rows, device)
    return device


def _made(segments: Segments, weights: SlotWeights, rows: int) -> DeviceSegments:
    """A plan that holds exactly these segments."""
    records = _records(segments, tile_rows_of(form_of(rows), rows))
    tiles, entries = int(records[0, 0]), int(records[0, 1])
    pairs = int(records[1 : 1 + entries, ROWS].sum())
    members = max(rows, pairs) + (1 if entries > tiles and pairs <= rows else 0)
    bucket = rank_bucket(segments, weights)
    device = DeviceSegments(rows, members, bucket, weights.arena.device, max_tiles=tiles, max_entries=entries)
    device._put(segments, records)
    return device


def _records(segments: Segments, tile_rows: int) -> Records:
    """int32 [1 + entries, RECORD]: see the drawing above. Segments without rows or members have none."""
    kept = [
        i
        for i, (start, end, members) in enumerate(zip(segments.starts, segments.ends, segments.members, strict=True))
        if start < end and members
    ]
    starts, ends = (np.array([of[i] for i in kept], dtype=np.int64) for of in (segments.starts, segments.ends))
    members = [segments.members[i] for i in kept]
    tiles_of = -(-(ends - starts) // tile_rows)
    tile_segment = np.repeat(np.arange(len(kept)), tiles_of)
    nth = np.arange(len(tile_segment)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)  # within its segment
    tile_starts = starts[tile_segment] + nth * tile_rows
    tile_rows_used = np.minimum(ends[tile_segment] - tile_starts, tile_rows)
    others_of = np.array([len(m) - 1 for m in members], dtype=np.int64)[tile_segment]

    num_tiles = len(tile_segment)
    entry_tile = np.concatenate([np.arange(num_tiles), np.repeat(np.arange(num_tiles), others_of)])
    entry_rows = tile_rows_used[entry_tile]
    records = np.zeros((1 + len(entry_tile), RECORD), dtype=np.int32)
    records[0, :2] = num_tiles, len(entry_tile)
    entries = records[1:]
    entries[:, START] = tile_starts[entry_tile]
    entries[:, ROWS] = entry_rows
    entries[:, V_ROW] = np.cumsum(entry_rows) - entry_rows
    slots, weights = _members_in_order(members, tile_segment)
    entries[:, SLOT] = slots
    entries[:, WEIGHT] = weights.view(np.int32)
    last = 1 + num_tiles + np.cumsum(others_of)
    entries[:num_tiles, OTHERS] = last - others_of
    entries[:num_tiles, OTHERS_END] = last
    return records


def _members_in_order(
    members: Sequence[tuple[tuple[int, float], ...]], tile_segment: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Slots and weights of all entries: each tile's first member, then each tile's others."""
    first = [m[0] for m in members]
    slots = np.array([slot for slot, _ in first], dtype=np.int64)[tile_segment]
    weights = np.array([weight for _, weight in first], dtype=np.float32)[tile_segment]
    if any(len(m) > 1 for m in members):
        others = list(chain.from_iterable(members[segment][1:] for segment in tile_segment.tolist()))
        slots = np.concatenate([slots, [slot for slot, _ in others]])
        weights = np.concatenate([weights, np.array([weight for _, weight in others], dtype=np.float32)])
    return slots, weights
