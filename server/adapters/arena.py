"""The device arena: one allocation for all adapter images, the slot table, and the thread that fills them."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.errors import AdapterCorrupt, AdapterMismatch, AdapterUnavailable
from adapters_store.host import HostCache, read_image
from adapters_store.image import TENSOR_ALIGNMENT, ImageHeader, ImageSite, read_header
from adapters_store.manifest import BaseManifest
from adapters_store.ref import AdapterRef
from kernels.memory import lazy_zeros
from kernels.types import A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, TABLE_COLUMNS, SlotWeights
from server.adapters.ahead import TouchAhead
from server.adapters.regions import ALIGNMENT
from server.errors import ConfigError

MAX_LAYOUTS = 4096  # site tables remembered, some 8 KB each: reading one costs a load a millisecond of Python

Rows = npt.NDArray[np.int64]
"""Table rows [site rows, 5]: A offset, B offset, bias offset, rank, stride (kernels/types.py)"""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where an image's tensors are, in elements from the image's start. Made by the loader thread."""

    image_key: str
    rows: Rows

    def at(self, element: int) -> Rows:
        """The table rows of the image when it starts at `element` of the arena."""
        rows = self.rows.copy()
        has_rank = rows[:, RANK] > 0
        rows[has_rank, A_OFFSET] += element
        rows[has_rank, B_OFFSET] += element
        rows[rows[:, BIAS_OFFSET] >= 0, BIAS_OFFSET] += element
        return rows


class AdapterArena:
    """The SlotDevice on CPU. `weights` is what the kernels read; its tensors never change address.

        arena:  | image of slot 2 | image of slot 1 |      free      | image of slot 3 |
        table:  slot 1: site 0 -> (A, B, bias, rank, stride), site 1 -> ... all relative to the arena

    The memory is reserved at once and touched a little ahead of the images that come. With `host` an image is read
    into the host tier and copied; without (a host budget of 0) it is read straight into its region, so
    that it is in memory once. Either way its checksum was verified in memory before it is committed.

    Threads: `load`'s work runs on the loader thread and touches only its own region, which the slots keep
    free of anything else until the load is done. All else runs on the engine thread, between steps, which
    on CPU are synchronous. (On CUDA, `move` and `clear` have to go to the step's stream and the loader's
    copies wait for an event recorded there.)
    """

    def __init__(
        self,
        manifest: BaseManifest,
        *,
        arena_bytes: int,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        host: HostCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ConfigError(f"adapters are served on the CPU only for now, not on {device}")
        self._manifest = manifest
        self._site_rows = manifest.site_rows
        self._host = host
        self._clock = clock
        self._bytes = _aligned_zeros(arena_bytes)
        self._item_bytes = dtype.itemsize
        self.weights = SlotWeights(
            arena=torch.from_numpy(self._bytes).view(dtype),  # [elements]
            table=torch.from_numpy(np.tile(_absent(len(manifest.sites)), (max_slots, 1, 1))),
        )
        self._layouts: dict[int, _Layout] = {}  # by slot
        self._known: OrderedDict[AdapterRef, _Layout] = OrderedDict()  # the loader thread's, of images read before
        self._phases: dict[str, dict[str, float]] = {}  # by image key
        self._loader = LoaderThread("adapter-loader")
        self._ahead = TouchAhead(self._bytes)

    def load(self, ref: AdapterRef, slot: int, offset_bytes: int) -> Future[None]:
        """Read the image into its region on the loader thread.

        The future's error is AdapterUnavailable (the file can't be read), AdapterCorrupt (it is not what
        was compiled) or AdapterMismatch (it was compiled for another base).
        """
        asked = self._clock()
        return self._loader.submit(lambda: self._load(ref, slot, offset_bytes, asked))

    def warm(self, ref: AdapterRef) -> Future[None]:
        """Bring the image to the host tier, which there must be, on the loader thread; errors as in `load`."""
        host = self._host
        assert host is not None, "there is no host tier"

        def read() -> None:
            host.get(ref)

        return self._loader.submit(read)

    def commit(self, ref: AdapterRef, slot: int, offset_bytes: int) -> None:
        self._write_rows(slot, self._layouts[slot].at(offset_bytes // self._item_bytes))

    def clear(self, slot: int) -> None:
        layout = self._layouts.pop(slot, None)
        if layout is not None:
            self._phases.pop(layout.image_key, None)
        self._write_rows(slot, _absent(len(self._manifest.sites)))

    def move(self, ref: AdapterRef, slot: int, old_offset: int, new_offset: int, nbytes: int) -> None:
        base = self._bytes.ctypes.data
        ctypes.memmove(base + new_offset, base + old_offset, nbytes)  # the ranges may overlap
        self.commit(ref, slot, new_offset)

    def phases(self, image_key: str) -> dict[str, float]:
        """Seconds by phase of the load of a resident image: queue, header, host, device. Else {}."""
        return dict(self._phases.get(image_key, {}))

    def check_table(self, residents: Iterable[tuple[int, AdapterRef, int]]) -> None:
        """Assert that the table has exactly the images of `residents` (AdapterSlots.residents())."""
        table = self.weights.table.numpy()
        expected = np.tile(_absent(table.shape[1]), (table.shape[0], 1, 1))
        for slot, ref, offset in residents:
            assert self._layouts[slot].image_key == ref.image_key, f"slot {slot} has another image's layout"
            expected[slot] = self._layouts[slot].at(offset // self._item_bytes)
        wrong = np.flatnonzero((table != expected).any(axis=(1, 2)))
        assert not len(wrong), f"table rows of slots {wrong.tolist()} differ from what was committed"

    def close(self) -> None:
        """Stop the loader after the load it is in; loads behind it are cancelled."""
        self._loader.close()
        self._ahead.close()

    def _write_rows(self, slot: int, rows: Rows) -> None:
        self.weights.table[slot].copy_(torch.from_numpy(rows))
        self.weights.version += 1

    # --- on the loader thread ----------------------------------------------------------------------------

    def _load(self, ref: AdapterRef, slot: int, offset: int, asked: float) -> None:
        started = self._clock()
        layout = self._layout_of(ref)
        region = self._bytes[offset : offset + ref.data_bytes]
        headed = self._clock()
        if self._host is None:
            read_image(ref, region)
            hosted = self._clock()
        else:
            buffer = self._host.get(ref)
            hosted = self._clock()
            region[:] = np.frombuffer(buffer, dtype=np.uint8)
        self._layouts[slot] = layout
        self._phases[ref.image_key] = {
            "queue": started - asked,
            "header": headed - started,
            "host": hosted - headed,
            "device": self._clock() - hosted,
        }
        self._ahead.use(offset + ref.data_bytes)

    def _layout_of(self, ref: AdapterRef) -> _Layout:
        """The image's site table as table rows, every tensor checked to lie inside the image."""
        layout = self._known.pop(ref, None) or self._read_layout(ref)
        self._known[ref] = layout
        if len(self._known) > MAX_LAYOUTS:
            self._known.popitem(last=False)
        return layout

    def _read_layout(self, ref: AdapterRef) -> _Layout:
        try:
            header = read_header(Path(ref.image_path))
        except OSError as error:
            reason = error.strerror or str(error)
            raise AdapterUnavailable(f"the image of adapter {ref.name} can't be read: {reason}") from error
        self._check_header(ref, header)
        rows = _absent(len(self._manifest.sites))
        for image_site in header.sites:
            row = self._site_rows.get(image_site.site)
            if row is None:
                raise AdapterMismatch(f"the base has no {image_site.site}, for which adapter {ref.name} has a delta")
            rows[row] = self._row_of(image_site)
        self._check_shapes(ref, header)
        return _Layout(ref.image_key, rows)

    def _check_header(self, ref: AdapterRef, header: ImageHeader) -> None:
        """The file must be the image that the ref names, made for this base."""
        table = header.table
        if (table.base_digest, table.dtype) != (self._manifest.digest, self._manifest.dtype):
            raise AdapterMismatch(
                f"the image of adapter {ref.name} was compiled for the base {table.base_digest[:12]} in "
                f"{table.dtype}; this one is {self._manifest.digest[:12]} in {self._manifest.dtype}"
            )
        found = (table.image_key, table.checksum, header.data_offset, header.data_bytes)
        if found != (ref.image_key, ref.checksum, ref.data_offset, ref.data_bytes):
            raise AdapterCorrupt(f"{Path(ref.image_path).name} is not the image of adapter {ref.name}")

    def _check_shapes(self, ref: AdapterRef, header: ImageHeader) -> None:
        """Each tensor fills its place, by the base's K and N: else a kernel would read its neighbour's bytes."""
        extents = sorted(extent for image_site in header.sites for extent in self._extents(image_site))
        starts = [start for start, _, _ in extents] + [ref.data_bytes]
        for (start, end, name), following in zip(extents, starts[1:], strict=True):
            if start < 0 or not 0 <= following - end < TENSOR_ALIGNMENT:
                raise AdapterMismatch(
                    f"{name} of the image of adapter {ref.name} has {following - start} bytes, "
                    f"{end - start} by the base's shapes"
                )

    def _extents(self, image_site: ImageSite) -> Iterator[tuple[int, int, str]]:
        """(first byte, end, name) of each tensor of a site, as the base's shapes have it."""
        site = self._manifest.sites[self._site_rows[image_site.site]]
        columns = image_site.stride if image_site.rank else 0
        for part, start, elements in (
            ("A", image_site.a_offset, columns * site.in_features),
            ("B", image_site.b_offset, columns * site.out_features),
            ("bias", image_site.bias_offset, site.out_features),
        ):
            if start != -1 or (part != "bias" and columns):
                yield start, start + elements * self._item_bytes, f"{image_site.site}.{part}"

    def _row_of(self, image_site: ImageSite) -> tuple[int, int, int, int, int]:
        """A table row, offsets in elements from the image's start."""
        a, b, bias = (
            offset // self._item_bytes for offset in (image_site.a_offset, image_site.b_offset, image_site.bias_offset)
        )
        if image_site.rank == 0:
            return 0, 0, bias, 0, 0
        return a, b, bias, image_site.rank, image_site.stride


class LoaderThread:
    """One daemon thread that does one thing after the other: a read that hangs never holds up the exit."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._is_closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._work.put((future, work))
        return future

    def close(self) -> None:
        self._is_closed = True
        self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if self._is_closed:
                future.cancel()
                continue
            try:
                work()
            except BaseException as error:  # the thread's boundary: whoever waits for the future is told
                future.set_exception(error)
            else:
                future.set_result(None)
            del item, future, work  # nothing of the last load is kept while waiting for the next


def _absent(num_rows: int) -> Rows:
    """Table rows of a slot without any site: rank 0 and no bias."""
    rows = np.zeros((num_rows, TABLE_COLUMNS), dtype=np.int64)
    rows[:, BIAS_OFFSET] = -1
    return rows


def _aligned_zeros(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes at an address that is a multiple of ALIGNMENT; pages come as they are touched."""
    memory: npt.NDArray[np.uint8] = lazy_zeros(nbytes // ALIGNMENT * ALIGNMENT + ALIGNMENT).numpy()
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes // ALIGNMENT * ALIGNMENT]
