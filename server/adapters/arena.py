"""The device arena: one allocation for all adapter images, the slot table, and the thread that fills them."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adapters_store.errors import AdapterCorrupt, AdapterMismatch, AdapterUnavailable
from adapters_store.host import HostCache
from adapters_store.image import TENSOR_ALIGNMENT, ImageHeader, ImageSite, read_header
from adapters_store.manifest import BaseManifest
from adapters_store.ref import AdapterRef
from kernels.types import A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK
from server.adapters.memory import ArenaMemory, DeviceMemory, HostMemory, Rows, absent_rows
from server.adapters.streams import CudaStreams, Event, Streams

MAX_LAYOUTS = 4096  # site tables remembered, some 8 KB each: reading one costs a load a millisecond of Python


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
    """The SlotDevice. `weights` is what the kernels read; its tensors never change address.

        arena:  | image of slot 2 | image of slot 1 |      free      | image of slot 3 |
        table:  slot 1: site 0 -> (A, B, bias, rank, stride), site 1 -> ... all relative to the arena

    With `host` an image is read into the host tier and copied; without (a host budget of 0) it is read straight
    into its region, so that it is in memory once. Either way its checksum was verified in memory before it is
    committed.

    Threads: `load`'s work runs on the loader thread and touches only its own region, which the slots keep
    free of anything else until the load is done. All else runs on the engine thread, between the dispatch of
    one step and that of the next. On the CPU steps are synchronous; on a device, `memory` says what waits for what.
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
        streams: Streams | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`streams`: the device's; for the CPU None, unless a test stands in for a device there."""
        self._manifest = manifest
        self._site_rows = manifest.site_rows
        self._host = host
        self._clock = clock
        self._item_bytes = dtype.itemsize
        device = torch.device(device)
        if streams is None and device.type != "cpu":
            streams = CudaStreams(device)
        table = np.tile(absent_rows(len(manifest.sites)), (max_slots, 1, 1))
        self._memory: ArenaMemory = (
            HostMemory(arena_bytes, table, dtype)
            if streams is None
            else DeviceMemory(arena_bytes, table, dtype, device, streams)
        )
        self.weights = self._memory.weights
        self._layouts: dict[int, _Layout] = {}  # by slot
        self._known: OrderedDict[AdapterRef, _Layout] = OrderedDict()  # the loader thread's, of images read before
        self._phases: dict[str, dict[str, float]] = {}  # by image key
        self._loader = LoaderThread("adapter-loader")

    def load(self, ref: AdapterRef, slot: int, offset_bytes: int) -> Future[None]:
        """Read the image into its region on the loader thread.

        The future's error is AdapterUnavailable (the file can't be read), AdapterCorrupt (it is not what
        was compiled) or AdapterMismatch (it was compiled for another base).
        """
        asked = self._clock()
        fence = self._memory.fence()
        return self._loader.submit(lambda: self._load(ref, slot, offset_bytes, asked, fence))

    def warm(self, ref: AdapterRef) -> Future[None]:
        """Bring the image to the host tier, which there must be, on the loader thread; errors as in `load`."""
        host = self._host
        assert host is not None, "there is no host tier"

        def read() -> None:
            host.get(ref)

        return self._loader.submit(read)

    def commit(self, ref: AdapterRef, slot: int, offset_bytes: int) -> None:
        self._memory.write_rows(slot, self._layouts[slot].at(offset_bytes // self._item_bytes))

    def clear(self, slot: int) -> None:
        layout = self._layouts.pop(slot, None)
        if layout is not None:
            self._phases.pop(layout.image_key, None)
        self._memory.write_rows(slot, absent_rows(len(self._manifest.sites)))

    def move(self, ref: AdapterRef, slot: int, old_offset: int, new_offset: int, nbytes: int) -> None:
        self._memory.move(old_offset, new_offset, nbytes)
        self.commit(ref, slot, new_offset)

    def phases(self, image_key: str) -> dict[str, float]:
        """Seconds by phase of the load of a resident image: queue, header, host, device. Else {}."""
        return dict(self._phases.get(image_key, {}))

    def check_table(self, residents: Iterable[tuple[int, AdapterRef, int]]) -> None:
        """Assert that the table has exactly the images of `residents` (AdapterSlots.residents())."""
        table = self.weights.table.cpu().numpy()
        expected = np.tile(absent_rows(table.shape[1]), (table.shape[0], 1, 1))
        for slot, ref, offset in residents:
            assert self._layouts[slot].image_key == ref.image_key, f"slot {slot} has another image's layout"
            expected[slot] = self._layouts[slot].at(offset // self._item_bytes)
        wrong = np.flatnonzero((table != expected).any(axis=(1, 2)))
        assert not len(wrong), f"table rows of slots {wrong.tolist()} differ from what was committed"

    def close(self) -> None:
        """Stop the loader after the load it is in; loads behind it are cancelled."""
        self._loader.close()
        self._memory.close()

    # --- on the loader thread ----------------------------------------------------------------------------

    def _load(self, ref: AdapterRef, slot: int, offset: int, asked: float, fence: Event | None) -> None:
        started = self._clock()
        layout = self._layout_of(ref)
        headed = self._clock()
        if self._host is None:
            self._memory.read(ref, offset, fence)
            hosted = self._clock()
        else:
            image = self._host.get(ref)
            hosted = self._clock()
            self._memory.write(image, offset, fence)
        self._layouts[slot] = layout
        self._phases[ref.image_key] = {
            "queue": started - asked,
            "header": headed - started,
            "host": hosted - headed,
            "device": self._clock() - hosted,
        }

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
        rows = absent_rows(len(self._manifest.sites))
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
