"""Names that were given a folder by hand, on the command line or at run time, whatever the folder is called."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapters_store.errors import AdapterNotFound
from adapters_store.ref import SourceVersion, is_adapter_name
from adapters_store.sources.folder import note_files, real_path_below
from adapters_store.sources.local import LocalSource
from adapters_store.tensorfile import shown


class PathRefused(Exception):
    """A path that a client may not have served: outside the roots, by itself or through a symlink."""


class NamedSource:
    """A table from name to folder. Each entry keeps the root that its files may not leave.

    Entries change by one assignment, so a resolve in another thread sees the old folder or the new one.
    """

    source = "names given by hand"

    def __init__(self, roots: Iterable[Path] = ()) -> None:
        """`roots`: the folders below which a path given at run time must lie, as LocalSource has them."""
        self._roots = tuple(LocalSource(root) for root in roots)
        self._entries: dict[str, SourceVersion] = {}
        self.misnamed: list[str] = []  # a given name fits the grammar

    def look(self, name: str, path: str) -> SourceVersion:
        """What `name` would point to with `path`: absolute, or relative to a root. Nothing is changed.

        Raises PathRefused for a path outside the roots, whether or not there is anything, and AdapterNotFound.
        """
        roots = [source for source in self._roots if _is_below(source, path)]
        if not roots:
            raise PathRefused(f"{shown(path)} is not below the folders of --adapters")
        for source in roots:
            folder = source.root / path
            files = note_files(source.real_root, folder)
            if files is not None:
                return SourceVersion(source.source, name, str(folder), files)
        raise AdapterNotFound(
            f"No adapter found at {shown(path)}: no adapter_config.json there, or links that leave it."
        )

    def look_anywhere(self, name: str, path: Path) -> SourceVersion:
        """The same for a folder that the operator chose: it is its own root. Raises AdapterNotFound."""
        source = LocalSource(path)
        files = note_files(source.real_root, source.root)
        if files is None:
            raise AdapterNotFound(f"No adapter found at {path}: no adapter_config.json there, or links that leave it.")
        return SourceVersion(source.source, name, str(source.root), files)

    def assign(self, version: SourceVersion) -> None:
        """From now on `version.name` is what is at `version.path`."""
        assert is_adapter_name(version.name), version.name
        self._entries[version.name] = version

    def remove(self, name: str) -> bool:
        """Forget a name; whether it was there."""
        return self._entries.pop(name, None) is not None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def resolve(self, name: str) -> SourceVersion | None:
        """What `name` points to now: its folder's files are looked at anew."""
        entry = self._entries.get(name)
        return None if entry is None else LocalSource(Path(entry.source)).again(entry)

    def names(self) -> list[str]:
        """All names given, sorted."""
        return sorted(self._entries)


def _is_below(source: LocalSource, path: str) -> bool:
    """Whether `path` leads below the source's root, all symlinks followed; a path that can't be one does not."""
    try:
        return real_path_below(source.real_root, source.root / path) is not None
    except ValueError:  # a NUL, or a surrogate that no file name has
        return False
