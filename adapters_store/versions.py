"""The versions of a name that are at hand, and the one that `name@VERSION` means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from adapters_store.errors import VersionAmbiguous, VersionNotFound
from adapters_store.ref import AdapterRef, SourceVersion
from adapters_store.tensorfile import shown

MIN_PREFIX_CHARS = 8
SHOWN_CHARS = 12  # of a version's key, in a message
MAX_SHOWN = 8  # versions in a message

_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX_CHARS},64}}")


def is_version_prefix(text: str) -> bool:
    """Whether `text` may stand after the @: 8 to 64 lower-case hexadecimal digits."""
    return _PREFIX.fullmatch(text) is not None


class Held(NamedTuple):
    """One version of a name that can be served without asking its source."""

    key: str
    version: SourceVersion
    ref: AdapterRef | None = None
    """its image on disk; None while only its files are there, or it is what the name points to now"""

    def matches(self, prefix: str) -> bool:
        """Whether the version's key, the digest or the image key begins with `prefix`."""
        if self.key.startswith(prefix):
            return True
        return self.ref is not None and (self.ref.digest.startswith(prefix) or self.ref.image_key.startswith(prefix))


def find_version(name: str, prefix: str, held: Sequence[Held]) -> Held:
    """The one of `held`, the current version first, then the latest, that `prefix` means.

    Versions with one image are the same adapter under any of them: the first counts. Raises VersionNotFound,
    which names what is at hand, and VersionAmbiguous.
    """
    found = [candidate for candidate in held if candidate.matches(prefix)]
    if not found:
        raise VersionNotFound(f"The model {shown(name)} has no version {shown(prefix)} here; {_told(held)}.")
    if len({_content(candidate) for candidate in found}) > 1:
        raise VersionAmbiguous(
            f"{shown(prefix)} is the beginning of {len(found)} versions of the model {shown(name)}: write more of it; "
            f"{_told(held)}."
        )
    return found[0]


def _content(held: Held) -> str:
    return held.key if held.ref is None else held.ref.image_key


def _told(held: Sequence[Held]) -> str:
    """What is at hand, in a bounded number of words."""
    told = [candidate.key[:SHOWN_CHARS] for candidate in held[:MAX_SHOWN]]
    if told:
        told[0] += " (current)"
    more = len(held) - len(told)
    return f"at hand: {', '.join(told)}" + (f" and {more} more" if more else "")


class VersionBook:
    """Which versions of each name a tier has. Two names never share a version: its key covers the name."""

    def __init__(self) -> None:
        self._by_key: dict[str, SourceVersion] = {}
        self._keys_of: dict[str, dict[str, None]] = {}  # by name, in the order they came

    def add(self, version: SourceVersion) -> None:
        """The tier has it now: it is its name's latest."""
        key = version.key
        self.discard(key)
        self._by_key[key] = version
        self._keys_of.setdefault(version.name, {})[key] = None

    def discard(self, key: str) -> None:
        """The tier has it no longer, if it had it."""
        version = self._by_key.pop(key, None)
        if version is None:
            return
        keys = self._keys_of[version.name]
        del keys[key]
        if not keys:
            del self._keys_of[version.name]

    def of(self, name: str) -> list[tuple[str, SourceVersion]]:
        """All that the tier has of `name`, the latest first, each with its key."""
        return [(key, self._by_key[key]) for key in reversed(self._keys_of.get(name, {}))]
