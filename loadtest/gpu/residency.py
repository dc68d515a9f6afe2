"""Adapters that come and go in an arena while steps run: pinned images, a side stream, events, a slot table.

The least that a server does, so that kernels and graphs can be tried under it; the server's own arena has its own
tests. A slot is read only once its copy has happened, and refilled only when nobody holds it and the last step that
read it is over. Freed memory is NaN until the next image lies there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from kernels.types import A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, SlotWeights
from loadtest.gpu.adapters import ALIGNMENT_BYTES, Adapters
from loadtest.gpu.machine import Machine


@dataclass
class Image:
    """An adapter on the host, and its table rows when it lies at the arena's beginning."""

    content: torch.Tensor  # [elements], pinned
    rows: torch.Tensor  # int64 [site rows, 5], on the device


@dataclass
class _Slot:
    name: int | None = None
    refs: int = 0
    is_ready: bool = False
    copied: torch.cuda.Event | None = None
    last_used: torch.cuda.Event | None = None
    used_at: int = 0  # for LRU


class Residency:
    """Images in slots of one size, numbered from 1. `holds_refs` False breaks it: a slot in use can be refilled."""

    def __init__(self, machine: Machine, images: Sequence[Image], num_slots: int, holds_refs: bool = True) -> None:
        self._machine, self._images, self._holds_refs = machine, images, holds_refs
        most = max(len(image.content) for image in images)
        self._size = -(-most // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # elements: kernels take aligned tensors for granted
        dtype, rows = images[0].content.dtype, images[0].rows
        arena = torch.full((num_slots * self._size,), torch.nan, dtype=dtype, device=machine.device)
        self._absent = torch.zeros_like(rows)
        self._absent[:, BIAS_OFFSET] = -1
        table = self._absent.repeat(num_slots + 1, 1, 1)
        self.weights = SlotWeights(arena, table)
        self._slots = {number: _Slot() for number in range(1, num_slots + 1)}
        self._side = torch.cuda.Stream(machine.device) if machine.is_cuda else None
        self._clock = 0
        self.num_loads = self.num_evictions = 0

    def poll(self) -> None:
        """Take into the table what has been copied. Between steps."""
        for number, slot in self._slots.items():
            if slot.name is not None and not slot.is_ready and (slot.copied is None or slot.copied.query()):
                if slot.copied is not None:
                    torch.cuda.current_stream().wait_event(slot.copied)
                self._write_rows(number, self._rows_at(slot.name, number))
                slot.is_ready = True

    def acquire(self, name: int) -> int | None:
        """The slot of an image, held until `release`; None while it has to be copied or nothing is free."""
        self._clock += 1
        for number, slot in self._slots.items():
            if slot.name == name:
                if not slot.is_ready:
                    return None
                slot.refs, slot.used_at = slot.refs + 1, self._clock
                return number
        free = [slot for slot in self._slots.items() if self._can_refill(slot[1])]
        if free:
            self._load(name, *min(free, key=lambda item: item[1].used_at))
        return None

    def release(self, number: int) -> None:
        """After the results of the holder's last step were collected."""
        self._slots[number].refs -= 1

    def used(self, numbers: Iterable[int], event: torch.cuda.Event | None) -> None:
        """These were read by the step that ends with this event."""
        for number in numbers:
            self._slots[number].last_used = event

    def _can_refill(self, slot: _Slot) -> bool:
        return (slot.is_ready or slot.name is None) and (slot.refs == 0 or not self._holds_refs)

    def _load(self, name: int, number: int, slot: _Slot) -> None:
        self.num_evictions += slot.name is not None
        self.num_loads += 1
        self._write_rows(number, self._absent)
        slot.name, slot.is_ready, slot.used_at = name, False, self._clock
        content = self._images[name].content
        region = self.weights.arena[(number - 1) * self._size : number * self._size]
        with torch.cuda.stream(self._side) if self._side else contextlib.nullcontext():
            if self._side and slot.last_used is not None:
                self._side.wait_event(slot.last_used)
            region.fill_(torch.nan)
            region[: len(content)].copy_(content, non_blocking=True)
            if self._side:
                slot.copied = torch.cuda.Event()
                slot.copied.record(self._side)

    def _write_rows(self, number: int, rows: torch.Tensor) -> None:
        self.weights.table[number].copy_(rows)
        self.weights.version += 1

    def _rows_at(self, name: int, number: int) -> torch.Tensor:
        rows, start = self._images[name].rows.clone(), (number - 1) * self._size
        has_rank = (rows[:, RANK] > 0).long()
        rows[:, A_OFFSET] += start * has_rank
        rows[:, B_OFFSET] += start * has_rank
        rows[:, BIAS_OFFSET] += start * (rows[:, BIAS_OFFSET] >= 0)
        return rows


def image_of(adapters: Adapters, slot: int, is_pinned: bool) -> Image:
    """The image of an arena with this one adapter in it."""
    content = adapters.weights.arena.cpu()
    return Image(content.pin_memory() if is_pinned else content, adapters.weights.table[slot].clone())
