"""The names of one remote source and what they point to: asked of it, remembered for a while, kept on disk.

folder/<sha256 of the name>.json    the SourceVersion that the name had when the source was asked last
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from adapters_store.errors import AdapterDenied, AdapterError, AdapterNotFound, AdapterUnavailable, SourceUnavailable
from adapters_store.flights import Flights, turn
from adapters_store.histogram import PhaseTimes
from adapters_store.misses import Misses
from adapters_store.ref import SourceVersion
from adapters_store.sources.remote import RemoteSource

log = logging.getLogger(__name__)

SourceDown = Literal["serve", "fail"]
SourceDelete = Literal["keep", "drop"]
NOT_ASKABLE = (AdapterDenied, AdapterUnavailable)
MAX_QUESTIONS = 32  # of one source at once
MAX_KNOWN = 100_000  # names of one source whose versions are remembered
REFUSALS_TOLD_S = 60.0  # one log line in so long says that a name is refused
NAMES = "*"  # stands for the listing where a name would; no name is called that


@dataclass(frozen=True, slots=True, kw_only=True)
class NamePolicy:
    """How long answers of a source hold, and what holds without one. Seconds."""

    poll_interval_s: float = 10.0
    """a name's version is at most this old when it is served; names in use are asked again from half of it"""
    miss_ttl_s: float = 5.0
    """how long "no such adapter" and failures are remembered"""
    patience_s: float = 2.0
    """how long a request for a name that was resolved before waits for the source"""
    turn_s: float = 10.0
    """how long a question waits while as many as may be under way are, and a chat template's fetch likewise"""
    on_source_down: SourceDown = "serve"
    """the last version of a name is served while its source can't be asked, or its requests get 503"""
    on_source_delete: SourceDelete = "drop"
    """what is here of an adapter that its source has no longer is served on, or its name is not found"""


@dataclass(slots=True)
class _Known:
    """What a name pointed to, and when the source said so (monotonic)."""

    version: SourceVersion
    asked_at: float
    refused_at: float = -float("inf")
    """when the source last gave, for this name alone, another answer than what it points to"""


class RemoteNames:
    """Resolves names of one remote source. Lives on one event loop.

    A name that is in use is asked again in the background, so that a request waits for the source only the
    first time and after a pause.
    """

    def __init__(
        self,
        remote: RemoteSource,
        folder: Path,
        policy: NamePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        times: PhaseTimes | None = None,
    ) -> None:
        """`times` is told how long the source took for each answer."""
        self.remote = remote
        self._times = times or PhaseTimes()
        self.stale_uses = 0
        """times since start that a version was served which the source could not confirm"""
        self._policy = policy or NamePolicy()
        self._clock = clock
        self._folder = (
            folder.absolute() / hashlib.sha256(f"{remote.source} {remote.endpoint}".encode()).hexdigest()[:16]
        )
        self._known: OrderedDict[str, _Known] = OrderedDict()  # by use: the next to be forgotten first
        self._misses = Misses(self._policy.miss_ttl_s, clock=clock)
        self._flights: Flights[SourceVersion | None] = Flights()
        self._refreshes: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(MAX_QUESTIONS)
        self._is_down = False
        self._down_at = -float("inf")
        self._told_at = -float("inf")
        self._listed: list[str] | None = None
        self._listed_at = -float("inf")
        self._is_listing_broken = False
        self._load()

    async def resolve(self, name: str) -> SourceVersion | None:
        """What `name` points to, at most `poll_interval_s` old; None when the source has no such adapter.

        Raises AdapterError when the source can't be asked and the policy, or never having seen the name, leaves
        nothing to serve.
        """
        known, policy = self._known.get(name), self._policy
        if known is not None:
            self._known.move_to_end(name)
        age_s = float("inf") if known is None else self._clock() - known.asked_at
        if known is not None and age_s < policy.poll_interval_s:
            if age_s >= policy.poll_interval_s / 2 and not self._is_refused(known):
                self._refresh(name)
            return known.version
        if known is not None and policy.on_source_down == "serve":
            return await self._resolve_known(name)
        if (error := self._misses.get(name)) is not None:
            if isinstance(error, AdapterNotFound):
                return None
            raise error
        await self._flights.join(name, lambda: self.ask(name))
        known = self._known.get(name)
        return None if known is None else known.version

    async def ask(self, name: str) -> SourceVersion | None:
        """What the source says now, whatever the policy makes of it. Raises AdapterError when it can't be asked."""
        version, asked_at = await self.look(name)
        self.accept(name, version, asked_at)
        return version

    async def confirm(self, version: SourceVersion) -> SourceVersion | None:
        """What the source says now of the version's name: remembered where it is what was known, else not yet."""
        now, asked_at = await self.look(version.name)
        known = self._known.get(version.name)
        if known is not None and known.version == now:
            self.accept(version.name, now, asked_at)
        return now

    async def look(self, name: str) -> tuple[SourceVersion | None, float]:
        """What the source says now, and when it was asked; requests go on with what they had until `accept`."""
        async with self._turn():
            started, started_s = self._clock(), time.perf_counter()
            try:
                version = await self.remote.resolve(name)
            except AdapterNotFound:
                version = None
            except AdapterError as error:
                # clients may name what is not for this server's key, or what it can't give: that says nothing of others
                if isinstance(error, SourceUnavailable):
                    self._note_down(error)
                elif (known := self._known.get(name)) is not None:
                    self._note_refused(known, error)
                self._misses.add(name, error)
                raise
        self._times.add({"resolve": time.perf_counter() - started_s})
        self._note_up()
        return version, started

    def doubt(self, version: SourceVersion) -> None:
        """Something is wrong with this version: who asks next asks the source."""
        known = self._known.get(version.name)
        if known is not None and known.version == version:
            known.asked_at = -float("inf")

    def forget(self) -> None:
        """Know nothing any more, here and on disk; what is under way goes on."""
        for name in self._known:
            self._path(name).unlink(missing_ok=True)
        self._known.clear()
        with contextlib.suppress(OSError):  # not there, or with a file that is being written
            self._folder.rmdir()

    def serves(self, name: str) -> bool:
        """Whether a version of `name` can be served without the source."""
        return name in self._known and self._policy.on_source_down == "serve"

    async def names(self) -> list[str]:
        """All names as the source listed them last; those it was asked for, where it never did or they are kept."""
        if self._clock() - self._listed_at >= self._policy.poll_interval_s:
            task = self._refresh(NAMES)
            await asyncio.wait({task}, timeout=self._policy.patience_s)
        if self._listed is not None and self._policy.on_source_delete == "drop":
            return self._listed.copy()
        return sorted({*(self._listed or ()), *self._known})

    def version_of(self, name: str) -> SourceVersion:
        """What `name` pointed to when it was asked for last; without files when it never was."""
        known = self._known.get(name)
        source = self.remote.source
        return SourceVersion(source, name, f"{source}/{name}", ()) if known is None else known.version

    async def close(self) -> None:
        """Give up what is under way and close the source."""
        tasks = list(self._refreshes.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._flights.close()
        await self.remote.close()

    # --- asking ---

    def _turn(self) -> AbstractAsyncContextManager[None]:
        refusal = f"too many questions wait for {self.remote.source}; try again"
        return turn(self._turns, self._policy.turn_s, refusal)

    async def _resolve_known(self, name: str) -> SourceVersion | None:
        """For a name whose last version may be served: waits for the source, but not for long."""
        before = self._known[name]
        is_due = not self._is_down or self._clock() - self._down_at >= self._policy.miss_ttl_s
        if is_due and not self._is_refused(before):
            self._down_at = self._clock()  # of many requests in an outage one waits, now and then
            done, _ = await asyncio.wait({self._refresh(name)}, timeout=self._policy.patience_s)
            if not done:
                self._note_down(SourceUnavailable(f"no answer within {self._policy.patience_s:g} s"))
        known = self._known.get(name)
        if known is before:
            self.stale_uses += 1
        return None if known is None else known.version

    def _refresh(self, name: str) -> asyncio.Task[None]:
        """Ask for `name` in the background; the task of who does already."""
        task = self._refreshes.get(name)
        if task is None:
            task = self._refreshes[name] = asyncio.create_task(self._run_refresh(name), name=f"refresh {name}")
        return task

    async def _run_refresh(self, name: str) -> None:
        try:
            if name == NAMES:
                await self._list()
            else:
                await self._flights.join(name, lambda: self.ask(name))
        except AdapterError:
            pass  # it is logged where the source goes down, and who has nothing to serve asks on its own
        finally:
            del self._refreshes[name]

    async def _list(self) -> None:
        try:
            async with self._turn():
                self._listed = await self.remote.names()
        except NOT_ASKABLE as error:
            # no sign of an outage: a listing needs more rights than an adapter, and one odd key may break it
            if not self._is_listing_broken:
                log.warning("%s can't be listed: %s", self.remote.source, error.message)
            self._is_listing_broken = True
            raise
        finally:
            self._listed_at = self._clock()
        self._is_listing_broken = False
        self._note_up()

    def accept(self, name: str, version: SourceVersion | None, asked_at: float) -> None:
        """Remember what the source said when it was asked at `asked_at`, as the policy has it."""
        known = self._known.get(name)
        if known is not None and known.asked_at > asked_at:
            return  # a later question has been answered
        if version is None and known is not None and self._policy.on_source_delete == "keep":
            version = known.version
        if version is None:
            self._misses.add(name, AdapterNotFound(f"{self.remote.source} has no adapter {name}"))
            if self._known.pop(name, None) is not None:
                self._path(name).unlink(missing_ok=True)
            return
        self._misses.forget(name)
        if known is None or known.version != version:
            self._keep(version)
        self._known[name] = _Known(version, asked_at)
        self._forget_the_oldest()

    def _forget_the_oldest(self) -> None:
        while len(self._known) > MAX_KNOWN:
            oldest, _ = self._known.popitem(last=False)
            self._path(oldest).unlink(missing_ok=True)

    def _note_down(self, error: AdapterError) -> None:
        if self._is_down:
            return  # `_down_at` stays: failures, however many, put off no question that is due
        log.warning("%s can't be asked; what is known of it is used: %s", self.remote.source, error.message)
        self._is_down, self._down_at = True, self._clock()

    def _note_refused(self, known: _Known, error: AdapterError) -> None:
        known.refused_at = self._clock()
        if known.refused_at - self._told_at >= REFUSALS_TOLD_S:
            source, name = self.remote.source, known.version.name
            log.warning("%s does not give %s, which it gave before: %s", source, name, error.message)
            self._told_at = known.refused_at

    def _is_refused(self, known: _Known) -> bool:
        return self._clock() - known.refused_at < self._policy.miss_ttl_s

    def _note_up(self) -> None:
        if self._is_down:
            log.info("%s answers again", self.remote.source)
        self._is_down = False

    # --- the folder ---

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def _keep(self, version: SourceVersion) -> None:
        """Write down what a name points to, for a start while the source is down. A full disk only costs that."""
        path = self._path(version.name)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            for parent in (self._folder.parent.parent, self._folder.parent, self._folder):
                parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(version))
            temporary.rename(path)
        except OSError as error:
            log.warning("%s can't be written down as of now: %s", version.name, error)
            temporary.unlink(missing_ok=True)

    def _load(self) -> None:
        for path in self._folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for path in self._folder.glob("*.json"):
            try:
                version = msgspec.json.decode(path.read_bytes(), type=SourceVersion)
            except (OSError, msgspec.MsgspecError) as error:
                log.warning("%s dropped: %r", path.name, error)
                path.unlink(missing_ok=True)
                continue
            if version.source == self.remote.source and self._path(version.name) == path:
                self._known[version.name] = _Known(version, -float("inf"))
        self._forget_the_oldest()
