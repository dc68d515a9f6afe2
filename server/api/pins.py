"""Adapters that stay on the device, by name: compiled, leased on disk, loaded, never evicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapters_store.errors import AdapterTooLarge
from adapters_store.ref import AdapterRef
from adapters_store.store import AdapterStore
from server.engine.client import Engine


class Pins:
    """The pinned names and the image of each. A name that is replaced takes its pin along to the new image.

    Each pin holds one lease. The engine is told of images, and two names may have one image.
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
        self._refs: dict[str, AdapterRef] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._refs

    def check(self, ref: AdapterRef) -> None:
        """Raises AdapterTooLarge if the device has no room for this image beside the other names' pinned ones."""
        others = [other for name, other in self._refs.items() if name != ref.name]
        problem = self._fit_problem([*others, ref])
        if problem is not None:
            raise AdapterTooLarge(f"adapter {ref.name} can't be pinned: {problem}")

    def add(self, ref: AdapterRef) -> None:
        """Pin `ref.name` to this image in place of the one it had. Raises AdapterUnavailable when it has just gone."""
        self._store.lease(ref)
        old, self._refs[ref.name] = self._refs.get(ref.name), ref
        self._engine.pin_adapter(ref)
        if old is not None:
            self._let_go(old)

    def follow(self, ref: AdapterRef) -> None:
        """The image of a request: when its name is pinned, it is the one to pin. Takes microseconds."""
        old = self._refs.get(ref.name)
        if old is not None and old.image_key != ref.image_key:
            self.add(ref)

    def renew(self, ref: AdapterRef) -> None:
        """The image was made anew: the engine lets go of a pin when its load fails."""
        if ref.name in self._refs:
            self.add(ref)

    def keeps(self, ref: AdapterRef) -> bool:
        """Whether `ref.name` is pinned to this very image."""
        pinned = self._refs.get(ref.name)
        return pinned is not None and pinned.image_key == ref.image_key

    def remove(self, name: str) -> None:
        """End a pin; the image is then one as any other. Names that aren't pinned do nothing."""
        if (ref := self._refs.pop(name, None)) is not None:
            self._let_go(ref)

    def holds(self, image_key: str) -> bool:
        """Whether any name pins this image."""
        return any(ref.image_key == image_key for ref in self._refs.values())

    def _let_go(self, ref: AdapterRef) -> None:
        self._store.release(ref)
        if not self.holds(ref.image_key):
            self._engine.drop_adapter(ref.image_key)
