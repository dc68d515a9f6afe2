"""One compile job, from a SourceVersion to an image on disk. Runs in the compiler process; blocking."""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from adapters_store.compile.base import BaseWeights
from adapters_store.compile.lower import COMPILER_VERSION, compile_adapter
from adapters_store.disk import SUFFIX
from adapters_store.errors import (
    AdapterCorrupt,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnavailable,
)
from adapters_store.image import ImageHeader, read_header, write_image
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest
from adapters_store.raw import RawFolder
from adapters_store.ref import AdapterRef, SourceVersion, digest_of, image_key_of
from adapters_store.sources.folder import PICKLE_FILE, READ_FILES, FileChanged
from adapters_store.sources.local import LocalSource

ATTEMPTS = 5
BACKOFF_S = 0.05
_HASHING = ThreadPoolExecutor(1, thread_name_prefix="hashing")
SETTLE_S = 2.0
"""files younger than this may still be on their way: what is wrong with them is looked at again"""


class CompileJob(msgspec.Struct, frozen=True, tag=True):
    """What the compiler process is asked to compile."""

    version: SourceVersion
    images_dir: str
    limits: Limits
    folder: str | None = None
    """where a remote adapter's files are, as fetched; None: the version's own folder"""
    temporary: str = msgspec.field(default_factory=lambda: f".{uuid.uuid4().hex}.tmp")
    """what the image is called while it is written: who sent the job deletes it where the compiler dies over it"""

    def delete_temporary(self) -> None:
        """Delete what a compiler that died has left of this job."""
        with contextlib.suppress(OSError):
            (Path(self.images_dir) / self.temporary).unlink()


class CompileResult(msgspec.Struct, frozen=True, tag=True):
    """The image that is now on disk; `version` is of the files as read, maybe newer than asked for."""

    ref: AdapterRef
    version: SourceVersion
    is_new: bool
    """whether it was compiled now; False when these bytes had been compiled before, under whatever name"""
    fetch_s: float
    compile_s: float


class AdapterFiles(msgspec.Struct):
    """The bytes of an adapter's files, and which version they are."""

    version: SourceVersion
    files: dict[str, memoryview]
    digest: str
    check: Callable[[], object]
    """RawDamaged when they are not what the digest is of. It waits for a thread that hashes them meanwhile: nothing
    of them is kept, and nothing that is wrong with them is said, before that"""


def run_job(job: CompileJob, manifest: BaseManifest, base: BaseWeights) -> CompileResult:
    """Read, verify and compile the adapter that `job.version` names; AdapterError says what is wrong with it.

    A set of files that changed while it was read is torn, and is read anew. So is one that is wrong but
    was written moments ago and changes meanwhile.
    """
    source = _source_of(job.version, job.folder)
    for attempt in range(ATTEMPTS):
        started = time.perf_counter()
        try:
            fetched = _fetch_once(source, job.version, job.limits)
            fetch_s = time.perf_counter() - started
            header, path, is_new = _compile(fetched, job, manifest, base)
        except FileChanged:
            time.sleep(BACKOFF_S * 2**attempt)
            continue
        except AdapterInvalid:
            if attempt + 1 < ATTEMPTS and _changes_still(source, job.version):
                continue
            raise
        ref = _ref_of(fetched, header, path)
        return CompileResult(ref, fetched.version, is_new, fetch_s, time.perf_counter() - started - fetch_s)
    raise AdapterUnavailable(f"the files of adapter {job.version.name} keep changing while they are read; try again")


def read_files_of(asked: SourceVersion, limits: Limits, folder: str | None) -> AdapterFiles:
    """The files of an adapter as they are now, of a remote one as fetched to `folder`.

    FileChanged when they are torn, AdapterNotFound when there is none any more, AdapterTooLarge before any is read.
    """
    read = _fetch_once(_source_of(asked, folder), asked, limits)
    read.check()
    return read


def _source_of(version: SourceVersion, folder: str | None) -> LocalSource | RawFolder:
    return LocalSource(Path(version.source)) if folder is None else RawFolder(Path(folder))


def _fetch_once(source: LocalSource | RawFolder, asked: SourceVersion, limits: Limits) -> AdapterFiles:
    version = source.again(asked)
    if version is None:
        raise AdapterNotFound(f"The model {asked.name!r} does not exist (any more).")
    read = [file for file in version.files if file.name in READ_FILES]
    limits.check_files(read)
    files = {file.name: source.read(version, file) for file in read}
    if source.again(version) != version:
        raise FileChanged(asked.name)
    check: Callable[[], object] = _is_sound
    if isinstance(source, RawFolder):
        noted = source.noted(version)
        sha256 = {name: noted.get(name, "") for name in files}
        check = _HASHING.submit(lambda contents: source.check(version, _sha256(contents)), files.copy()).result
    else:
        sha256 = _sha256(files)
    if any(file.name == PICKLE_FILE for file in version.files):
        files[PICKLE_FILE] = memoryview(b"")  # its presence is known, its content is never read
    return AdapterFiles(version, files, digest_of(sha256), check)


def _sha256(files: Mapping[str, memoryview]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _is_sound() -> None:
    """The check of files whose digest was taken from themselves."""


def _compile(
    fetched: AdapterFiles, job: CompileJob, manifest: BaseManifest, base: BaseWeights
) -> tuple[ImageHeader, Path, bool]:
    """The image of these bytes: the one on disk when it is whole, else compiled now."""
    image_key = image_key_of(fetched.digest, manifest.digest, COMPILER_VERSION, manifest.dtype)
    path = Path(job.images_dir) / f"{image_key}{SUFFIX}"
    try:
        header = read_header(path)
        fetched.check()
        return header, path, False
    except (FileNotFoundError, AdapterCorrupt):
        pass
    try:
        compiled = compile_adapter(fetched.files, manifest, job.limits, base)
    finally:
        fetched.check()
    header = write_image(
        path,
        compiled.sites,
        manifest,
        image_key=image_key,
        digest=fetched.digest,
        compiler_version=COMPILER_VERSION,
        warnings=(*compiled.warnings, *(f"dropped {dropped}" for dropped in compiled.dropped)),
        temporary=job.temporary,
    )
    return header, path, True


def _ref_of(fetched: AdapterFiles, header: ImageHeader, path: Path) -> AdapterRef:
    return AdapterRef(
        name=fetched.version.name,
        version=fetched.version.key,
        digest=fetched.digest,
        image_key=header.table.image_key,
        image_path=str(path),
        data_offset=header.data_offset,
        data_bytes=header.data_bytes,
        checksum=header.checksum,
        max_rank=header.max_rank,
        sites=tuple(site.site for site in header.sites),
        warnings=header.table.warnings,
    )


def _changes_still(source: LocalSource | RawFolder, version: SourceVersion) -> bool:
    """Whether the files were written moments ago and, after a short wait, are others."""
    if isinstance(source, RawFolder):
        return False
    before = source.again(version)
    if before is None or time.time() - max(file.mtime_ns for file in before.files) / 1e9 > SETTLE_S:
        return False
    time.sleep(4 * BACKOFF_S)
    return source.again(version) != before
