"""Names to SourceVersions, over all configured sources. The first source that has a name wins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from adapters_store.errors import AdapterNotFound
from adapters_store.ref import SourceVersion, is_adapter_name
from adapters_store.tensorfile import shown


class Source(Protocol):
    """Where adapters come from. Blocking; the catalog calls it in a thread."""

    @property
    def source(self) -> str: ...
    def resolve(self, name: str) -> SourceVersion | None: ...
    def names(self) -> list[str]: ...


class Listing(NamedTuple):
    """One adapter of the catalog: its name and where its source keeps it."""

    name: str
    path: str


Listings = list[Listing]


class Catalog:
    """Resolves adapter names. The base's names are never adapters, whatever folders are called."""

    def __init__(
        self,
        sources: Sequence[Source],
        base_names: Collection[str],
        *,
        list_age_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = tuple(sources)
        self._base_names = frozenset(base_names)
        self._list_age_s = list_age_s
        self._clock = clock
        self._listed: Listings = []
        self._listed_at = -float("inf")
        self._list_lock = asyncio.Lock()
        self.warnings: tuple[str, ...] = ()
        """the last listing's names that can't be reached: they shadow the base, or an earlier source wins"""

    async def resolve(self, name: str) -> SourceVersion:
        """What `name` points to right now, never from memory; AdapterNotFound when no source has it."""
        if is_adapter_name(name) and name not in self._base_names:
            for source in self._sources:
                version = await asyncio.to_thread(source.resolve, name)
                if version is not None:
                    return version
        raise AdapterNotFound(f"The model {shown(name)} does not exist.")

    async def list(self) -> Listings:
        """All adapters, by name. At most `list_age_s` old: a listing walks folders."""
        async with self._list_lock:
            if self._clock() - self._listed_at >= self._list_age_s:
                self._listed, self.warnings = await asyncio.to_thread(self._walk)
                self._listed_at = self._clock()
            return self._listed.copy()

    def _walk(self) -> tuple[Listings, tuple[str, ...]]:
        found: dict[str, str] = {}
        warnings = []
        for source in self._sources:
            for name in source.names():
                if name in self._base_names:
                    warnings.append(f"{source.source} has an adapter named {name!r}, the base's name: never served")
                elif name in found:
                    warnings.append(f"{source.source} has an adapter {name!r} too: {found[name]} is served")
                elif (version := source.resolve(name)) is not None:
                    found[name] = version.path
        return [Listing(name, path) for name, path in sorted(found.items())], tuple(warnings)
