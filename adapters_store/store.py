"""The adapter store of the API process: from a SourceVersion to an image on disk, once per version."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.catalog import Catalog, Listings
from adapters_store.compile.job import CompileJob
from adapters_store.compile.lower import COMPILER_VERSION
from adapters_store.disk import DiskImages
from adapters_store.errors import AdapterError, AdapterNotFound, AdapterUnavailable, RawDamaged, reason_of
from adapters_store.flights import Flights, turn
from adapters_store.histogram import Counts, PhaseTimes
from adapters_store.inspect import AdapterReport, InspectJob
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest, write_manifest
from adapters_store.misses import Misses
from adapters_store.ref import AdapterRef, SourceVersion
from adapters_store.remote_tier import Fetched, RemoteTier
from adapters_store.sources.folder import FileChanged
from adapters_store.sweep import MANIFEST_SUFFIX, scope_of, sweep_other_compilers
from adapters_store.versions import Held, find_version
from adapters_store.worker import CompileWorker

MAX_REMEMBERED_PHASES = 4096
FETCH_ATTEMPTS = 5
FETCH_BACKOFF_S = 0.05
INSPECT_TURN_S = 10.0  # that an inspection waits for the one before it


@dataclass(frozen=True, slots=True)
class RawTier:
    """The tier of files as fetched, in numbers, for metrics; counters are since start."""

    num_entries: int = 0
    num_bytes: int = 0
    evictions: int = 0
    hits: int = 0  # uses that found the files
    fetches: int = 0
    fetched_bytes: int = 0
    stale_uses: int = 0  # names served by what their source said before it could not be asked
    seconds: Mapping[str, Counts] = field(default_factory=dict)  # by phase: resolve, queue, fetch
    num_leases: int = 0
    num_under_way: int = 0  # versions that are being fetched


@dataclass(frozen=True, slots=True)
class StoreTier:
    """The disk tier in numbers, for metrics; counters are since start."""

    num_images: int = 0
    num_bytes: int = 0
    evictions: int = 0
    compiles: int = 0
    seconds: Mapping[str, Counts] = field(default_factory=dict)  # by phase: queue, fetch, compile
    hits: int = 0  # lookups that found the image
    raw: RawTier = field(default_factory=RawTier)
    num_leases: int = 0
    num_under_way: int = 0  # versions that are being brought here


class AdapterStore:
    """Owner of the disk tier and of the compiler process. Lives on one event loop.

    A name is resolved to a SourceVersion, `ensure` brings that to an image on disk, and a lease keeps the
    image there until the request's terminal event. The engine reads the image by the AdapterRef alone.
    """

    def __init__(
        self,
        cache_dir: Path,
        manifest: BaseManifest,
        catalog: Catalog,
        *,
        limits: Limits | None = None,
        quota_bytes: int | None = None,
        compile_timeout_s: float = 300.0,
        eviction_grace_s: float = 60.0,
    ) -> None:
        self.catalog = catalog
        self._limits = limits or Limits()
        scope = scope_of(manifest.digest, COMPILER_VERSION, manifest.dtype)
        sweep_other_compilers(cache_dir.absolute(), COMPILER_VERSION)
        self.disk = DiskImages(cache_dir, quota_bytes, scope=scope, grace_s=eviction_grace_s)
        manifest_path = cache_dir.absolute() / "index" / f"{scope}{MANIFEST_SUFFIX}"
        write_manifest(manifest, manifest_path)
        self.worker = CompileWorker(manifest_path, timeout_s=compile_timeout_s)
        self._flights: Flights[AdapterRef] = Flights()
        self._failures = Misses(catalog.remote.policy.miss_ttl_s if catalog.remote is not None else 0.0)
        self._inspections = asyncio.Semaphore(1)  # compiles go between two
        self._phases: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._times = PhaseTimes()
        self.compiles = 0
        """images compiled since start"""
        self.hits = 0
        """lookups since start that found the image"""

    async def start(self) -> None:
        """Start the compiler process."""
        await self.worker.start()

    async def resolve(self, name: str) -> SourceVersion:
        """What `name` points to now; AdapterNotFound when no source has it."""
        started = time.perf_counter()
        version = await self.catalog.resolve(name)
        self._record(version.key, "resolve", time.perf_counter() - started)
        return version

    def pinned(self, current: SourceVersion, prefix: str) -> SourceVersion:
        """What `name@prefix` means, of the name that points to `current` now: that, or a former version of the name
        whose image or files are on disk. Raises VersionNotFound, VersionAmbiguous.
        """
        name, remote = current.name, self.catalog.remote
        found = {current.key: current}
        former = [*self.disk.versions_of(name), *(remote.raw.versions_of(name) if remote is not None else ())]
        for key, version in former:
            if version.source == current.source or self.catalog.covers(version):
                found.setdefault(key, version)
        held = [Held(key, version, self.disk.peek(key)) for key, version in found.items()]
        return find_version(name, prefix, held).version

    async def list(self) -> Listings:
        """All adapters of the catalog, by name."""
        return await self.catalog.list()

    def lookup(self, version_key: str) -> AdapterRef | None:
        """The image of a SourceVersion when it is on disk already; takes microseconds."""
        ref = self.disk.find(version_key)
        self.hits += ref is not None
        return ref

    def peek(self, version_key: str) -> AdapterRef | None:
        """The image of a SourceVersion as the index has it, for a listing: nothing is checked, no use is noted."""
        return self.disk.peek(version_key)

    def is_compiling(self, version_key: str) -> bool:
        """Whether an `ensure` of that SourceVersion is under way."""
        return version_key in self._flights

    async def ensure(self, version: SourceVersion) -> AdapterRef:
        """Bring a SourceVersion to an image on disk; whoever asks for the same one meanwhile shares the work.

        Raises AdapterError. A failure is not remembered, the next call tries again; that of a remote adapter is
        for a short time. Cancelling one caller leaves the others waiting, the work is given up when the last
        has left.
        """
        key = version.key
        ref = self.lookup(key)
        if ref is not None:
            return ref
        failure = self._failures.get(key)
        if failure is not None:
            raise failure
        return await self._flights.join(key, lambda: self._bring(version))

    async def inspect(self, version: SourceVersion) -> AdapterReport:
        """What the compiler would say of a SourceVersion; at most fetched for it, and nothing is compiled.

        Raises AdapterError for what is not the adapter's fault; AdapterUnavailable when too many are asked for.
        """
        remote = self.catalog.remote
        async with turn(self._inspections, INSPECT_TURN_S, "too many adapters are being inspected; try again"):
            if remote is None or not remote.covers(version):
                return await self.worker.inspect(InspectJob(version, self._limits))
            try:
                async with remote.files(version) as fetched:
                    return await self.worker.inspect(InspectJob(version, self._limits, str(fetched.folder)))
            except RawDamaged:
                remote.raw.discard(version.key)
                raise
            except FileChanged as error:
                raise AdapterUnavailable(f"adapter {version.name} is being replaced; try again") from error

    def retry(self, version: SourceVersion) -> None:
        """Forget that a version could not be brought: the next `ensure` tries again at once."""
        self._failures.forget(version.key)

    def lease(self, ref: AdapterRef) -> None:
        """Keep an image on disk until `release`; AdapterUnavailable when it has just gone."""
        self.disk.lease(ref.image_key)

    def release(self, ref: AdapterRef) -> None:
        """Give back one lease."""
        self.disk.release(ref.image_key)

    def discard(self, ref: AdapterRef) -> None:
        """Forget an image that the engine found damaged; the next `ensure` compiles it anew."""
        self.disk.discard(ref.image_key)

    def phases(self, version_key: str) -> dict[str, float]:
        """Seconds by phase of bringing that SourceVersion here: resolve, raw_queue, queue, fetch, compile."""
        return dict(self._phases.get(version_key, {}))

    def tier(self) -> StoreTier:
        """What the disk tier holds and has done."""
        disk = self.disk
        seconds = self._times.seconds
        raw = _raw_tier(self.catalog.remote)
        return StoreTier(
            disk.num_images,
            disk.bytes_used,
            disk.evictions,
            self.compiles,
            seconds,
            self.hits,
            raw,
            disk.num_leases,
            len(self._flights),
        )

    async def close(self) -> None:
        """Give up what is under way, end the compiler process, close the remote sources."""
        await self._flights.close()
        if self.catalog.remote is not None:
            await self.catalog.remote.close()
        await self.worker.close()
        self.disk.close()

    async def _bring(self, version: SourceVersion) -> AdapterRef:
        remote = self.catalog.remote
        try:
            if remote is None or not remote.covers(version):
                return await self._compile(version, time.perf_counter())
            return await self._fetch_and_compile(version, remote)
        except OSError as error:
            raise AdapterUnavailable(f"adapter {version.name} can't be kept on disk: {reason_of(error)}") from error

    async def _fetch_and_compile(self, asked: SourceVersion, remote: RemoteTier) -> AdapterRef:
        """Like `_compile`, from the raw tier. What was replaced meanwhile is fetched as it is now."""
        version, is_damaged, started = asked, False, time.perf_counter()
        try:
            for attempt in range(FETCH_ATTEMPTS):
                try:
                    async with remote.files(version) as fetched:
                        return await self._compile(version, started, fetched)
                except RawDamaged:
                    if is_damaged:
                        raise
                    is_damaged = True
                    remote.raw.discard(version.key)
                except (FileChanged, AdapterNotFound):
                    version = await remote.again(version)
                    if (ref := self.lookup(version.key)) is not None:
                        return ref
                    await asyncio.sleep(FETCH_BACKOFF_S * 2**attempt)
            raise AdapterUnavailable(
                f"the files of adapter {asked.name} keep changing while they are fetched; try again"
            )
        except AdapterError as error:
            self._failures.add(asked.key, error)
            remote.doubt(version)
            raise

    async def _compile(self, version: SourceVersion, started: float, fetched: Fetched | None = None) -> AdapterRef:
        folder = None if fetched is None else str(fetched.folder)
        job = CompileJob(version, str(self.disk.images_dir), self._limits, folder)
        result = await self.worker.compile(job)
        self.compiles += result.is_new
        self.disk.adopt(result.ref, result.version)
        before_s = 0.0 if fetched is None else fetched.queue_s + fetched.seconds
        queue_s = max(0.0, time.perf_counter() - started - before_s - result.fetch_s - result.compile_s)
        phases = {"queue": queue_s, "fetch": result.fetch_s, "compile": result.compile_s}
        self._times.add(phases)
        if fetched is not None:
            phases |= {"raw_queue": fetched.queue_s, "fetch": fetched.seconds + result.fetch_s}
        for phase, seconds in phases.items():
            self._record(version.key, phase, seconds)
        return result.ref

    def _record(self, key: str, phase: str, seconds: float) -> None:
        self._phases.setdefault(key, {})[phase] = seconds
        self._phases.move_to_end(key)
        if len(self._phases) > MAX_REMEMBERED_PHASES:
            self._phases.popitem(last=False)


def _raw_tier(remote: RemoteTier | None) -> RawTier:
    if remote is None:
        return RawTier()
    raw = remote.raw
    return RawTier(
        raw.num_entries,
        raw.bytes_used,
        raw.evictions,
        remote.hits,
        remote.fetches,
        remote.fetched_bytes,
        remote.stale_uses,
        remote.times.seconds,
        raw.num_leases,
        remote.num_fetching,
    )
