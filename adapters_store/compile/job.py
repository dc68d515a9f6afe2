"""One compile job, from a SourceVersion to an image on disk. Runs in the compiler process; blocking."""

from __future__ import annotations

import hashlib
import time
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
SETTLE_S = 2.0
"""files younger than this may still be on their way: what is wrong with them is looked at again"""


class CompileJob(msgspec.Struct, frozen=True):
    """What the compiler process is asked to do."""

    version: SourceVersion
    images_dir: str
    limits: Limits
    folder: str | None = None
    """where a remote adapter's files are, as fetched; None: the version's own folder"""


class CompileResult(msgspec.Struct, frozen=True):
    """The image that is now on disk; `ref.version` is of the files as read, maybe newer than asked for."""

    ref: AdapterRef
    is_new: bool
    """whether it was compiled now; False when these bytes had been compiled before, under whatever name"""
    fetch_s: float
    compile_s: float


class _Fetched(msgspec.Struct):
    version: SourceVersion
    files: dict[str, memoryview]
    digest: str


def run_job(job: CompileJob, manifest: BaseManifest, base: BaseWeights) -> CompileResult:
    """Read, verify and compile the adapter that `job.version` names; AdapterError says what is wrong with it.

    A set of files that changed while it was read is torn, and is read anew. So is one that is wrong but
    was written moments ago and changes meanwhile.
    """
    source = LocalSource(Path(job.version.source)) if job.folder is None else RawFolder(Path(job.folder))
    for attempt in range(ATTEMPTS):
        started = time.perf_counter()
        try:
            fetched = _fetch_once(source, job)
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
        return CompileResult(ref, is_new, fetch_s, time.perf_counter() - started - fetch_s)
    raise AdapterUnavailable(f"the files of adapter {job.version.name} keep changing while they are read; try again")


def _fetch_once(source: LocalSource | RawFolder, job: CompileJob) -> _Fetched:
    """The files as they are now; FileChanged when they are torn."""
    version = source.again(job.version)
    if version is None:
        raise AdapterNotFound(f"The model {job.version.name!r} does not exist (any more).")
    read = [file for file in version.files if file.name in READ_FILES]
    job.limits.check_files(read)
    files = {file.name: source.read(version, file) for file in read}
    if source.again(version) != version:
        raise FileChanged(job.version.name)
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if isinstance(source, RawFolder):
        source.check(version, sha256)
    if any(file.name == PICKLE_FILE for file in version.files):
        files[PICKLE_FILE] = memoryview(b"")  # its presence is known, its content is never read
    return _Fetched(version, files, digest_of(sha256))


def _compile(
    fetched: _Fetched, job: CompileJob, manifest: BaseManifest, base: BaseWeights
) -> tuple[ImageHeader, Path, bool]:
    """The image of these bytes: the one on disk when it is whole, else compiled now."""
    image_key = image_key_of(fetched.digest, manifest.digest, COMPILER_VERSION, manifest.dtype)
    path = Path(job.images_dir) / f"{image_key}{SUFFIX}"
    try:
        return read_header(path), path, False
    except (FileNotFoundError, AdapterCorrupt):
        pass
    compiled = compile_adapter(fetched.files, manifest, job.limits, base)
    header = write_image(
        path,
        compiled.sites,
        manifest,
        image_key=image_key,
        digest=fetched.digest,
        compiler_version=COMPILER_VERSION,
        warnings=(*compiled.warnings, *(f"dropped {dropped}" for dropped in compiled.dropped)),
    )
    return header, path, True


def _ref_of(fetched: _Fetched, header: ImageHeader, path: Path) -> AdapterRef:
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
