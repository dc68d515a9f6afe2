"""One adapter of a remote source under another name, as a source of its own."""

from __future__ import annotations

from pathlib import Path

import msgspec

from adapters_store.limits import Limits
from adapters_store.ref import SourceVersion
from adapters_store.sources.remote import RemoteSource

MARK = "?"
"""begins what an alias adds to its source's id; no configured source has it in its URL"""


class AliasSource:
    """A RemoteSource with one adapter, `name`: what `inner` calls `inner_name`.

    Its id names both, so that its versions are never taken for those of either name at `inner`.
    """

    def __init__(self, inner: RemoteSource, inner_name: str, name: str) -> None:
        self.source = f"{inner.source}{MARK}{inner_name}={name}"
        self.endpoint = inner.endpoint
        self.misnamed: list[str] = []
        self._inner = inner
        self._inner_name = inner_name
        self._name = name

    async def resolve(self, name: str) -> SourceVersion | None:
        """See RemoteSource."""
        version = await self._inner.resolve(self._inner_name) if name == self._name else None
        return None if version is None else msgspec.structs.replace(version, source=self.source, name=name)

    async def names(self) -> list[str]:
        """See RemoteSource; nothing is asked."""
        return [self._name]

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        """See RemoteSource."""
        theirs = msgspec.structs.replace(version, source=self._inner.source, name=self._inner_name)
        return await self._inner.fetch(theirs, folder, limits)

    async def close(self) -> None:
        """Nothing: the connections are the inner source's."""


def name_below(source: str, url: str) -> str | None:
    """The name that `url` has below a source's id; None when it is not below it."""
    prefix = source if source.endswith("/") else f"{source}/"
    return url.removeprefix(prefix).removesuffix("/") if url.startswith(prefix) else None
