"""The names of a folder of this machine that comes after a remote source in the order of sources.

folder/<sha256 of the name>.txt    a name that the folder has served: the sources before it did not have it then
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from adapters_store.ref import SourceVersion
from adapters_store.sources.local import LocalSource

log = logging.getLogger(__name__)

MAX_SERVED = 100_000  # names of one folder that are remembered


class FolderNames:
    """Resolves names of one folder; looked at anew each time. Lives on one event loop, works in threads.

    Which names it has served outlives a restart, so that they go on while a source before it can't be asked.
    """

    def __init__(self, source: LocalSource, folder: Path) -> None:
        self.remote = source
        self.stale_uses = 0
        """none: a folder can always be asked"""
        self._folder = folder.absolute() / hashlib.sha256(source.source.encode()).hexdigest()[:16]
        for parent in (folder.absolute().parent, folder.absolute(), self._folder):
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._served = set(self._load())
        self._listed: dict[str, SourceVersion] = {}

    async def resolve(self, name: str) -> SourceVersion | None:
        """What `name` points to now."""
        version = await asyncio.to_thread(self.remote.resolve, name)
        if (version is not None) != (name in self._served):
            await asyncio.to_thread(self._note, name, version is not None)
        return version

    async def look(self, name: str) -> tuple[SourceVersion | None, float]:
        """The same, and when that was (monotonic seconds)."""
        asked_at = time.monotonic()
        return await self.resolve(name), asked_at

    def accept(self, name: str, version: SourceVersion | None, asked_at: float) -> None:
        """Nothing: no answer of a folder is remembered."""

    def serves(self, name: str) -> bool:
        """Whether the folder has served `name`: then no source before it had it when that was asked last."""
        return name in self._served

    async def names(self) -> list[str]:
        """All names now."""
        self._listed = await asyncio.to_thread(self._list)
        return sorted(self._listed)

    def version_of(self, name: str) -> SourceVersion:
        """What `name` pointed to when the names were asked for last."""
        return self._listed[name]

    async def close(self) -> None:
        """Nothing is open."""

    def _load(self) -> Iterator[str]:
        for path in self._folder.glob("*.txt"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                name = path.read_text()
                if self._path(name) == path:
                    yield name

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.txt"

    def _list(self) -> dict[str, SourceVersion]:
        found = {name: self.remote.resolve(name) for name in self.remote.names()}
        return {name: version for name, version in found.items() if version is not None}

    def _note(self, name: str, is_served: bool) -> None:
        """Write down that the folder serves a name, or does no longer. A full disk only costs that."""
        path = self._path(name)
        if not is_served:
            self._served.discard(name)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        elif len(self._served) < MAX_SERVED:
            self._served.add(name)
            try:
                path.write_text(name)
            except OSError as error:
                log.warning("%s can't be written down as served by %s: %s", name, self.remote.source, error)
