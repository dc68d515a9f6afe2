"""From the name in a request to an adapter the engine can load: resolve, fetch in the background, lease."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterError
from adapters_store.ref import AdapterRef, SourceVersion, is_adapter_name
from adapters_store.store import AdapterStore
from server.api.access_log import current_entry
from server.api.errors import shown
from server.api.pins import Pins
from server.api.usage import UsageLog
from server.engine.client import Engine
from server.errors import ModelNotFound

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's `model` means: the name that answers, and the adapter's version (None: the base)."""

    name: str
    version: SourceVersion | None
    resolve_s: float = 0.0


@dataclass(slots=True, eq=False)
class Hold:
    """One request's claim on its adapter. `ref` is set, and leased, as soon as the image is on disk."""

    version: SourceVersion | None
    ref: AdapterRef | None = None
    phases: dict[str, float] = field(default_factory=dict)  # of the fetch that this request waited for

    @property
    def pending(self) -> str | None:
        """The key that the engine waits for; None when there is nothing to wait for."""
        return self.version.key if self.version is not None and self.ref is None else None


@dataclass(slots=True, eq=False)
class _Fetch:
    """One fetch under way and the requests it serves."""

    version: SourceVersion
    holds: set[Hold] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


class AdapterSupply:
    """Resolves names and brings images to disk, one fetch per version whatever the number of requests.

    Order matters: the engine forgets an AdapterReady that nothing waits for. So a request is first sent to
    the engine, and joins the fetch in the same turn of the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        store: AdapterStore,
        base_names: Sequence[str],
        pins: Pins | None = None,
    ) -> None:
        self.pins = pins or Pins(engine, store)
        self.usage = UsageLog()
        self._engine = engine
        self._catalog = catalog
        self._store = store
        self._base_names = tuple(base_names)
        self._fetches: dict[str, _Fetch] = {}

    async def resolve(self, model: str) -> Target:
        """`<base>`, `<adapter>` or `<base>:<adapter>`. Raises ModelNotFound, and AdapterError from the source."""
        current_entry().named(model)
        if model in self._base_names:
            return Target(model, None)
        prefix = next((f"{base}:" for base in self._base_names if model.startswith(f"{base}:")), "")
        name = model.removeprefix(prefix)
        if not is_adapter_name(name) or name in self._base_names:
            raise ModelNotFound(f"The model '{shown(model)}' does not exist.", param="model")
        started = time.monotonic()
        version = await self._catalog.resolve(name)
        return Target(name, version, time.monotonic() - started)

    def hold(self, version: SourceVersion | None) -> Hold:
        """A claim on the image of `version`, leased at once if it is on disk. Ends with release()."""
        hold = Hold(version)
        if version is None:
            return hold
        self.usage.used(version.name)
        if (ref := self._store.lookup(version.key)) is not None:
            self._lease(hold, ref)
            self.pins.follow(ref)
        return hold

    async def compile(self, version: SourceVersion) -> AdapterRef:
        """Bring an image to disk without a request for it. Raises AdapterError."""
        try:
            ref = await self._store.ensure(version)
        except AdapterError as error:
            self.usage.failed(version.name, error.message)
            raise
        self.usage.succeeded(version.name)
        return ref

    def fetch(self, hold: Hold) -> None:
        """Bring a pending claim's image to disk and tell the engine. Call it in the turn that sends the request."""
        key = hold.pending
        if key is None or hold.version is None:
            return
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = _Fetch(hold.version)
            fetch.task = asyncio.create_task(self._run(key, fetch), name=f"fetch {hold.version.name}")
        fetch.holds.add(hold)

    def discard(self, hold: Hold) -> None:
        """The engine found the image damaged: the next request compiles it anew."""
        if hold.ref is not None:
            self.usage.failed(hold.ref.name, "The image was damaged on disk; the next request compiles it anew.")
            self._store.discard(hold.ref)

    def release(self, hold: Hold) -> None:
        """End a claim, whatever became of it. A fetch goes on without it: the next request will want it."""
        if hold.ref is not None:
            self._store.release(hold.ref)
            hold.ref = None
        elif (key := hold.pending) is not None and key in self._fetches:
            self._fetches[key].holds.discard(hold)

    async def close(self) -> None:
        """Cancel the fetches under way."""
        tasks = [fetch.task for fetch in self._fetches.values() if fetch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, key: str, fetch: _Fetch) -> None:
        """Task: one fetch. Leasing and telling the engine happen in one turn, so no request falls between."""
        try:
            ref = await self.compile(fetch.version)
            for hold in fetch.holds:
                self._lease(hold, ref)
                hold.phases = _phases(self._store.phases(key))
            self.pins.renew(ref)
            self._engine.adapter_ready(key, ref)
        except AdapterError as error:
            self._engine.adapter_failed(key, error.http_status, error.code, error.message)
        except Exception:  # a defect of ours; without an answer the requests would wait for ever
            logger.exception("fetching %s failed", fetch.version.name)
            self.usage.failed(fetch.version.name, "The server failed to load this adapter.")
            self._engine.adapter_failed(key, 500, "internal_error", "The server failed to load this adapter.")
        finally:
            del self._fetches[key]

    def _lease(self, hold: Hold, ref: AdapterRef) -> None:
        self._store.lease(ref)
        hold.ref = ref


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    """The store's phases under the names that a request's phases have; its queue is the compiler's."""
    names = {"queue": "compile_queue_s", "fetch": "fetch_s", "compile": "compile_s"}
    return {name: seconds[phase] for phase, name in names.items() if phase in seconds}
