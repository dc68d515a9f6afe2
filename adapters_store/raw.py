"""Files of remote adapters on disk, as fetched: what a compiler that changed or a lost image needs no network for.

    cache_dir/raw/<version key>/               the files of one SourceVersion
    cache_dir/raw/<version key>/record.json    the SourceVersion, and the sha256 of each file

An entry is written beside, under a name of its own, and renamed when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path

import msgspec

from adapters_store.disk_threads import submit_raw
from adapters_store.errors import AdapterTooLarge, AdapterUnavailable, RawDamaged
from adapters_store.lru import STALE_TEMPORARY_S, LeasedLru, Resident, lock_folder
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources.folder import CONFIG_FILE, READ_FILES, TEMPLATE_FILES
from adapters_store.versions import VersionBook

log = logging.getLogger(__name__)

RECORD_FILE = "record.json"


class RawRecord(msgspec.Struct, frozen=True):
    """What an entry holds."""

    version: SourceVersion
    sha256: dict[str, str]
    """of each file, hexadecimal"""


class RawFolder:
    """One entry, read as the compiler reads a local source's folder. Blocking; RawDamaged when it is not whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def again(self, version: SourceVersion) -> SourceVersion:
        """`version` itself: files as fetched don't change. RawDamaged when the entry is not of it."""
        if self._record(version).version != version:
            raise self._damaged(version.name, RECORD_FILE)
        return version

    def read(self, version: SourceVersion, file: FileVersion) -> memoryview:
        """All bytes of `file`; whether they are those that were fetched is for `check` to say."""
        try:
            content = (self._folder / file.name).read_bytes()
        except OSError as error:
            raise self._damaged(version.name, file.name) from error
        if len(content) != file.size:
            raise self._damaged(version.name, file.name)
        return memoryview(content)

    def noted(self, version: SourceVersion) -> dict[str, str]:
        """The sha256 of each file as it was fetched, by name."""
        return self._record(version).sha256

    def check(self, version: SourceVersion, sha256: Mapping[str, str]) -> None:
        """RawDamaged when one of these files, read as having that sha256, is not what was fetched."""
        fetched = self._record(version).sha256
        for name, found in sha256.items():
            if fetched.get(name) != found:
                raise self._damaged(version.name, name)

    def _record(self, version: SourceVersion) -> RawRecord:
        try:
            return msgspec.json.decode((self._folder / RECORD_FILE).read_bytes(), type=RawRecord)
        except (OSError, msgspec.MsgspecError) as error:
            raise self._damaged(version.name, RECORD_FILE) from error

    def _damaged(self, adapter: str, file: str) -> RawDamaged:
        return RawDamaged(f"{file} of adapter {adapter} is not on disk as it was fetched ({self._folder.name})")


class RawFiles:
    """Owner of the raw tier's folder. Not thread-safe: one thread (the event loop's) calls it.

    Quota, leases and grace are as in LeasedLru. Without a quota processes may share the folder.
    """

    def __init__(
        self,
        cache_dir: Path,
        quota_bytes: int | None = None,
        *,
        grace_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._dir = cache_dir.absolute() / "raw"
        for folder in (self._dir.parent, self._dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clock = clock
        self._quota_bytes = quota_bytes
        self._removals: set[Future[None]] = set()
        self._lock: int | None = lock_folder(self._dir, exclusive=quota_bytes is not None)
        self._lru: LeasedLru[Resident] = LeasedLru(
            quota_bytes, path_of=self.folder_of, drop=self.discard, grace_s=grace_s, clock=clock
        )
        self._versions = VersionBook()
        self._sweep_temporaries(are_ours=quota_bytes is not None)
        self._load()
        self._lru.evict()  # the quota may be another one than before

    @property
    def bytes_used(self) -> int:
        """Bytes of all files."""
        return self._lru.bytes_used

    @property
    def num_entries(self) -> int:
        """SourceVersions whose files are here."""
        return len(self._lru.residents)

    @property
    def num_leases(self) -> int:
        """Leases held on all entries."""
        return self._lru.leases.total()

    @property
    def evictions(self) -> int:
        """Entries that went for the quota, since start."""
        return self._lru.evictions

    def folder_of(self, version_key: str) -> Path:
        """Where the files of this version are, or would be."""
        return self._dir / version_key

    def find(self, version: SourceVersion) -> bool:
        """Whether the files are here, each with its size; who reads them verifies their content."""
        key = version.key
        if key not in self._lru.residents:
            return False
        if not _has_sizes(self.folder_of(key), version):
            log.warning("the fetched files of %s are damaged or gone: dropped", version.name)
            self.discard(key)
            return False
        self._lru.touch(key)
        return True

    def peek(self, version_key: str) -> bool:
        """What `find` would look for, without looking and without counting as a use."""
        return version_key in self._lru.residents

    def versions_of(self, name: str) -> list[tuple[str, SourceVersion]]:
        """The SourceVersions of `name` whose files are here, with their keys, the latest first."""
        return self._versions.of(name)

    def check_quota(self, version: SourceVersion) -> None:
        """AdapterTooLarge for a version that is over the quota all alone. A quota of 0 is none: nothing is kept."""
        num_bytes = _bytes_of(version)
        if self._quota_bytes and num_bytes > self._quota_bytes:
            raise AdapterTooLarge(
                f"adapter {version.name} has {num_bytes} bytes; the quota of this server for fetched files is "
                f"{self._quota_bytes}"
            )

    def new_folder(self) -> Path:
        """An empty folder to fetch into, for `adopt` or `abandon`. OSError when the disk refuses."""
        folder = self._dir / f".{uuid.uuid4().hex}.tmp"
        folder.mkdir(mode=0o700)
        return folder

    def adopt(self, version: SourceVersion, folder: Path, sha256: dict[str, str]) -> None:
        """Take in a folder that `hash_files` found whole, make room for it. OSError when the disk refuses."""
        (folder / RECORD_FILE).write_bytes(msgspec.json.encode(RawRecord(version, sha256)))
        key = version.key
        try:
            folder.rename(self.folder_of(key))
        except OSError:
            if _has_sizes(self.folder_of(key), version):  # another process brought the same version meanwhile
                self.abandon(folder)
            else:  # or it left a damaged one
                self.discard(key)
                folder.rename(self.folder_of(key))
        self._put(version, key, 0.0)
        self._lru.touch(key)
        self._lru.evict()

    def abandon(self, folder: Path) -> None:
        """Remove a folder of `new_folder` that came to nothing."""
        self._remove(folder)

    def lease(self, version_key: str) -> bool:
        """Keep an entry until `release`; whether it is there."""
        return self._lru.lease(version_key)

    def release(self, version_key: str) -> None:
        """Give back one lease."""
        self._lru.release(version_key)

    def discard(self, version_key: str) -> None:
        """Forget an entry and delete it, leased or not."""
        self._lru.pop(version_key)
        self._versions.discard(version_key)
        # out of the way by one rename: whoever looks meanwhile finds all of it or nothing
        gone = self._dir / f".{uuid.uuid4().hex}.tmp"
        try:
            self.folder_of(version_key).rename(gone)
        except FileNotFoundError:
            pass
        except OSError as error:  # a disk that has become read-only: the entry is not used all the same
            log.warning("raw entry %s can't be deleted: %s", version_key, error)
        else:
            self._remove(gone)

    def _put(self, version: SourceVersion, key: str, used_at: float) -> None:
        self._lru.put(key, Resident(_bytes_of(version), used_at))
        if any(file.name == CONFIG_FILE for file in version.files):  # not a chat template's files alone
            self._versions.add(version)

    def _remove(self, folder: Path) -> None:
        """Delete a folder that is out of the way. It may have gigabytes: an event loop does not wait for that."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            _delete(folder)
            return
        removal = submit_raw(_delete, folder)
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)

    def close(self) -> None:
        """Wait for what is being deleted and let another process have the folder. Closing twice is fine."""
        self._lru.close()
        wait(tuple(self._removals))
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- the folder at start ---

    def _sweep_temporaries(self, *, are_ours: bool) -> None:
        """Delete what a crash left half-written; not what another process may be writing now."""
        for path in self._dir.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if are_ours or self._clock() - path.stat().st_mtime > STALE_TEMPORARY_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _load(self) -> None:
        for folder in self._dir.iterdir():
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                used_at = folder.stat().st_mtime
                record = msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=RawRecord)
                is_whole = record.version.key == folder.name and _has_sizes(folder, record.version)
            except (OSError, msgspec.MsgspecError):
                is_whole = False
            if is_whole:
                self._put(record.version, folder.name, used_at)
            else:
                log.warning("raw entry %s is damaged: dropped", folder.name)
                self.discard(folder.name)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def fetched_files(version: SourceVersion) -> list[FileVersion]:
    """The files of a version that are fetched: what the compiler and the templates read, never the pickle."""
    return [file for file in version.files if file.name in READ_FILES or file.name in TEMPLATE_FILES]


def hash_files(version: SourceVersion, folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The sha256 of each fetched file, by name. Blocking; AdapterUnavailable when one is not there with its size.

    `known`: of those that were hashed as they came.
    """
    sha256 = dict(known or {})
    for file in fetched_files(version):
        with (folder / file.name).open("rb") as content:
            if os.fstat(content.fileno()).st_size != file.size:
                raise AdapterUnavailable(f"{file.name} of adapter {version.name} was not fetched whole; try again")
            if file.name not in sha256:
                sha256[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return sha256


def _bytes_of(version: SourceVersion) -> int:
    return sum(file.size for file in fetched_files(version))


def _has_sizes(folder: Path, version: SourceVersion) -> bool:
    """Whether the entry is there, each file with the size that was noted."""
    files = fetched_files(version)
    try:
        return (folder / RECORD_FILE).is_file() and all(
            (folder / file.name).stat().st_size == file.size for file in files
        )
    except OSError:
        return False
