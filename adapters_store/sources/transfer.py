"""Bringing the files of one adapter into a folder: ranged parts in parallel, retried, checked, bounded."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapters_store.disk_threads import in_raw_thread
from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources.folder import READ_FILES, TEMPLATE_FILES
from adapters_store.sources.hashing import FileHashes
from adapters_store.sources.retry import Passing, Retry

CHUNK_BYTES = 256 << 10
"""What a reader hands to Part.write at a time, about. Small, since the floor on speed counts what was written."""
FILE_TRIES = 2
"""A file whose checksum differs is brought so often before it is called corrupt."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a store says of a file's content."""

    algorithm: str
    """a name that hashlib knows, or "git": sha1 over "blob SIZE\\0" and the content"""
    hexdigest: str
    is_guess: bool = False
    """an S3 ETag is the MD5 of an object only where that isn't encrypted with a key of its own: what differs counts
    only when another file of the same adapter has the checksum guessed for it"""

    def fits(self, path: Path) -> bool:
        """Whether the file has this checksum. Blocking."""
        size = path.stat().st_size
        name = "sha1" if self.algorithm == "git" else self.algorithm
        digest = hashlib.new(name, b"blob %d\0" % size if self.algorithm == "git" else b"", usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest() == self.hexdigest


@dataclass(slots=True)
class Part:
    """The bytes [position, stop) of a file that are still to come, and where they go."""

    file: FileVersion
    position: int
    stop: int
    descriptor: int
    is_whole_file: bool
    told: dict[str, Checksum]
    """by file name: checksums of whole files that came with an answer; the reader adds to it"""
    note_bytes: Callable[[int, int], None]
    """told of each piece that was written: where it starts and where it stops"""

    async def write(self, data: Any) -> None:
        """The next bytes (any buffer). Passing when there are more than were asked for: none of those is written."""
        view = memoryview(data)
        if self.position + len(view) > self.stop:
            raise Passing(f"{self.file.name}: more bytes came than were asked for")
        # in a thread, since a disk may stall; waited for even when cancelled, since the descriptor is closed after
        writing = in_raw_thread(_write_all, self.descriptor, view, self.position)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            while not writing.done():  # however often it is cancelled
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([writing])
            raise
        start, self.position = self.position, self.position + len(view)
        self.note_bytes(start, self.position)


class RangesIgnored(Exception):
    """The store answers a range with the whole file."""


Read = Callable[[Part], Awaitable[None]]
"""One try: asks for a part's bytes, on the condition that the file is the noted one, and writes them to it.

Raises Passing, FileChanged, AdapterDenied, AdapterUnavailable, RangesIgnored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How files are brought here."""

    retry: Retry
    part_bytes: int
    parts_in_flight: int
    min_bytes_per_s: int
    grace_s: float
    min_part_bytes: int = 2 << 20

    async def fetch(
        self,
        version: SourceVersion,
        folder: Path,
        limits: Limits,
        read: Read,
        checksums: Callable[[FileVersion], Checksum | None],
    ) -> dict[str, str]:
        """Bring what the server reads of `version` into `folder`; RemoteSource.fetch says what it gives and raises.

        `checksums`: what the noted version of a file says of its content.
        """
        files = [file for file in version.files if file.name in (*READ_FILES, *TEMPLATE_FILES)]
        limits.check_files(files)
        total = sum(file.size for file in files)
        floor = _Floor(self.min_bytes_per_s, self.grace_s)
        job = _Job(self, version, folder, read, checksums, floor, asyncio.Semaphore(self.parts_in_flight))
        try:
            async with floor.deadline:
                return await job.bring(files)
        except TimeoutError:
            raise AdapterUnavailable(
                f"{version.name} of {version.source} comes too slowly: {floor.num_bytes} of {total} bytes "
                f"in {floor.allowed_s:.0f} s; the floor is {self.min_bytes_per_s} bytes a second "
                f"after {self.grace_s:.0f} s"
            ) from None


class _Floor:
    """The time that a fetch has: what the bytes that came so far may take, and the grace."""

    def __init__(self, min_bytes_per_s: int, grace_s: float) -> None:
        self.num_bytes = 0
        self.allowed_s = self._grace_s = grace_s
        self._min_bytes_per_s = min_bytes_per_s
        self._started = asyncio.get_running_loop().time()
        self.deadline = asyncio.timeout_at(self._started + grace_s)

    def note_bytes(self, count: int) -> None:
        """So many more have come."""
        self.num_bytes += count
        if not self.deadline.expired():  # else what is under way is being cancelled
            self.allowed_s = self._grace_s + self.num_bytes / self._min_bytes_per_s
            self.deadline.reschedule(self._started + self.allowed_s)


@dataclass(slots=True)
class _Job:
    """One fetch under way."""

    transfer: Transfer
    version: SourceVersion
    folder: Path
    read: Read
    checksums: Callable[[FileVersion], Checksum | None]
    floor: _Floor
    free: asyncio.Semaphore
    told: dict[str, Checksum] = field(default_factory=dict)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)  # of each file that is here, by algorithm

    async def bring(self, files: list[FileVersion]) -> dict[str, str]:
        """All files, whole and checked; the sha256 of each by name."""
        pending = files
        for _ in range(FILE_TRIES):
            await all_of(self._bring_file(file) for file in pending)
            pending = await in_raw_thread(self._differing, files)
            if not pending:
                return {file.name: self.digests[file.name]["sha256"] for file in files}
        raise AdapterCorrupt(
            f"{pending[0].name} of {self.version.name} from {self.version.source} differs from the checksum that "
            f"the store gives, {FILE_TRIES} times in a row"
        )

    def _differing(self, files: list[FileVersion]) -> list[FileVersion]:
        """The files whose content is not what the store says of it. Blocking."""
        fits: dict[FileVersion, bool] = {}
        guessed: dict[FileVersion, bool] = {}
        for file in files:
            checksum = self.told.get(file.name) or self.checksums(file)
            if checksum is not None:
                found = self.digests[file.name].get(checksum.algorithm)
                is_right = checksum.fits(self.folder / file.name) if found is None else found == checksum.hexdigest
                (guessed if checksum.is_guess else fits)[file] = is_right
        if any(guessed.values()):
            fits |= guessed
        return [file for file, is_right in fits.items() if not is_right]

    async def _bring_file(self, file: FileVersion) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with ExitStack() as opened:
            descriptor = os.open(self.folder / file.name, flags, 0o600)
            opened.callback(os.close, descriptor)
            size, step = file.size, self._part_bytes(file.size)
            ends = [(start, min(start + step, size)) for start in range(0, size, step)]
            try:
                await self._bring_parts(file, ends, descriptor)
            except RangesIgnored:
                await self._bring_parts(file, [(0, size)], descriptor)

    def _part_bytes(self, file_bytes: int) -> int:
        """Of a file of several parts so small that most of it is hashed while the last ones come."""
        if file_bytes <= self.transfer.part_bytes:
            return self.transfer.part_bytes
        share = -(-file_bytes // (2 * self.transfer.parts_in_flight))
        return min(self.transfer.part_bytes, max(share, self.transfer.min_part_bytes))

    async def _bring_parts(self, file: FileVersion, ends: list[tuple[int, int]], descriptor: int) -> None:
        noted = self.checksums(file)
        expected = {noted.algorithm} & hashlib.algorithms_available if noted is not None else set()
        hashes = FileHashes(descriptor, sorted(expected | {"sha256"}))

        def note(start: int, stop: int) -> None:
            self.floor.note_bytes(stop - start)
            hashes.note(start, stop)

        try:
            await all_of(self._bring_part(file, start, stop, descriptor, note) for start, stop in ends)
            self.digests[file.name] = await hashes.finish()
        finally:
            await hashes.stop()

    async def _bring_part(
        self, file: FileVersion, start: int, stop: int, descriptor: int, note: Callable[[int, int], None]
    ) -> None:
        part = Part(file, start, stop, descriptor, (start, stop) == (0, file.size), self.told, note)
        async with self.free:
            what = f"{file.name} of {self.version.name} from {self.version.source}"
            await self.transfer.retry.run(what, partial(self._attempt, part), progress=lambda: part.position)

    async def _attempt(self, part: Part) -> None:
        await self.read(part)
        if part.position != part.stop:
            raise Passing("the answer was cut short")


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; at the first failure, or cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
