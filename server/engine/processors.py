"""Each thread of the kernels' team on a processor of its own.

The threads of a team wait for each other many times in a step. One that is woken comes to the processor of who woke
it when the rest of the machine is busy, and then two take turns on one processor while some other work, of less
priority, has the other one.
"""

from __future__ import annotations

import os
from ctypes import POINTER, c_int32, c_int64

import torch

from kernels.cpu import library


def bind_team() -> bool:
    """Bind the calling thread and those that run kernels with it; whether they are.

    Only where there are as many processors as threads: else the system chooses better than we would. Threads that
    the calling thread starts later are bound as it is, so this is for when all have been started.
    """
    cpus = sorted(os.sched_getaffinity(0))
    native = library()
    if native is None or len(cpus) == 1 or torch.get_num_threads() != len(cpus):
        return False
    bind = native.function("ml_bind_team", POINTER(c_int32), c_int64)
    if bind((c_int32 * len(cpus))(*cpus), len(cpus)) == 0:
        return True
    os.sched_setaffinity(0, cpus)
    return False
