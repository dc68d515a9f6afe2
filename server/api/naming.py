"""Giving and taking adapters' names, and how each is kept: pins, weights. One change per name at a time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterError, AdapterNotFound
from adapters_store.ref import AdapterRef, SourceVersion, is_adapter_name
from adapters_store.sources.named import PathRefused
from adapters_store.store import AdapterStore
from server.api.adapter_bodies import AdapterEntry
from server.api.errors import shown
from server.api.supply import AdapterSupply
from server.engine.client import Engine
from server.errors import BadRequest, Conflict, EngineDead, ServerError

MAX_FAILURES = 4096  # changes remembered that came to nothing; the oldest go first
TAKEN = "adapter_exists"  # the code of a Conflict of names

Giver = Literal["hand", "file"]


@dataclass(frozen=True, slots=True)
class FailedChange:
    """A change that nobody waited for, and why it came to nothing."""

    message: str
    time_s: float  # time.time()


class AdapterNames:
    """Who has which name, and how it is kept. Requests always see the old or the new, never a half.

    A name is given by hand (a route, --lora-modules), by --adapters-file, or has what a source has under it. What
    one gave the other does not touch.
    """

    def __init__(
        self, engine: Engine, catalog: Catalog, store: AdapterStore, base_names: tuple[str, ...], supply: AdapterSupply
    ) -> None:
        self.failed: OrderedDict[str, FailedChange] = OrderedDict()
        """changes that came to nothing and that nobody waited for, by name"""
        self._engine = engine
        self._catalog = catalog
        self._store = store
        self.base_names = base_names
        self._supply = supply
        self._weights: dict[str, float] = {}
        self._of_file: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # --- what is asked ---

    def weight_of(self, name: str) -> float:
        """The name's share when several adapters have work; 1 is everyone's."""
        return self._weights.get(name, 1.0)

    def giver_of(self, name: str) -> Giver | None:
        """Who gave the name; None when it is what a source has under it."""
        return "file" if name in self._of_file else "hand" if self._catalog.is_given(name) else None

    @property
    def changing(self) -> set[str]:
        """Names of which a change is under way."""
        return {name for name, lock in self._locks.items() if lock.locked()}

    def is_changing(self, name: str) -> bool:
        """Whether a change of the name is under way."""
        lock = self._locks.get(name)
        return lock is not None and lock.locked()

    def note_failure(self, name: str, message: str) -> None:
        """Remember, until the name is given or taken, why it could not be."""
        self.failed[name] = FailedChange(message, time.time())
        self.failed.move_to_end(name)
        if len(self.failed) > MAX_FAILURES:
            self.failed.popitem(last=False)

    # --- changes ---

    async def give(
        self,
        entry: AdapterEntry,
        *,
        by: Giver = "hand",
        replaces: bool,
        compiles: bool,
        on_looked: Callable[[], None] = lambda: None,
    ) -> SourceVersion:
        """Let `entry.name` be what the entry says: its path, its source, or without either what it is anyway.

        With `compiles` (or a pin) nothing changes before the adapter is compiled, so a failed replacement leaves
        the old one serving. `on_looked` is called when the adapter was found and may have the name.
        Raises BadRequest with "name", "path" or "source" in `param`, Conflict, EngineDead, AdapterError.
        """
        name = entry.name
        self.check_name(name)
        self._check_engine()
        async with self._lock(name):
            self._check_giver(name, by)
            version = await self._look(entry)
            is_new = entry.path is not None or entry.source is not None
            if is_new and not replaces and await self._is_taken(version):
                raise Conflict(
                    f"There is an adapter '{name}' already; set 'replace' to true to replace it.",
                    param="name",
                    code=TAKEN,
                )
            on_looked()
            ref = await self._supply.compile(version) if compiles or entry.pin else None
            if entry.pin and ref is not None:
                self._pin(ref)
            # nothing that waits from here on
            if is_new:
                self._catalog.assign(version)
            if entry.pin is False:
                self._supply.pins.remove(name)
            elif ref is not None:
                self._supply.pins.follow(ref)
            if entry.weight is not None:
                self._set_weight(name, entry.weight)
            if by == "file":
                self._of_file.add(name)
            self.failed.pop(name, None)
            return version

    async def take(self, name: str) -> None:
        """Take the name away, wherever the adapter came from; requests that run go on.

        Raises AdapterNotFound, Conflict.
        """
        if not is_adapter_name(name):
            raise AdapterNotFound(f"The model '{shown(name)}' does not exist.")
        async with self._lock(name):
            self._check_giver(name, "hand")
            self.failed.pop(name, None)
            is_given = self._catalog.is_given(name)  # then it can be taken while its source can't be asked
            version = await (self._given(name) if is_given else self._find(name))
            if version is None and not is_given:
                raise AdapterNotFound(f"The model '{shown(name)}' does not exist.")
            self._catalog.remove(name)
            self._let_go(name, version)

    async def release(self, name: str) -> None:
        """End what --adapters-file said of a name: it is what the sources have under it, or nothing."""
        async with self._lock(name):
            self.failed.pop(name, None)
            if name not in self._of_file:
                return
            self._of_file.discard(name)
            version = await self._given(name)
            self._catalog.release(name)
            self._let_go(name, version)

    async def pin(self, name: str) -> AdapterRef:
        """Compile the adapter and keep it on the device from when there is room. Raises AdapterError, Conflict."""
        self._check_engine()
        async with self._lock(name):
            self._check_giver(name, "hand")
            ref = await self._supply.compile(await self._catalog.resolve(name))
            self._pin(ref)
            return ref

    async def unpin(self, name: str) -> None:
        """End a pin; a name without one stays as it is. Raises AdapterNotFound, Conflict."""
        async with self._lock(name):
            self._check_giver(name, "hand")
            if name not in self._supply.pins:
                await self._catalog.resolve(name)
            self._supply.pins.remove(name)

    async def reload(self, name: str) -> None:
        """Ask the source now and compile what it has; then new requests get that. Raises AdapterError."""
        self._check_engine()
        brought: list[AdapterRef] = []

        async def bring(version: SourceVersion) -> None:
            self._store.retry(version)
            brought.append(await self._supply.compile(version))

        async with self._lock(name):
            await self._catalog.reload(name, bring)
            for ref in brought:
                self._supply.pins.follow(ref)

    async def compile(self, name: str) -> AdapterRef:
        """Bring what the name is now to disk. Raises AdapterError."""
        return await self._supply.compile(await self._catalog.resolve(name))

    # --- parts ---

    def check_name(self, name: str) -> None:
        """Raises BadRequest if no adapter can be called so."""
        if name in self.base_names:
            raise BadRequest(f"The name '{name}' is the base model's.", param="name")
        if not is_adapter_name(name):
            raise BadRequest(
                f"'{shown(name)}' can't be an adapter's name: parts of letters, digits, '.', '_' and '-' joined by "
                "'/', at most 128 bytes.",
                param="name",
            )

    async def look_below(self, name: str, path: str) -> SourceVersion:
        """The adapter at a path below --adapters. Raises BadRequest, AdapterNotFound."""
        try:
            return await asyncio.to_thread(self._catalog.named.look, name, path)
        except PathRefused as error:
            raise BadRequest(str(error), param="path") from error

    def _check_engine(self) -> None:
        if not self._engine.is_alive:
            raise EngineDead("The engine has stopped; the server is going down.")

    def _check_giver(self, name: str, by: Giver) -> None:
        """Raises Conflict if the name was given by the other: by hand where `by` is the file, or the reverse."""
        giver = self.giver_of(name)
        if by == "hand" and giver == "file":
            raise Conflict(f"The adapter '{name}' is kept by --adapters-file: change it there.", param="name")
        if by == "file" and giver == "hand":
            raise Conflict(f"The name '{name}' was given by hand: it is left as it is.", param="name")

    async def _look(self, entry: AdapterEntry) -> SourceVersion:
        if entry.path is not None and entry.source is not None:
            raise BadRequest("Send 'path' or 'source', not both.", param="source")
        if entry.path is not None:
            return await self.look_below(entry.name, entry.path)
        if entry.source is None:
            return await self._catalog.resolve(entry.name)
        try:
            return await self._catalog.look_at(entry.name, entry.source)
        except ValueError as error:
            raise BadRequest(str(error), param="source") from error

    async def _find(self, name: str) -> SourceVersion | None:
        try:
            return await self._catalog.resolve(name)
        except AdapterNotFound:
            return None

    async def _given(self, name: str) -> SourceVersion | None:
        """What a given name points to; None when it is not given, or its source can't be asked."""
        try:
            return await self._catalog.resolve(name) if self._catalog.is_given(name) else None
        except AdapterError:
            return None

    async def _is_taken(self, version: SourceVersion) -> bool:
        """Whether the name was given before, or a source has another adapter under it."""
        if self._catalog.is_given(version.name):
            return True
        found = await self._find(version.name)
        return found is not None and found.files != version.files

    def _pin(self, ref: AdapterRef) -> None:
        self._supply.pins.check(ref)
        self._engine.residents.forget_failure(ref.image_key)  # it is loaded anew
        self._supply.pins.add(ref)

    def _let_go(self, name: str, version: SourceVersion | None) -> None:
        """What belonged to a name that has gone: its pin, its weight, its image on the device."""
        pins = self._supply.pins
        pins.remove(name)
        self._set_weight(name, 1.0)
        self.failed.pop(name, None)
        ref = None if version is None else self._store.peek(version.key)
        if ref is not None and not pins.holds(ref.image_key):
            self._engine.drop_adapter(ref.image_key)

    def _set_weight(self, name: str, weight: float) -> None:
        if weight != self.weight_of(name):
            self._engine.set_weight(name, weight)
        self._weights[name] = weight
        if weight == 1.0:
            del self._weights[name]

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock


def message_of(error: Exception) -> str:
    """Why a change came to nothing, for who looks later."""
    return error.message if isinstance(error, AdapterError | ServerError) else "The server failed to do it."
