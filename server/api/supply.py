"""From the name in a request to an adapter the engine can load: resolve, fetch in the background, lease."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters_store.catalog import Catalog
from adapters_store.chat_template import AdapterTemplate
from adapters_store.errors import AdapterError, AdapterUnavailable, VersionNotFound
from adapters_store.ref import AdapterRef, SourceVersion, is_adapter_name
from adapters_store.store import AdapterStore
from adapters_store.versions import MIN_PREFIX_CHARS, is_version_prefix
from server.api.access_log import current_entry
from server.api.errors import shown
from server.api.pins import Pins
from server.api.usage import UsageLog
from server.engine.client import Engine
from server.errors import ModelNotFound

VERSION_MARK = "@"  # between a name and a version; no name has one
MAX_USERS = 16384  # images whose last user is remembered

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's `model` means: the name that answers, and the adapter's version (None: the base)."""

    name: str
    version: SourceVersion | None
    resolve_s: float = 0.0
    is_exact: bool = False  # the request named the version: no newer one answers in its place
    is_former: bool = False  # and the name has another by now
    asked_s: float = 0.0  # time.monotonic() before the name was looked up: what it is was true then or later


@dataclass(slots=True, eq=False)
class Hold:
    """One request's claim on its adapter. `ref` is set, and leased, as soon as the image is on disk."""

    version: SourceVersion | None
    is_exact: bool = False
    asked_s: float = 0.0  # see Target
    ref: AdapterRef | None = None
    phases: dict[str, float] = field(default_factory=dict)  # of the fetch that this request waited for

    @property
    def pending(self) -> str | None:
        """The key that the engine waits for; None when there is nothing to wait for."""
        if self.version is None or self.ref is not None:
            return None
        return f"{self.version.key}{VERSION_MARK}" if self.is_exact else self.version.key


@dataclass(slots=True, eq=False)
class _Fetch:
    """One fetch under way and the requests it serves. Whoever asked for exactly that version has one apart."""

    version: SourceVersion
    is_exact: bool
    asked_s: float  # by the hold that asked last
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
        self._users: OrderedDict[str, str] = OrderedDict()  # by image key: the name that asked for it last

    async def resolve(self, model: str) -> Target:
        """`<base>`, `<adapter>` or `<base>:<adapter>`; an adapter's name may have `@<version>` behind it.

        Raises ModelNotFound, and AdapterError from the source or for a version that is not at hand.
        """
        entry = current_entry()
        if model in self._base_names:
            entry.named(model)
            return Target(model, None)
        entry.named(model.partition(VERSION_MARK)[0])
        prefix = next((f"{base}:" for base in self._base_names if model.startswith(f"{base}:")), "")
        name, mark, version_prefix = model.removeprefix(prefix).partition(VERSION_MARK)
        if not is_adapter_name(name) or name in self._base_names:
            raise ModelNotFound(f"The model '{shown(model)}' does not exist.", param="model")
        version_prefix = version_prefix.lower()
        if mark and not is_version_prefix(version_prefix):
            raise ModelNotFound(
                f"The model '{shown(model)}' does not exist: what is behind the {VERSION_MARK} must be a version, at "
                f"least {MIN_PREFIX_CHARS} of the hexadecimal digits that its key, digest or image key begins with.",
                param="model",
            )
        started = time.monotonic()
        version = current = await self._catalog.resolve(name)
        if mark:
            version = self._store.pinned(current, version_prefix)
        resolve_s = time.monotonic() - started
        return Target(name, version, resolve_s, is_exact=bool(mark), is_former=version != current, asked_s=started)

    async def chat_template(self, target: Target) -> AdapterTemplate | None:
        """The adapter's own chat template, of exactly the target's version; None when the base's is its template.

        Raises AdapterError, of which VersionNotFound for a former version whose template is gone.
        """
        if target.version is None:
            return None
        try:
            return await self._catalog.chat_template(target.version)
        except AdapterUnavailable as error:
            if not target.is_former:
                raise
            raise VersionNotFound(
                f"The chat template of version {target.version.key} of the model {target.name} is no longer here."
            ) from error

    def hold(self, target: Target) -> Hold:
        """A claim on the image of the target's version, leased at once if it is on disk. Ends with release()."""
        version = target.version
        hold = Hold(version, target.is_exact, target.asked_s)
        if version is None:
            return hold
        self.usage.used(version.name)
        if (ref := self._store.lookup(version.key)) is not None:
            self._lease(hold, ref)
            if not target.is_exact:
                self.pins.follow(ref, target.asked_s)
        return hold

    async def compile(self, version: SourceVersion) -> AdapterRef:
        """Bring an image to disk without a request for it. Raises AdapterError."""
        try:
            ref = await self._store.ensure(version)
        except AdapterError as error:
            self.usage.failed(version.name, error.message)
            raise
        self.usage.succeeded(version.name)
        self._used(ref)
        return ref

    def fetch(self, hold: Hold) -> None:
        """Bring a pending claim's image to disk and tell the engine. Call it in the turn that sends the request."""
        key = hold.pending
        if key is None or hold.version is None:
            return
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = _Fetch(hold.version, hold.is_exact, hold.asked_s)
            fetch.task = asyncio.create_task(self._run(key, fetch), name=f"fetch {hold.version.name}")
        fetch.holds.add(hold)
        fetch.asked_s = max(fetch.asked_s, hold.asked_s)

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
            ref = await self._bring(fetch)
            for hold in fetch.holds:
                self._lease(hold, ref)
                hold.phases = _phases(self._store.phases(fetch.version.key))
            if not fetch.is_exact or self.pins.keeps(ref):
                self.pins.renew(ref, fetch.asked_s)
            self._engine.adapter_ready(key, ref)
        except AdapterError as error:
            self._engine.adapter_failed(key, error.http_status, error.code, error.message)
        except Exception:  # a defect of ours; without an answer the requests would wait for ever
            logger.exception("fetching %s failed", fetch.version.name)
            self.usage.failed(fetch.version.name, "The server failed to load this adapter.")
            self._engine.adapter_failed(key, 500, "internal_error", "The server failed to load this adapter.")
        finally:
            del self._fetches[key]

    async def _bring(self, fetch: _Fetch) -> AdapterRef:
        """The image of the fetch's version; of a newer one only for who didn't ask for exactly that."""
        if not fetch.is_exact:
            return await self.compile(fetch.version)
        ref = await self._store.ensure(fetch.version)
        if ref.version != fetch.version.key:
            raise VersionNotFound(
                f"Version {fetch.version.key} of the model {fetch.version.name} is no longer here: it was replaced."
            )
        return ref

    def user_of(self, image_key: str) -> str | None:
        """The name that asked for this image last."""
        return self._users.get(image_key)

    def _lease(self, hold: Hold, ref: AdapterRef) -> None:
        self._store.lease(ref)
        hold.ref = ref
        self._used(ref)

    def _used(self, ref: AdapterRef) -> None:
        self._users[ref.image_key] = ref.name
        self._users.move_to_end(ref.image_key)
        if len(self._users) > MAX_USERS:
            self._users.popitem(last=False)


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    """The store's phases under the names that a request's phases have; its queue is the compiler's."""
    names = {"raw_queue": "raw_queue_s", "fetch": "fetch_s", "queue": "compile_queue_s", "compile": "compile_s"}
    return {name: seconds[phase] for phase, name in names.items() if phase in seconds}
