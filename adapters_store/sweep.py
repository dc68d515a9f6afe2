"""What an earlier compiler left on disk: images that no server of now reads, swept when the store starts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

import msgspec

from adapters_store.disk import SUFFIX
from adapters_store.errors import AdapterCorrupt
from adapters_store.image import read_header
from adapters_store.lru import lock_folder
from adapters_store.manifest import read_manifest
from adapters_store.ref import image_key_of

log = logging.getLogger(__name__)

MANIFEST_SUFFIX = ".manifest.json"
MAX_IN_A_ROW = 64  # images of this compiler, from those used least lately on, after which no others are expected
MAX_S = 1.0  # of one start

_IMAGE = re.compile(r"[0-9a-f]{64}")


def scope_of(base_digest: str, compiler_version: int, dtype: str) -> str:
    """What an index is of: the same files become another image for another base, dtype or compiler."""
    return image_key_of("", base_digest, compiler_version, dtype)[:16]


def sweep_other_compilers(cache_dir: Path, compiler_version: int) -> int:
    """Delete images, and indexes, of compilers of another version; how many images went.

    Only while no other server has the folder: that may be one with the other compiler. Bounded in seconds, so a start
    is not held up; the next one goes on.
    """
    try:
        lock = lock_folder(cache_dir, exclusive=True, patience_s=0.0)
    except OSError:
        return 0
    try:
        _sweep_indexes(cache_dir / "index", compiler_version)
        return _sweep_images(cache_dir / "images", compiler_version)
    finally:
        os.close(lock)


def _sweep_indexes(folder: Path, compiler_version: int) -> None:
    for path in folder.glob(f"*{MANIFEST_SUFFIX}"):
        scope = path.name.removesuffix(MANIFEST_SUFFIX)
        with contextlib.suppress(OSError, msgspec.MsgspecError):  # another release's may have another form
            manifest = read_manifest(path)
            if scope == scope_of(manifest.digest, compiler_version, manifest.dtype):
                continue
        shutil.rmtree(folder / scope, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()


def _sweep_images(folder: Path, compiler_version: int) -> int:
    """The images of other versions; a file that is no image is nobody's business here."""
    deadline_s, gone, in_a_row = time.monotonic() + MAX_S, 0, 0
    for path in _least_used(folder):
        if time.monotonic() > deadline_s or in_a_row == MAX_IN_A_ROW:
            break
        with contextlib.suppress(OSError, AdapterCorrupt):
            if read_header(path).table.compiler_version == compiler_version:
                in_a_row += 1
            else:
                path.unlink()
                gone, in_a_row = gone + 1, 0
    if gone:
        log.info("%d images of another version of the compiler deleted", gone)
    return gone


def _least_used(folder: Path) -> list[Path]:
    found: list[tuple[float, Path]] = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if _IMAGE.fullmatch(path.name.removesuffix(SUFFIX)):
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]
