"""Names to SourceVersions, over all configured sources. The first source that has a name wins."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from adapters_store.chat_template import AdapterTemplate, read_chat_template
from adapters_store.errors import AdapterNotFound
from adapters_store.ref import SourceVersion, is_adapter_name
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.named import NamedSource
from adapters_store.sources.remote import RemoteSource
from adapters_store.tensorfile import shown

log = logging.getLogger(__name__)

MAX_REMOVED = 65_536  # names that are remembered as taken away
MAX_TEMPLATES = 1024  # chat templates remembered, by version
MAX_TEMPLATE_CHARS = 16 << 20  # of all of them


class Source(Protocol):
    """Where adapters on this machine come from. Blocking; the catalog calls it in a thread."""

    misnamed: list[str]

    @property
    def source(self) -> str: ...
    def resolve(self, name: str) -> SourceVersion | None: ...
    def names(self) -> list[str]: ...


class Listing(NamedTuple):
    """One adapter of the catalog: its name, where its source keeps it, and what it points to."""

    name: str
    path: str
    version: SourceVersion


Listings = list[Listing]


class _Walk(NamedTuple):
    """What a listing has found so far."""

    found: dict[str, SourceVersion]
    warnings: list[str]


class Catalog:
    """Resolves adapter names. The base's names are never adapters, whatever folders are called.

    Names given by hand (`named`) go before all sources, also while their folder is missing: a name that
    was given one adapter never quietly becomes another. Removed names are not served until given again.
    `sources` go before those of `remote`, which has the folders that come after a remote source too.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        base_names: Collection[str],
        *,
        named: NamedSource | None = None,
        remote: RemoteTier | None = None,
        list_age_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.named = named or NamedSource()
        self.remote = remote
        self._sources = tuple(sources)
        self._removed: OrderedDict[str, None] = OrderedDict()
        self._templates: OrderedDict[str, AdapterTemplate | None] = OrderedDict()
        self._template_chars = 0
        self._base_names = frozenset(base_names)
        self._list_age_s = list_age_s
        self._clock = clock
        self._listed: Listings = []
        self._listed_at = -float("inf")
        self._list_lock = asyncio.Lock()
        self.warnings: tuple[str, ...] = ()
        """the last listing's names that can't be reached: they shadow the base, or an earlier source wins"""

    async def resolve(self, name: str) -> SourceVersion:
        """What `name` points to: on this machine right now, at a remote source by its NamePolicy.

        AdapterNotFound when no source has it.
        """
        version = await self._resolve_here(name)
        if version is None and (remote := self._remote_of(name)) is not None:
            version = await remote.resolve(name)
        if version is None:
            raise AdapterNotFound(f"The model {shown(name)} does not exist.")
        return version

    def covers(self, version: SourceVersion) -> bool:
        """Whether the version is of one of the sources that are configured now."""
        behind = self.remote.names if self.remote is not None else ()
        folders = (*self._sources, *(names.remote for names in behind))
        is_local = any(source.source == version.source for source in folders)
        return is_local or (self.remote is not None and self.remote.covers(version))

    async def chat_template(self, version: SourceVersion) -> AdapterTemplate | None:
        """The chat template in the adapter's own folder; None when the base's is its template.

        Raises AdapterError: a file that is broken or too large is named, one that is being replaced is 503.
        """
        key = version.key
        if key not in self._templates:
            if self.remote is not None and self.remote.covers(version):
                template = await self.remote.chat_template(version)
            else:
                template = await asyncio.to_thread(read_chat_template, version)
            if key not in self._templates:  # another request may have read it meanwhile
                self._remember(key, template)
            return template
        return self._templates[key]

    def _remember(self, key: str, template: AdapterTemplate | None) -> None:
        self._templates[key] = template
        self._template_chars += len(template.source) if template else 0
        while len(self._templates) > MAX_TEMPLATES or self._template_chars > MAX_TEMPLATE_CHARS:
            _, oldest = self._templates.popitem(last=False)
            self._template_chars -= len(oldest.source) if oldest else 0

    def assign(self, version: SourceVersion) -> None:
        """Serve `version.path` under `version.name` from now on. Running requests keep what they resolved.

        A version of a remote source is one that `look_at` found.
        """
        if self.remote is not None and self.remote.covers(version):
            self.named.remove(version.name)
            self.remote.assign(version)
        else:
            self._take_back(version.name)
            self.named.assign(version)
        self._removed.pop(version.name, None)
        self._listed_at = -float("inf")

    def remove(self, name: str) -> None:
        """Serve `name` no longer, wherever it comes from, until it is assigned again.

        That is remembered of the last MAX_REMOVED; of those before them a source's adapter is served again.
        """
        self._take_back(name)
        self._removed[name] = None
        self._removed.move_to_end(name)
        if len(self._removed) > MAX_REMOVED:
            oldest, _ = self._removed.popitem(last=False)
            log.warning("%d names were taken away after %s: what the sources have of it is served", MAX_REMOVED, oldest)
        self._listed_at = -float("inf")

    def release(self, name: str) -> None:
        """End what `assign` or `remove` said of a name: it is what the sources have under it."""
        self._take_back(name)
        self._removed.pop(name, None)
        self._listed_at = -float("inf")

    def is_given(self, name: str) -> bool:
        """Whether the name was given by hand: it is then what it was given, or nothing."""
        return name in self.named or self._is_alias(name)

    async def reload(self, name: str, bring: Callable[[SourceVersion], Awaitable[object]]) -> None:
        """Ask for `name` anew, whatever is remembered of it, and `bring` what it points to.

        A remote adapter's name points to the new version when that is done. Raises AdapterError, also of `bring`.
        """
        version = await self._resolve_here(name)
        if version is not None:
            await bring(version)
        elif (remote := self._remote_of(name)) is not None:
            await remote.reload(name, bring)
        else:
            raise AdapterNotFound(f"The model {shown(name)} does not exist.")

    async def look_at(self, name: str, url: str) -> SourceVersion:
        """What `name` would point to as the adapter at `url`, below a remote source. Nothing is changed.

        Raises ValueError when it is below none, AdapterNotFound, AdapterError when the source can't be asked.
        """
        if self.remote is None:
            raise ValueError("this server has no remote --adapter-source")
        version = await self.remote.look_at(name, url)
        if version is None:
            raise AdapterNotFound(f"No adapter found at {shown(url)}.")
        return version

    def _take_back(self, name: str) -> None:
        self.named.remove(name)
        if self.remote is not None:
            self.remote.release(name)

    def _is_alias(self, name: str) -> bool:
        return self.remote is not None and name in self.remote.aliases

    async def list(self) -> Listings:
        """All adapters, by name. At most `list_age_s` old: a listing walks folders."""
        async with self._list_lock:
            if self._clock() - self._listed_at >= self._list_age_s:
                self._listed, self.warnings = await self._walk()
                self._listed_at = self._clock()
            return self._listed.copy()

    async def _walk(self) -> tuple[Listings, tuple[str, ...]]:
        walk = _Walk({}, [])
        await asyncio.to_thread(self._walk_folders, walk)
        remotes = self.remote.names if self.remote is not None else ()
        listed = await asyncio.gather(*(remote.names() for remote in remotes))  # one that is down takes its patience
        for name, alias in self.remote.aliases.items() if self.remote is not None else ():
            walk.found[name] = alias.version_of(name)
        for remote, names in zip(remotes, listed, strict=True):
            self._add(walk, remote.remote, names, remote.version_of)
        found = walk.found
        return [Listing(name, found[name].path, found[name]) for name in sorted(found)], tuple(walk.warnings)

    def _walk_folders(self, walk: _Walk) -> None:
        for source in (self.named, *self._sources):
            self._add(walk, source, source.names(), source.resolve)

    def _add(
        self,
        walk: _Walk,
        source: Source | RemoteSource,
        names: Sequence[str],
        version_of: Callable[[str], SourceVersion | None],
    ) -> None:
        found, label = walk.found, source.source
        for name in names:
            if name in self._removed or (self.is_given(name) and source is not self.named):
                continue
            if name in self._base_names:
                walk.warnings.append(f"{label} has an adapter named {name!r}, the base's name: never served")
            elif name in found:
                walk.warnings.append(f"{label} has an adapter {name!r} too: {found[name].path} is served")
            elif (version := version_of(name)) is not None:
                found[name] = version
        walk.warnings.extend(
            f"{label} has an adapter {name!r}, which no request can name: rename its folder" for name in source.misnamed
        )

    def _may_be_served(self, name: str) -> bool:
        return is_adapter_name(name) and name not in self._base_names and name not in self._removed

    async def _resolve_here(self, name: str) -> SourceVersion | None:
        """What `name` points to on this machine, before any remote source is asked."""
        for source in self._sources_of(name) if self._may_be_served(name) else ():
            version = await asyncio.to_thread(source.resolve, name)
            if version is not None:
                return version
        return None

    def _remote_of(self, name: str) -> RemoteTier | None:
        """Who knows `name` if it is not on this machine; names in `named` are nobody else's."""
        return self.remote if self._may_be_served(name) and name not in self.named else None

    def _sources_of(self, name: str) -> Sequence[Source]:
        if self._is_alias(name):
            return ()
        return (self.named,) if name in self.named else self._sources
