"""A SlotDevice that really holds bytes, and refuses what would corrupt a step in flight."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from adapters_store.ref import AdapterRef
from server.adapters.regions import region_bytes

PAGE = 4096


def make_ref(key: str, data_bytes: int, name: str = "") -> AdapterRef:
    return AdapterRef(
        name=name or key,
        version="v",
        digest=key,
        image_key=key,
        image_path=f"{key}.img",
        data_offset=4096,
        data_bytes=data_bytes,
        checksum="",
        max_rank=8,
    )


def image_bytes(ref: AdapterRef) -> bytes:
    return random.Random(ref.image_key).randbytes(ref.data_bytes)


@dataclass
class PendingLoad:
    ref: AdapterRef
    slot: int
    offset: int
    future: Future[None]

    @property
    def end(self) -> int:
        return self.offset + region_bytes(self.ref.data_bytes)


@dataclass
class ByteDevice:
    """`in_use` is the test's own count of refs per slot; loads finish only when the test says so."""

    arena: bytearray
    table: dict[int, tuple[AdapterRef, int]] = field(default_factory=dict)  # slot -> (ref, offset)
    pending: list[PendingLoad] = field(default_factory=list)
    landed: list[PendingLoad] = field(default_factory=list)  # done, not yet committed or cleared
    in_use: Counter[int] = field(default_factory=Counter)
    commits: list[str] = field(default_factory=list)
    clears: list[str] = field(default_factory=list)
    moves: int = 0

    def load(self, ref: AdapterRef, slot: int, offset: int) -> Future[None]:
        load = PendingLoad(ref, slot, offset, Future())
        self._assert_free(load.offset, load.end)
        assert slot not in self.table and all(slot != other.slot for other in self.pending + self.landed)
        self.pending.append(load)
        self._write(offset, b"\xff" * ref.data_bytes)  # a reader may have written anything by now
        return load.future

    def finish(self, index: int, error: Exception | None = None) -> None:
        load = self.pending.pop(index)
        self.landed.append(load)
        if error is not None:
            load.future.set_exception(error)
            return
        self._write(load.offset, image_bytes(load.ref))
        load.future.set_result(None)

    def commit(self, ref: AdapterRef, slot: int, offset: int) -> None:
        assert slot not in self.table and slot > 0
        assert self._take_landed(slot).offset == offset
        self.table[slot] = (ref, offset)
        self.commits.append(ref.image_key)

    def clear(self, slot: int) -> None:
        assert not self.in_use[slot], f"slot {slot} is cleared while a step may read it"
        assert all(slot != load.slot for load in self.pending), "cleared while the loader writes to its region"
        if slot in self.table:
            ref, offset = self.table.pop(slot)
            self.clears.append(ref.image_key)
            self._write(offset, b"\xee" * ref.data_bytes)  # NaN-like: nobody may read it again
        else:
            self._take_landed(slot)

    def move(self, ref: AdapterRef, slot: int, old_offset: int, new_offset: int, nbytes: int) -> None:
        assert not self.in_use[slot], f"slot {slot} is moved while a step may read it"
        held, offset = self.table.pop(slot)
        assert held.image_key == ref.image_key and offset == old_offset and nbytes == ref.data_bytes
        self._assert_free(new_offset, new_offset + region_bytes(nbytes))
        content = bytes(self.arena[old_offset : old_offset + nbytes])
        self._write(old_offset, b"\xdd" * nbytes)
        self._write(new_offset, content)
        self.table[slot] = (ref, new_offset)
        self.moves += 1

    def check_table(self, residents: Iterable[tuple[int, AdapterRef, int]]) -> None:
        assert self.table == {slot: (ref, offset) for slot, ref, offset in residents}

    def check_bytes(self) -> None:
        """Every committed region holds exactly its image's bytes."""
        for slot, (ref, offset) in self.table.items():
            held = self.arena[offset : offset + ref.data_bytes]
            assert held == image_bytes(ref), f"slot {slot} ({ref.image_key}) is corrupted"

    def _assert_free(self, low: int, high: int) -> None:
        assert low >= 0 and high <= len(self.arena) and low % PAGE == 0
        taken = [(offset, offset + region_bytes(ref.data_bytes)) for ref, offset in self.table.values()]
        taken += [(load.offset, load.end) for load in self.pending + self.landed]
        for start, end in taken:
            assert high <= start or end <= low, f"[{low}, {high}) overlaps [{start}, {end})"

    def _take_landed(self, slot: int) -> PendingLoad:
        load = next(load for load in self.landed if load.slot == slot)
        self.landed.remove(load)
        return load

    def _write(self, offset: int, content: bytes) -> None:
        self.arena[offset : offset + len(content)] = content
