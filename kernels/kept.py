"""Which built libraries stay in the cache folder: those that were opened in the last 30 days.

Another process may want any of them, of other sources, flags or compilers. One that is open outlives its file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

KEPT_S = 30 * 86_400.0
LEFT_S = 86_400.0
"""a folder of a build, which is deleted at its end: older ones are of one that was killed"""
MAX_GONE = 64  # libraries of one sweep


def note_use(library: Path, now: float | None = None) -> None:
    """Note that a library is in use. A cache that can't be written has no sweeps either."""
    now = time.time() if now is None else now
    with contextlib.suppress(OSError):
        os.utime(library, (now, now))


def sweep(cache: Path, now: float | None = None) -> int:
    """Delete libraries that nobody opened for KEPT_S seconds, and what killed builds left; how many libraries went."""
    now = time.time() if now is None else now
    for folder in cache.glob("build-*"):
        if _age_s(folder, now) > LEFT_S:
            shutil.rmtree(folder, ignore_errors=True)
    old = [path for path in cache.glob("*.so") if _age_s(path, now) > KEPT_S][:MAX_GONE]
    for path in old:
        for file in (path.with_suffix(".sha256"), path, path.with_suffix(".lock")):
            with contextlib.suppress(OSError):
                file.unlink()
    return len(old)


def _age_s(path: Path, now: float) -> float:
    """Seconds since it was written or noted; 0 for what has just gone."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0
