"""The CPU's stand-in for a GPU (csrc/emulated.h): what a GPU would not forgive, it tells."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest

from kernels.cpu.build import find_compiler
from kernels.cuda import build
from tests.kernels.emulated_cuda import SMALL

PROBE = """
#include "device.h"

namespace ml {
namespace {

struct Args {
    int what;
    uint16_t* memory;  // 64 numbers
    float* out;        // [clusters, blocks, threads]
};

struct Shared {
    Pair pairs[2];
};

ML_KERNEL(64, 1) probe(const Args args) {
    ML_SHARED(Shared, shared);
    const int thread = thread_of_block(), block = rank_in_cluster<2>();
    float* out = args.out + (cluster_of_grid<2>() * 2 + block) * 64 + thread;
    switch (args.what) {
        case 0:  // right: each block reads what the other wrote
            if (thread == 3) shared.pairs[0] = {float(block), 0.5f};
            cluster_arrive();
            cluster_wait();
            *out = load_from(&shared.pairs[0], 1 - block).first;
            cluster_arrive();
            cluster_wait();
            break;
        case 1:
            if (thread < 32) block_wait();
            else
                block_wait();
            break;
        case 2:
            if (thread != 7) block_wait();
            break;
        case 3:
            load(reinterpret_cast<const Words<4>*>(args.memory + 4));
            break;
        case 4:
            cluster_arrive();
            cluster_arrive();
            break;
        case 5:
            cluster_wait();
            break;
        case 6:  // nobody writes it
            *out = shared.pairs[1].second;
            break;
        case 7: {  // half a warp
            float sums[4] = {};
            const uint32_t a[4] = {}, b[2] = {};
            if (thread % 32 < 16) multiply<Bf16>(sums, a, b);
            break;
        }
        case 8:
            store(args.memory + thread, uint16_t(1));
            break;
        case 9:  // [16, 16] of 1 x [16, 8] of 2
            float sums[4] = {0, 0, 0, 1};
            const uint32_t one = pack<Fp16>(1, 1), two = pack<Fp16>(2, 2);
            const uint32_t a[4] = {one, one, one, one}, b[2] = {two, two};
            multiply<Fp16>(sums, a, b);
            *out = sums[thread % 4];
            break;
    }
}

}  // namespace
}  // namespace ml

extern "C" int ml_probe(int what, uint16_t* memory, float* out, int clusters) {
    return ml::launch(ml::probe, ml::Args{what, memory, out}, clusters, 2, 64, false, nullptr);
}
extern "C" const char* ml_probe_error() { return ml::error_text(0); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    for name in ("device.h", "emulated.h"):
        shutil.copy(build.SOURCES / name, folder)
    (folder / "probe.cu").write_text(PROBE)
    return build.load_emulated(find_compiler(), *SMALL, cache=folder, sources=folder)


@pytest.fixture
def probe(library):
    """(what, clusters) -> the error or "", and what the threads left."""
    run = library.function("ml_probe", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    error = library.function("ml_probe_error", result=ctypes.c_char_p)
    memory = np.zeros(128, np.uint16)
    first = -memory.ctypes.data % 16 // 2

    def call(what: int, clusters: int = 1) -> tuple[str, np.ndarray]:
        out = np.full((clusters, 2, 64), -1, np.float32)
        status = run(what, memory[first:].ctypes.data, out.ctypes.data, clusters)
        told = error().decode()
        assert bool(status) == bool(told)
        return told, out

    call.memory = memory[first : first + 64]
    return call


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (1, "threads wait at different barriers: lines"),
        (2, "threads have ended that others wait for: block 0, thread 0 waits at line"),
        (3, "an address that is no multiple of 16"),
        (4, "a thread arrives twice and has not waited between"),
        (5, "a thread waits for a cluster at which it has not arrived"),
        (7, "threads have ended that others wait for"),
    ],
)
def test_a_mistake_is_told_of_and_the_next_launch_is_right(probe, what, told):
    assert told in probe(what)[0]
    error, out = probe(0)
    assert not error and (out[0] == [[1], [0]]).all()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_blocks_read_each_others_memory_in_any_order(probe, library, order):
    set_order = library.function("ml_emulated_order", ctypes.c_int, result=None)
    set_order(order)
    error, out = probe(0, clusters=3)
    set_order(0)
    assert not error and (out == [[1], [0]]).all()


def test_shared_memory_that_nobody_wrote_is_nan_in_every_cluster(probe):
    error, out = probe(6, clusters=2)
    assert not error and np.isnan(out).all()


def test_memory_outside_of_what_is_allowed_is_told_of(probe, library):
    allow = library.function("ml_emulated_allow", ctypes.c_void_p, ctypes.c_int64, result=None)
    allow_all = library.function("ml_emulated_allow_all", result=None)
    assert probe(8)[0] == "" and probe.memory.all()
    for count, told in ((64, ""), (63, "memory outside of what is allowed: 2 bytes (block 0, thread 63)")):
        allow(probe.memory.ctypes.data, 2 * count)
        assert probe(8)[0] == told
        allow_all()


def test_a_product_of_a_warp(probe):
    error, out = probe(9)
    assert not error and (out.reshape(-1, 4) == [32, 32, 32, 33]).all()
