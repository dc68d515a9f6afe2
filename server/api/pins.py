"""Adapters that stay on the device, by name: compiled, leased on disk, loaded, never evicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adapters_store.errors import AdapterTooLarge
from adapters_store.ref import AdapterRef
from adapters_store.store import AdapterStore
from server.engine.client import Engine


class _Pinned(NamedTuple):
    """The image that a name is pinned to, and when that was what the name points to (time.monotonic())."""

    ref: AdapterRef
    as_of_s: float


class Pins:
    """The pinned names and the image of each. A name that is replaced takes its pin along to the new image.

    Each pin holds one lease. The engine is told of images, and two names may have one image. Requests that asked
    what a name is before the pin moved on do not move it back: `as_of_s` is when they asked (time.monotonic()).
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        fit_problem: Callable[[Sequence[AdapterRef]], str | None] = lambda refs: None,
    ) -> None:
        """`fit_problem`: why images can't all be on the device at once; None when they can."""
        self._fit_problem = fit_problem
        self._engine = engine
        self._store = store
        self._pinned: dict[str, _Pinned] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._pinned

    def check(self, ref: AdapterRef) -> None:
        """Raises AdapterTooLarge if the device has no room for this image beside the other names' pinned ones."""
        others = [other.ref for name, other in self._pinned.items() if name != ref.name]
        problem = self._fit_problem([*others, ref])
        if problem is not None:
            raise AdapterTooLarge(f"adapter {ref.name} can't be pinned: {problem}")

    def check_alone(self, ref: AdapterRef) -> None:
        """Raises AdapterTooLarge if the device has no room for this image even alone."""
        if (problem := self._fit_problem([ref])) is not None:
            raise AdapterTooLarge(f"adapter {ref.name} can't come to the device: {problem}")

    def add(self, ref: AdapterRef, as_of_s: float | None = None) -> None:
        """Pin `ref.name` to this image in place of the one it had; `as_of_s` None: it is what the name is now.

        Raises AdapterUnavailable when the image has just gone.
        """
        self._store.lease(ref)
        old = self._pinned.get(ref.name)
        self._pinned[ref.name] = _Pinned(ref, time.monotonic() if as_of_s is None else as_of_s)
        self._engine.pin_adapter(ref)
        if old is not None:
            self._let_go(old.ref)

    def follow(self, ref: AdapterRef, as_of_s: float | None = None) -> None:
        """The image of a request: when its name is pinned, it is the one to pin. Takes microseconds."""
        old = self._pinned.get(ref.name)
        if old is None or (as_of_s is not None and as_of_s < old.as_of_s):
            return
        if old.ref.image_key != ref.image_key:
            self.add(ref, as_of_s)
        else:
            self._pinned[ref.name] = _Pinned(old.ref, time.monotonic() if as_of_s is None else as_of_s)

    def renew(self, ref: AdapterRef, as_of_s: float) -> None:
        """The image was made anew: the engine lets go of a pin when its load fails."""
        old = self._pinned.get(ref.name)
        if old is not None and self.keeps(ref):
            self.add(ref, max(as_of_s, old.as_of_s))
        else:
            self.follow(ref, as_of_s)

    def keeps(self, ref: AdapterRef) -> bool:
        """Whether `ref.name` is pinned to this very image."""
        pinned = self._pinned.get(ref.name)
        return pinned is not None and pinned.ref.image_key == ref.image_key

    def remove(self, name: str) -> None:
        """End a pin; the image is then one as any other. Names that aren't pinned do nothing."""
        if (pinned := self._pinned.pop(name, None)) is not None:
            self._let_go(pinned.ref)

    def holds(self, image_key: str) -> bool:
        """Whether any name pins this image."""
        return any(pinned.ref.image_key == image_key for pinned in self._pinned.values())

    def _let_go(self, ref: AdapterRef) -> None:
        self._store.release(ref)
        if not self.holds(ref.image_key):
            self._engine.drop_adapter(ref.image_key)
