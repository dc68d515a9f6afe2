"""How many processors there are for this process."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus() -> int:
    """Processors this process may use: its affinity, bounded by the cgroup's CPU quota (at least 1)."""
    cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def _cgroup_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    try:
        limit, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else float(limit) / float(period)
