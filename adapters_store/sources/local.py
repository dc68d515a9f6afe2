"""A folder of adapters: every folder below it that has an adapter_config.json is an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from adapters_store.ref import FileVersion, SourceVersion, is_adapter_name
from adapters_store.sources.folder import CONFIG_FILE, note_files, read_file, real_path_below


class LocalSource:
    """The adapters below `root`, named by their path from it. Nothing outside the root is ever opened.

    A root that is itself an adapter folder is served under the folder's own name as well.
    Blocking; callers on an event loop use a thread.
    """

    def __init__(self, root: Path) -> None:
        # absolute, with its symlinks: a link that is moved to another folder must keep moving the root
        self.root = Path(os.path.normpath(root.absolute()))
        self.misnamed: list[str] = []  # adapters that the last names() met but no request can name

    @property
    def source(self) -> str:
        """The id that this source's SourceVersions carry."""
        return str(self.root)

    def resolve(self, name: str) -> SourceVersion | None:
        """What `name` points to now, or None. A symlink may lead elsewhere below the root, not out of it."""
        if not is_adapter_name(name):
            return None
        for folder in self._folders(name):
            files = note_files(self.real_root, folder)
            if files is not None:
                return SourceVersion(self.source, name, str(folder), files)
        return None

    def again(self, version: SourceVersion) -> SourceVersion | None:
        """`version` with its files as they are now; None when its folder is no adapter below the root (any more)."""
        files = note_files(self.real_root, Path(version.path))
        return None if files is None else msgspec.structs.replace(version, files=files)

    def read(self, version: SourceVersion, file: FileVersion) -> memoryview:
        """All bytes of `file` of `version`; FileChanged when the file is another one by now."""
        return read_file(self.real_root, Path(version.path), file)

    def names(self) -> list[str]:
        """The names of all adapters below the root now, sorted.

        Folders outside the name grammar are skipped (adapters among them are kept in `misnamed`), and folders
        that can't be listed.
        """
        self.misnamed = []
        found = set(self._walk(self.real_root, self.root, "", frozenset()))
        if (self.root / CONFIG_FILE).is_file() and is_adapter_name(self.root.name):
            found.add(self.root.name)
        return sorted(found)

    @property
    def real_root(self) -> Path:
        """The root now, its symlinks followed: what no file may leave."""
        return Path(os.path.realpath(self.root))

    def _folders(self, name: str) -> Iterator[Path]:
        if name == self.root.name:
            yield self.root
        yield self.root / name

    def _walk(self, root: Path, folder: Path, name: str, above: frozenset[Path]) -> Iterator[str]:
        """Adapter names at and below `folder`; `above` holds the real folders on the way: no link loops."""
        real = real_path_below(root, folder)
        if real is None or real in above:
            return
        try:
            is_adapter = (folder / CONFIG_FILE).is_file()
            below = [path.name for path in folder.iterdir() if path.is_dir()]
        except OSError:
            return
        if name and is_adapter:
            yield name
        for part in below:
            child = f"{name}/{part}" if name else part
            if not is_adapter_name(child):
                self.misnamed += [child] if (folder / part / CONFIG_FILE).is_file() else []
            else:
                yield from self._walk(root, folder / part, child, above | {real})
