"""A remote source in memory, with faults at each call and a history of what each name was."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from adapters_store.errors import SourceUnavailable
from adapters_store.limits import Limits
from adapters_store.raw import fetched_files
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources.folder import NOTED_FILES, FileChanged

Files = dict[str, bytes]


class FakeSource:
    """What RemoteSource asks for. `fault(call)` may raise; calls wait while `gate` is cleared."""

    def __init__(self, source: str = "fake://bucket/team") -> None:
        self.source = self.endpoint = source
        self.misnamed: list[str] = []
        self.adapters: dict[str, tuple[int, Files]] = {}  # by name: how many puts were before it, and the files
        self.calls: Counter[str] = Counter()
        self.fault: Callable[[str], None] = lambda call: None
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = 0
        self.most_at_once = 0
        self.is_closed = False
        self._puts = 0

    def put(self, name: str, files: Files) -> None:
        self._puts += 1
        self.adapters[name] = (self._puts, files)

    def put_folder(self, name: str, folder: Path) -> None:
        self.put(name, {path.name: path.read_bytes() for path in folder.iterdir()})

    def delete(self, name: str) -> None:
        self.adapters.pop(name, None)

    def go_down(self) -> None:
        self.fault = _down

    def come_back(self) -> None:
        self.fault = lambda call: None

    async def resolve(self, name: str) -> SourceVersion | None:
        await self._called("resolve")
        if name not in self.adapters:
            return None
        number, files = self.adapters[name]
        noted = tuple(FileVersion(file, len(files[file]), etag=f"{number}") for file in NOTED_FILES if file in files)
        return SourceVersion(self.source, name, f"{self.source}/{name}", noted)

    async def names(self) -> list[str]:
        await self._called("names")
        return sorted(self.adapters)

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            limits.check_files(fetched_files(version))
            for part in fetched_files(version):
                await self._called("fetch")
                number, files = self.adapters.get(version.name, (0, {}))
                if part.etag != f"{number}" or part.name not in files:
                    raise FileChanged(part.name)
                content = files[part.name]
                (folder / part.name).write_bytes(content[: len(content) // 2])  # a reader must never see this
                await self._called("half")
                (folder / part.name).write_bytes(content)
            return {}
        finally:
            self.at_once -= 1

    async def close(self) -> None:
        self.is_closed = True

    async def _called(self, call: str) -> None:
        self.calls[call] += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        self.fault(call)


def _down(call: str) -> None:
    raise SourceUnavailable(f"the fake source is down ({call})")
