"""Images on disk: what was compiled, who still needs it, and what goes when the quota is reached.

    cache_dir/images/<image key>.safetensors     the images
    cache_dir/index/<scope>/<version key>.json   which image a SourceVersion became, for one base (scope)

A restart reads the index and compiles nothing. Everything is written to a temporary file and renamed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.image import read_header
from adapters_store.lru import STALE_TEMPORARY_S, LeasedLru, Resident, lock_folder
from adapters_store.ref import AdapterRef, SourceVersion
from adapters_store.versions import VersionBook

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_SAME = 8
"""Versions of one name with one image that the index keeps: files written again and again with the same content."""


class IndexEntry(msgspec.Struct, frozen=True):
    """What one file of the index says."""

    ref: AdapterRef
    version: SourceVersion | None = None
    """whose key `ref.version` is, with the name it is a version of; None: it can't be asked for by name"""


class _Resident(Resident):
    """An image file that is there."""

    versions: set[str] = msgspec.field(default_factory=set)
    """version keys whose index entries name it, MAX_SAME of one name"""
    is_checked: bool = False
    """whether its header was read since this process started"""


class DiskImages:
    """Owner of the image folder. Not thread-safe: one thread (the event loop's) calls it.

    Quota, leases and grace are as in LeasedLru. Without a quota processes may share the folder.
    """

    def __init__(
        self,
        cache_dir: Path,
        quota_bytes: int | None = None,
        *,
        scope: str = "default",
        grace_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.images_dir = cache_dir.absolute() / "images"
        self._index_dir = cache_dir.absolute() / "index" / scope
        self._clock = clock
        for folder in (self.images_dir.parent, self.images_dir, self._index_dir.parent, self._index_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(self.images_dir.parent, exclusive=quota_bytes is not None)
        self._lru: LeasedLru[_Resident] = LeasedLru(
            quota_bytes, path_of=self.image_path, drop=self.discard, grace_s=grace_s, clock=clock
        )
        self._residents = self._lru.residents
        self._refs: dict[str, AdapterRef] = {}
        self._versions = VersionBook()
        self._sweep_temporaries(are_ours=quota_bytes is not None)
        self._load_images()
        self._load_index()
        self._lru.evict()  # the quota may be another one than before

    @property
    def bytes_used(self) -> int:
        """Bytes of all image files."""
        return self._lru.bytes_used

    @property
    def num_images(self) -> int:
        """Image files."""
        return len(self._residents)

    @property
    def num_leases(self) -> int:
        """Leases held on all images."""
        return self._lru.leases.total()

    @property
    def evictions(self) -> int:
        """Images that went for the quota, since start."""
        return self._lru.evictions

    def image_path(self, image_key: str) -> Path:
        """Where the image of this key is, or would be."""
        return self.images_dir / f"{image_key}{SUFFIX}"

    def find(self, version_key: str) -> AdapterRef | None:
        """The image that this SourceVersion became, when it is still there whole.

        Whole by its size, and by its header the first time; who reads the data verifies the checksum.
        """
        ref = self._refs.get(version_key)
        if ref is None:
            return None
        if not self._is_whole(ref):
            log.warning("image %s is damaged or gone: dropped", ref.image_key)
            self.discard(ref.image_key)
            return None
        self._lru.touch(ref.image_key)
        return ref

    def peek(self, version_key: str) -> AdapterRef | None:
        """What `find` would look for, without looking and without counting as a use."""
        return self._refs.get(version_key)

    def versions_of(self, name: str) -> list[tuple[str, SourceVersion]]:
        """The SourceVersions of `name` whose images the index has, with their keys, the latest first."""
        return self._versions.of(name)

    def adopt(self, ref: AdapterRef, version: SourceVersion | None = None) -> None:
        """Take in a freshly compiled image, remember which SourceVersion it is of, make room for it."""
        num_bytes = self.image_path(ref.image_key).stat().st_size
        known = self._residents.get(ref.image_key, _Resident(0, 0.0))
        adopted = _Resident(num_bytes, known.used_at, known.versions | {ref.version}, is_checked=True)
        self._lru.put(ref.image_key, adopted)
        self._remember(IndexEntry(ref, version))
        self._write_entry(IndexEntry(ref, version))
        self._forget_same(ref)
        self._lru.touch(ref.image_key)
        self._lru.evict()

    def lease(self, image_key: str) -> None:
        """Pin an image; AdapterUnavailable when it is not there (any more)."""
        if not self._lru.lease(image_key):
            raise AdapterUnavailable("the adapter's image is no longer on disk; try again")

    def release(self, image_key: str) -> None:
        """Give back one lease."""
        self._lru.release(image_key)

    def discard(self, image_key: str) -> None:
        """Forget an image and delete it, leased or not: it was found damaged and will be compiled anew."""
        resident = self._lru.pop(image_key)
        for key in resident.versions if resident else ():
            self._forget_version(key)
        try:
            self.image_path(image_key).unlink(missing_ok=True)
        except OSError as error:  # a disk that has become read-only: the image is not used all the same
            log.warning("image %s can't be deleted: %s", image_key, error)

    def close(self) -> None:
        """Let another process have the folder. Closing twice is fine."""
        self._lru.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- the folder at start ---

    def _sweep_temporaries(self, *, are_ours: bool) -> None:
        """Delete what a crash left half-written; not what another process may be writing now."""
        for path in (*self.images_dir.glob(".*.tmp"), *self._index_dir.glob(".*.tmp")):
            with contextlib.suppress(FileNotFoundError):
                if are_ours or self._clock() - path.stat().st_mtime > STALE_TEMPORARY_S:
                    path.unlink()

    def _load_images(self) -> None:
        for path in self.images_dir.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                self._lru.put(path.name.removesuffix(SUFFIX), _Resident(status.st_size, status.st_mtime))

    def _load_index(self) -> None:
        for path in sorted(self._index_dir.glob("*.json"), key=_written_at):
            try:
                entry = msgspec.json.decode(path.read_bytes(), type=IndexEntry)
                ref, resident = entry.ref, self._residents[entry.ref.image_key]
            except (OSError, msgspec.MsgspecError, KeyError) as error:
                log.warning("index entry %s dropped: %r", path.name, error)
                path.unlink(missing_ok=True)
                continue
            # the folder may have been moved
            ref = msgspec.structs.replace(ref, image_path=str(self.image_path(ref.image_key)))
            resident.versions.add(ref.version)
            self._remember(IndexEntry(ref, entry.version))
            self._forget_same(ref)

    def _forget_same(self, ref: AdapterRef) -> None:
        """Drop the index entries of the name's oldest versions with this image, where there are too many."""
        held = (key for key, _ in self._versions.of(ref.name) if self._refs[key].image_key == ref.image_key)
        for key in list(held)[MAX_SAME:]:
            self._residents[ref.image_key].versions.discard(key)
            self._forget_version(key)

    def _forget_version(self, key: str) -> None:
        self._refs.pop(key, None)
        self._versions.discard(key)
        with contextlib.suppress(OSError):
            self._entry_path(key).unlink()

    def _remember(self, entry: IndexEntry) -> None:
        ref, version = entry.ref, entry.version
        self._refs[ref.version] = ref
        if version is not None and (version.key, version.name) == (ref.version, ref.name):
            self._versions.add(version)

    def _is_whole(self, ref: AdapterRef) -> bool:
        """Whether the image is there with the size and (looked at once) the header it was compiled with."""
        path, resident = self.image_path(ref.image_key), self._residents[ref.image_key]
        try:
            if path.stat().st_size != ref.data_offset + ref.data_bytes:
                return False
            if not resident.is_checked:
                header = read_header(path)
                found = (header.checksum, header.data_offset, header.data_bytes)
                resident.is_checked = found == (ref.checksum, ref.data_offset, ref.data_bytes)
        except (OSError, AdapterCorrupt):
            return False
        return resident.is_checked

    def _entry_path(self, version_key: str) -> Path:
        return self._index_dir / f"{version_key}.json"

    def _write_entry(self, entry: IndexEntry) -> None:
        path = self._entry_path(entry.ref.version)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(entry))
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
