"""Adapters behind a network: which names the remote sources have, and their files brought to the raw tier."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from adapters_store.chat_template import AdapterTemplate, check_template_sizes, read_chat_template
from adapters_store.disk_threads import in_raw_thread
from adapters_store.errors import AdapterError, AdapterNotFound, AdapterUnavailable, RawDamaged, reason_of
from adapters_store.flights import Flights, turn
from adapters_store.folder_names import FolderNames
from adapters_store.histogram import PhaseTimes
from adapters_store.limits import Limits
from adapters_store.raw import RawFiles, RawFolder, fetched_files, hash_files
from adapters_store.ref import SourceVersion, is_adapter_name
from adapters_store.remote_names import NOT_ASKABLE, NamePolicy, RemoteNames
from adapters_store.sources.alias import AliasSource, name_below
from adapters_store.sources.folder import TEMPLATE_FILES, FileChanged
from adapters_store.sources.local import LocalSource
from adapters_store.sources.remote import RemoteSource
from adapters_store.tensorfile import shown

MAX_FETCHES = 8
RESERVED_FETCHES = 2  # of these, for other sources than any one
LEASE_ATTEMPTS = 3
MAX_SPARE = 4096  # sources of one adapter that no name has: looked at for a client, or of a name that was taken away


class Fetched(NamedTuple):
    """Files on disk, leased."""

    folder: Path
    seconds: float
    """that the fetch took, without its wait for a turn; 0 when they were here"""
    queue_s: float = 0.0
    """that wait"""


class RemoteTier:
    """Owner of the remote sources and of the raw tier. Lives on one event loop.

    `sources` in their order: the first that has a name wins. Folders of this machine are among them where they come
    after a remote one: their names are resolved here, their files are read where they are.
    """

    def __init__(
        self,
        sources: Sequence[RemoteSource | LocalSource],
        cache_dir: Path,
        *,
        policy: NamePolicy | None = None,
        limits: Limits | None = None,
        quota_bytes: int | None = None,
        max_fetches: int = MAX_FETCHES,
        eviction_grace_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy or NamePolicy()
        self.times = PhaseTimes()
        """seconds by phase: resolve (each question to a source), queue (a fetch's wait for its turn), fetch"""
        self._names_dir = cache_dir / "names"
        self.names: tuple[RemoteNames | FolderNames, ...] = tuple(
            FolderNames(source, self._names_dir)
            if isinstance(source, LocalSource)
            else RemoteNames(source, self._names_dir, self.policy, clock, self.times)
            for source in sources
        )
        self.raw = RawFiles(cache_dir, quota_bytes, grace_s=eviction_grace_s)
        self.fetches = 0
        """fetches since start that brought files here"""
        self.fetched_bytes = 0
        self.hits = 0
        """uses since start that found the files here"""
        self.aliases: dict[str, RemoteNames] = {}
        """names given by hand, each the one name of an AliasSource; they go before all others"""
        self._looked: dict[str, tuple[SourceVersion, float]] = {}  # by AliasSource: not assigned yet, and when asked
        self._spare: OrderedDict[str, None] = OrderedDict()  # AliasSources that are in no alias, for requests that run
        remotes = [names for names in self.names if isinstance(names, RemoteNames)]
        self._by_source: dict[str, RemoteNames] = {names.remote.source: names for names in remotes}
        self._clock = clock
        self._limits = limits or Limits()
        self._fetches: Flights[tuple[float, float]] = Flights()
        self._turns = asyncio.Semaphore(max_fetches)
        # of several sources none takes all turns: a slow one leaves two to the others
        share = max(1, max_fetches - RESERVED_FETCHES) if len(remotes) > 1 else max_fetches
        self._turns_of = {source: asyncio.Semaphore(share) for source in self._by_source}

    @property
    def stale_uses(self) -> int:
        """Times since start that a version was served which its source could not confirm."""
        return sum(names.stale_uses for names in self._by_source.values())

    @property
    def num_fetching(self) -> int:
        """Versions whose files are on their way or wait for a turn."""
        return len(self._fetches)

    def covers(self, version: SourceVersion) -> bool:
        """Whether the version is of one of the remote sources."""
        return version.source in self._by_source

    async def resolve(self, name: str) -> SourceVersion | None:
        """What `name` points to at the first source that has it; a name given by hand, at its own.

        A source that can't be asked is passed over only when a later one is known to serve the name: then
        this one did not have it when it was asked last. Else its AdapterError is raised.
        """
        if name in self.aliases:
            return await self.aliases[name].resolve(name)
        passed_over: AdapterError | None = None
        for index, names in enumerate(self.names):
            try:
                version = await names.resolve(name)
            except NOT_ASKABLE as error:
                if not any(later.serves(name) for later in self.names[index + 1 :]):
                    raise
                passed_over = error
                continue
            if version is not None:
                return version
        if passed_over is not None:  # the later one has it no longer, and this one may have
            raise passed_over
        return None

    async def again(self, version: SourceVersion) -> SourceVersion:
        """What the version's name points to now, asked of its source; AdapterNotFound when it has gone."""
        newer = await self._names_of(version).ask(version.name)
        if newer is None:
            raise AdapterNotFound(f"The model {version.name!r} does not exist (any more).")
        return newer

    async def reload(self, name: str, bring: Callable[[SourceVersion], Awaitable[object]]) -> None:
        """Ask the sources now. What they say is `bring`-ed, and when that is done `name` points to it.

        Raises AdapterError where a source can't be asked, and what `bring` raises; the name then stays what it was.
        """
        looked: list[tuple[RemoteNames | FolderNames, SourceVersion | None, float]] = []
        for names in (self.aliases[name],) if name in self.aliases else self.names:
            version, asked_at = await names.look(name)
            looked.append((names, version, asked_at))
            if version is not None:
                await bring(version)
                break
        for names, version, asked_at in looked:
            names.accept(name, version, asked_at)

    async def look_at(self, name: str, url: str) -> SourceVersion | None:
        """What `name` would point to as the adapter at `url`; None when it is not there. Nothing is changed.

        The source is asked now; while it can't be, what is known holds as far as the policy has it.
        Raises ValueError when no source has `url` below it, AdapterError when that source can't be asked.
        """
        for names in (names for names in self.names if isinstance(names, RemoteNames)):
            inner_name = name_below(names.remote.source, url)
            if inner_name is not None and is_adapter_name(inner_name):
                alias = AliasSource(names.remote, inner_name, name)
                break
        else:
            raise ValueError(f"{shown(url)} is no adapter below a remote --adapter-source")
        is_new = alias.source not in self._by_source
        if is_new:
            self._by_source[alias.source] = RemoteNames(alias, self._names_dir, self.policy, self._clock, self.times)
            self._turns_of[alias.source] = self._turns_of[names.remote.source]
        version: SourceVersion | None = None
        try:
            version = await self._look_now(self._by_source[alias.source], name)
        finally:
            if is_new and version is None:  # what a client asks for and is not there leaves nothing behind
                del self._by_source[alias.source], self._turns_of[alias.source]
        if name not in self.aliases or self.aliases[name].remote.source != alias.source:
            self._spare_source(alias.source)
        return version

    def assign(self, version: SourceVersion) -> None:
        """From now on `version.name` is what `look_at` found for it."""
        names = self._by_source[version.source]
        if self.aliases.get(version.name) is not names:
            self.release(version.name)
        self._spare.pop(version.source, None)
        looked, asked_at = self._looked.pop(version.source, (None, 0.0))
        if looked == version:
            names.accept(version.name, version, asked_at)
        self.aliases[version.name] = names

    def release(self, name: str) -> None:
        """The name is no longer one given by hand, if it was; requests that run go on."""
        names = self.aliases.pop(name, None)
        if names is not None:
            names.forget()
            self._looked.pop(names.remote.source, None)
            self._spare_source(names.remote.source)

    def doubt(self, version: SourceVersion) -> None:
        """The version came to nothing: who names it next asks its source."""
        if (names := self._by_source.get(version.source)) is not None:
            names.doubt(version)

    def is_fetching(self, version_key: str) -> bool:
        """Whether the files of that version are on their way or wait for a turn."""
        return version_key in self._fetches

    @asynccontextmanager
    async def files(self, version: SourceVersion, *, confirms: bool = True) -> AsyncIterator[Fetched]:
        """The files of `version` on disk, fetched if need be, leased in the block.

        Raises AdapterError, and FileChanged when the source has another version by now; that is looked at
        after the fetch too if `confirms`, for files that were noted while they were being replaced. Without it,
        for what a request needs before it has a place in the queue, the wait for a turn is bounded.
        """
        key = version.key
        for _ in range(LEASE_ATTEMPTS):
            seconds = queue_s = 0.0
            if self.raw.find(version):
                self.hits += 1
            else:
                seconds, queue_s = await self._fetches.join(key, lambda: self._fetch(version, confirms))
            if self.raw.lease(key):
                break
        else:
            raise AdapterUnavailable(f"the files of adapter {version.name} went for others before they were used")
        try:
            yield Fetched(self.raw.folder_of(key), seconds, queue_s)
        finally:
            self.raw.release(key)

    async def chat_template(self, version: SourceVersion) -> AdapterTemplate | None:
        """The adapter's own chat template. Its files alone are fetched where the adapter's are not here."""
        check_template_sizes(version)
        part = msgspec.structs.replace(
            version, files=tuple(file for file in version.files if file.name in TEMPLATE_FILES)
        )
        if not part.files:
            return None
        held = version if self.raw.find(version) else part
        try:
            return await self._read_template(version, held)
        except RawDamaged:
            self.raw.discard(held.key)
            return await self._read_template(version, part)

    async def close(self) -> None:
        """Give up what is under way and close the sources."""
        await self._fetches.close()
        for names in self._by_source.values():
            await names.close()
        await asyncio.to_thread(self.raw.close)

    def _names_of(self, version: SourceVersion) -> RemoteNames:
        """Who knows the version's name; AdapterNotFound for a source that went to make room."""
        names = self._by_source.get(version.source)
        if names is None:
            raise AdapterNotFound(f"The model {version.name!r} does not exist (any more).")
        return names

    async def _look_now(self, names: RemoteNames, name: str) -> SourceVersion | None:
        try:
            async with asyncio.timeout(self.policy.patience_s if names.serves(name) else None):
                version, asked_at = await names.look(name)
        except (*NOT_ASKABLE, TimeoutError):
            if not names.serves(name):
                raise
            return await names.resolve(name)
        if version is not None:
            self._looked[names.remote.source] = version, asked_at
        return version

    def _spare_source(self, source: str) -> None:
        """Keep an AliasSource that no name has, for a while: those used least lately go."""
        if source in self._by_source:
            self._spare[source] = None
            self._spare.move_to_end(source)
        while len(self._spare) > MAX_SPARE:
            oldest, _ = self._spare.popitem(last=False)
            self._by_source.pop(oldest).forget()
            self._looked.pop(oldest, None)
            del self._turns_of[oldest]

    async def _read_template(self, version: SourceVersion, held: SourceVersion) -> AdapterTemplate | None:
        try:
            async with self.files(held, confirms=False) as fetched:
                return await in_raw_thread(read_chat_template, version, RawFolder(fetched.folder))
        except FileChanged as error:
            self.doubt(version)
            raise AdapterUnavailable(
                f"the chat template of adapter {version.name} is being replaced; try again"
            ) from error

    async def _fetch(self, version: SourceVersion, confirms: bool) -> tuple[float, float]:
        """Bring files to the raw tier; the seconds of that and of the wait for a turn. A full disk is
        AdapterUnavailable.
        """
        asked = time.perf_counter()
        self.raw.check_quota(version)
        names = self._names_of(version)
        limit_s = None if confirms else self.policy.turn_s
        refusal = f"too many fetches from {version.source} are under way; try again"
        async with turn(self._turns_of[version.source], limit_s, refusal), turn(self._turns, limit_s, refusal):
            started = time.perf_counter()
            folder: Path | None = None
            try:
                folder = self.raw.new_folder()
                known = await names.remote.fetch(version, folder, self._limits)
                hashing = in_raw_thread(hash_files, version, folder, known)
                sha256, _ = await asyncio.gather(hashing, _confirm(names, version) if confirms else asyncio.sleep(0))
                self.raw.adopt(version, folder, sha256)
                folder = None
            except OSError as error:
                raise AdapterUnavailable(
                    f"the files of adapter {version.name} can't be kept: {reason_of(error)}"
                ) from error
            finally:
                if folder is not None:
                    self.raw.abandon(folder)
            self.fetches += 1
            self.fetched_bytes += sum(file.size for file in fetched_files(version))
            seconds, queue_s = time.perf_counter() - started, started - asked
            self.times.add({"fetch": seconds, "queue": queue_s})
            return seconds, queue_s


async def _confirm(names: RemoteNames, version: SourceVersion) -> None:
    """FileChanged when the source has another version by now, AdapterNotFound when it has none."""
    try:
        now = await names.confirm(version)
    except AdapterError:
        return  # each file is the one that was noted; that the source went away since says nothing else
    if now is None:
        raise AdapterNotFound(f"The model {version.name!r} does not exist (any more).")
    if now != version:
        raise FileChanged(version.name)
