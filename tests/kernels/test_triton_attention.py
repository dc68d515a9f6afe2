"""Triton's attention and KV writes: interpreted, compiled for GPUs that need not be there, and on one that is."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from kernels.triton import attention, kv
from kernels.triton.metadata import SCRATCH_KEY, DeviceAttention, device_attention
from kernels.types import AttentionMetadata
from tests.kernels.builders import AttentionCase, attention_case
from tests.kernels.test_attention import CASES, bound
from tests.kernels.test_lora import name_of, same_bits

HERE = Path(__file__).parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of one program at most
HEADS = [(32, 8, 128), (14, 2, 64), (8, 4, 256), (8, 8, 80)]
PLAIN = {"sliding_window": None, "softcap": None}
FULL = {"sliding_window": 512, "softcap": 30.0}


def test_in_the_interpreter():
    """What fp64 says of every backend, and interpreted_attention.py; see there for what else the suite asks."""
    files = [HERE / "test_attention.py", HERE / "interpreted_attention.py"]
    chosen = "interpreted or triton and (fp64 or nan or no_request or write_kv or rows_of or writes_then)"
    command = [sys.executable, "-m", "pytest", *map(str, files), "-k", chosen, "--no-header", "--timeout=280"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = HERE.parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > len(CASES) + 25 and "skipped" not in done.stdout


@dataclass
class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    kernel: triton.JITFunction
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = field(default_factory=list)

    def __getitem__(self, grid):
        assert all(0 < size < 1 << 16 for size in grid[1:])
        return lambda *args, **options: self.calls.append((args, options))


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program


def compiled(kernel: triton.JITFunction, args, options, capability: int, folder: Path) -> Compiled:
    """As the first launch with these arguments would compile it."""
    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in options.items() if k not in launch}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind, key = "constexpr", None
        if not parameter.is_constexpr:
            is_free = not parameter.do_not_specialize
            kind, key = native_specialize_impl(CUDABackend, value, False, is_free, is_free)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif key:
            attributes[(index,)] = CUDABackend.parse_attr(key)
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"], made.metadata.shared)


@pytest.fixture
def recorders(monkeypatch):
    """The kernels' names in their modules, with what their launches would have been."""
    found = {}
    for module, name in ((attention, "attend_tiles"), (attention, "join_chunks"), (kv, "_write_rows")):
        found[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


def step_of(heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """q, a cache and a metadata of four decodes and a prompt of 64 rows; only shapes matter."""
    num_heads, kv_heads, head_dim = heads
    q, cache = torch.zeros(68, num_heads, head_dim, dtype=dtype), torch.zeros(4, 16, kv_heads, head_dim, dtype=dtype)
    tables, slots = np.zeros((5, 50), np.int32), torch.zeros(68, dtype=torch.int64)
    return q, cache, AttentionMetadata(4, [0, 1, 2, 3, 4, 68], [700] * 5, tables, slots, 16)


BF16, FP16 = torch.bfloat16, torch.float16
COMPILED = [(BF16, HEADS[0], 90), (BF16, HEADS[0], 80), (FP16, HEADS[1], 90), (BF16, HEADS[2], 90)]
MORE_COMPILED = [one for one in itertools.product((BF16, FP16), HEADS, SHARED_BYTES) if one not in COMPILED]


def check_compiled(recorders, monkeypatch, folder, dtype, heads, capability, steps):
    monkeypatch.setattr(attention, "_is_ampere", lambda device: capability < 90)
    q, cache, meta = step_of(heads, dtype)
    for options in steps:
        attention.paged_attention(q, cache, cache, meta, scale=0.1, **options)
    kv.write_kv(cache[0], cache[1], cache, cache, meta.slot_mapping[:16])
    calls = [(recorder.kernel, *call) for recorder in recorders.values() for call in recorder.calls]
    assert len(calls) == 1 + 5 * len(steps)  # decodes and prompts, attended to and joined, and looked at again
    for kernel, args, options in calls:
        made = compiled(kernel, args, options, capability, folder)
        assert made.spilled == 0 and made.shared <= SHARED_BYTES[capability], (kernel, options, made)


@pytest.mark.parametrize(("dtype", "heads", "capability"), COMPILED, ids=str)
def test_kernels_compile_and_nothing_spills(recorders, monkeypatch, tmp_path, dtype, heads, capability):
    full = FULL | {"sinks": torch.zeros(heads[0], dtype=dtype)}
    check_compiled(recorders, monkeypatch, tmp_path, dtype, heads, capability, [full])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "heads", "capability"), MORE_COMPILED, ids=str)
def test_other_shapes_compile_and_nothing_spills(recorders, monkeypatch, tmp_path, dtype, heads, capability):
    full, softcap = FULL | {"sinks": torch.zeros(heads[0], dtype=dtype)}, FULL | {"sliding_window": None}
    check_compiled(recorders, monkeypatch, tmp_path, dtype, heads, capability, [full, softcap, PLAIN])


def test_a_plain_model_compiles_and_nothing_spills(recorders, monkeypatch, tmp_path):
    check_compiled(recorders, monkeypatch, tmp_path, BF16, HEADS[0], 90, [PLAIN])


def test_a_device_form_says_what_does_not_fit():
    meta = attention_case("short", torch.float32).meta
    requests, width = meta.block_tables.shape
    for max_requests, max_blocks in ((requests - 1, width), (requests, width - 1)):
        with pytest.raises(ValueError, match=f"{requests} requests of {width} blocks don't fit"):
            DeviceAttention(max_requests, max_blocks, "cpu").fill(meta)


def test_a_device_form_keeps_its_addresses_and_says_nothing_of_earlier_steps():
    long, short = (attention_case(name, torch.float32).meta for name in ("ragged", "prefill"))
    device = DeviceAttention(16, 30, "cpu")
    arrays = (device.query_starts, device.context_lens, device.table_width, device.block_tables)
    places = [array.data_ptr() for array in arrays]
    assert all(place % 128 == places[0] % 128 for place in places)
    for meta in (long, short, long):
        device.fill(meta)
        requests, width = meta.block_tables.shape
        rows = meta.query_starts[-1]
        assert device.query_starts.tolist() == [*meta.query_starts, *[rows] * (16 - requests)]
        assert device.context_lens.tolist() == [*meta.context_lens, *[0] * (16 - requests)]
        assert device.table_width.tolist() == [width]
        tables = device.block_tables[: requests * width].view(requests, width)
        assert torch.equal(tables, torch.from_numpy(meta.block_tables))
        assert [array.data_ptr() for array in arrays] == places


def test_a_step_makes_its_device_form_once():
    meta = attention_case("short", torch.float32).meta
    made = device_attention(meta)
    assert device_attention(meta) is made and made.context_lens.tolist() == meta.context_lens
    mine = DeviceAttention(30, 30, "cpu")
    meta.scratch[SCRATCH_KEY] = mine
    assert device_attention(meta) is mine


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with an NVIDIA GPU")
GPU_CASES = [
    {"contexts": contexts, "dtype": dtype, "heads": heads, **options}
    for contexts, dtype, heads, options in itertools.product(
        ("ragged", "prefill"),
        (torch.bfloat16, torch.float16),
        HEADS,
        ({}, {"window": 64, "softcap": 3.0, "has_sinks": True}),
    )
]


def on_gpu(case: AttentionCase) -> dict[str, object]:
    """The arguments of its call, but for the metadata, on the GPU."""
    sinks = None if case.sinks is None else case.sinks.cuda()
    moved = {name: getattr(case, name).cuda() for name in ("q", "k_cache", "v_cache")}
    return moved | case.options | {"sinks": sinks}


def moved_meta(meta: AttentionMetadata) -> AttentionMetadata:
    slots = meta.slot_mapping.cuda()
    sizes = (meta.num_decodes, meta.query_starts, meta.context_lens, meta.block_tables)
    return AttentionMetadata(*sizes, slots, meta.block_size)


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("case", CASES + GPU_CASES, ids=name_of)
def test_matches_fp64_on_a_gpu(case, fresh_memory_is_nan):
    """Also with caches made by write_kv there, and with the same bits each time."""
    case = attention_case(**case)
    call, meta = on_gpu(case), moved_meta(case.meta)
    shape = (-1, *case.k_cache.shape[2:])
    rows = [call[name].view(shape)[meta.slot_mapping] for name in ("k_cache", "v_cache")]
    for name in ("k_cache", "v_cache"):
        call[name].view(shape)[meta.slot_mapping] = torch.nan
    kv.write_kv(*rows, call["k_cache"], call["v_cache"], meta.slot_mapping)
    got = attention.paged_attention(meta=meta, **call)
    assert ((got.cpu().double() - case.exact()[0]).abs() / bound(case)).max() <= 1
    for _ in range(5):
        assert same_bits(attention.paged_attention(meta=meta, **call).cpu(), got.cpu())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_graph_follows_what_is_filled_in(heads, fresh_memory_is_nan):
    """Captured once, replayed for steps of other sizes and contexts, with padding rows full of NaN."""
    padded, cases = 8, [attention_case("decode", torch.bfloat16, heads, seed=seed) for seed in range(4)]
    q = torch.full((padded, *cases[0].q.shape[1:]), torch.nan, dtype=torch.bfloat16, device="cuda")
    caches = [torch.empty_like(cache, device="cuda") for cache in (cases[0].k_cache, cases[0].v_cache)]
    device = DeviceAttention(16, 100, "cuda")
    nobody = AttentionMetadata(
        padded, list(range(padded + 1)), [1] * padded, np.zeros((padded, 1), np.int32), torch.zeros(0).long(), 16
    )
    nobody.scratch[SCRATCH_KEY] = device
    options = {"scale": cases[0].scale, "sliding_window": None, "softcap": None}
    attention.paged_attention(q, *caches, nobody, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.paged_attention(q, *caches, nobody, **options)
    for case, count in zip(cases, (7, 3, 5, 7), strict=True):
        meta = case.meta
        tables, contexts = meta.block_tables[:count], meta.context_lens[:count]
        device.fill(AttentionMetadata(count, list(range(count + 1)), contexts, tables, meta.slot_mapping[:count], 16))
        q.fill_(torch.nan)
        q[:count].copy_(case.q[:count])
        for cache, source in zip(caches, (case.k_cache, case.v_cache), strict=True):
            cache.copy_(source)
        out.fill_(torch.nan)
        graph.replay()
        off = (out[:count].cpu().double() - case.exact()[0][:count]).abs() / bound(case)[:count]
        assert off.max() <= 1 and (out[count:] == 0).all()
