"""Memory of the arena is there before a load needs it, and keeps what was written."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import numpy.typing as npt

from kernels.memory import lazy_zeros, populate
from server.adapters.ahead import HEADROOM_BYTES, TouchAhead

PAGE = 4096
MIB = 1 << 20


def resident(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Of each page whether it is in memory."""
    pages = np.zeros(-(-len(memory) // PAGE), dtype=np.uint8)
    mincore = ctypes.CDLL(None).mincore
    assert (
        mincore(
            ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(len(memory)), pages.ctypes.data_as(ctypes.c_void_p)
        )
        == 0
    )
    return (pages & 1).astype(bool)


def wait_for(ahead: TouchAhead, num_bytes: int) -> None:
    deadline = time.monotonic() + 60
    while ahead.touched_bytes < num_bytes:
        assert time.monotonic() < deadline, f"{ahead.touched_bytes} bytes were touched"
        time.sleep(0.002)


def test_an_eighth_is_there_at_once_and_as_much_beyond_what_is_used() -> None:
    memory = lazy_zeros(64 * MIB).numpy()
    assert not resident(memory).any()
    ahead = TouchAhead(memory)
    wait_for(ahead, 8 * MIB)
    assert resident(memory[: 8 * MIB]).all() and not resident(memory[16 * MIB :]).any()
    ahead.use(21 * MIB)
    wait_for(ahead, 29 * MIB)
    assert resident(memory[: 29 * MIB]).all() and not resident(memory[40 * MIB :]).any()
    ahead.use(2 * MIB)
    ahead.use(64 * MIB)
    wait_for(ahead, 64 * MIB)
    assert resident(memory).all() and not memory.any()
    ahead.close()


def test_contents_stay() -> None:
    memory = lazy_zeros(16 * MIB).numpy()
    memory[::PAGE] = np.arange(len(memory) // PAGE) % 251
    ahead = TouchAhead(memory)
    ahead.use(16 * MIB)
    wait_for(ahead, 16 * MIB)
    assert (memory[::PAGE] == np.arange(len(memory) // PAGE) % 251).all() and memory.sum() == memory[::PAGE].sum()
    ahead.close()


def test_no_more_than_the_headroom_of_a_large_arena() -> None:
    memory = lazy_zeros(16 * HEADROOM_BYTES).numpy()
    ahead = TouchAhead(memory)
    wait_for(ahead, HEADROOM_BYTES)
    ahead.close()
    assert ahead.touched_bytes == HEADROOM_BYTES and not resident(memory[HEADROOM_BYTES + 2 * MIB :]).any()


def test_what_is_no_memory_is_refused() -> None:
    memory = lazy_zeros(MIB).numpy()
    assert populate(memory.ctypes.data, MIB)
    assert not populate(memory.ctypes.data + 1, PAGE), "not page-aligned"
