"""What Triton's attention must do beyond tests/kernels/test_attention.py; run by test_triton_attention.py.

It needs a process of its own, in whose environment TRITON_INTERPRET is 1 before triton is imported.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kernels.triton import attention, kv
from kernels.triton.interpreter import IS_INTERPRETED
from kernels.triton.metadata import SCRATCH_KEY, DeviceAttention
from kernels.types import AttentionMetadata
from tests.kernels.builders import CONTEXTS, AttentionCase, attention_case
from tests.kernels.test_attention import bound
from tests.kernels.test_lora import same_bits

HEADS = [(2, 1, 48), (4, 1, 80), (2, 2, 96), (14, 2, 64), (71, 1, 16), (4, 2, 128), (2, 1, 256)]
OPTIONS = [{}, {"window": 70, "softcap": 20.0, "has_sinks": True}]
LONG = ([260, 97, 96, 1], [(130, 9)])


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Without it a result that nobody writes may hold the right values of an earlier call."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_chunks(monkeypatch):
    """At most 8 chunks, of 32 keys, or of more where a context is longer."""
    monkeypatch.setattr(attention, "MIN_CHUNK", 32)
    monkeypatch.setattr(attention, "MAX_CHUNKS", 8)
    monkeypatch.setattr(attention, "_num_multiprocessors", lambda device: 8)
    monkeypatch.setitem(CONTEXTS, "long", LONG)


def run(case: AttentionCase, meta: AttentionMetadata | None = None, rows: slice = slice(None)) -> torch.Tensor:
    return attention.paged_attention(case.q[rows], case.k_cache, case.v_cache, meta or case.meta, **case.options)


def error(case: AttentionCase, got: torch.Tensor) -> float:
    """In units of the bound; NaN where it is one."""
    return float(((got.double() - case.exact()[0]).abs() / bound(case)).max())


def decoding(case: AttentionCase) -> AttentionCase:
    """The case's decode rows alone."""
    meta, count = case.meta, case.meta.num_decodes
    starts, tables = meta.query_starts[: count + 1], meta.block_tables[:count]
    contexts, slots = meta.context_lens[:count], meta.slot_mapping[:count]
    part = AttentionMetadata(count, starts, contexts, tables, slots, meta.block_size)
    return dataclasses.replace(case, q=case.q[:count], meta=part)


def test_kernels_are_interpreted():
    assert IS_INTERPRETED


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_dims_and_groups(heads):
    case = attention_case("short", torch.float16, heads, window=9, softcap=3.0, has_sinks=True)
    assert error(case, run(case)) <= 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_contexts_of_many_chunks(short_chunks, options):
    """Of decodes and, with so few tiles, of prompts."""
    case = attention_case("long", torch.float32, (4, 2, 32), block_size=6, **options)
    launches = attention._launches(case.q, case.k_cache, case.meta, _device_of(case), case.sliding_window)
    assert [launch.max_chunks > 2 for launch in launches] == [True, True, False]
    assert error(case, run(case)) <= 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_of_a_decode_row_depend_on_its_own_context_alone(short_chunks, monkeypatch, options):
    """Not on its neighbours, nor on how many programs share its chunks, nor on how wide the tables are."""
    case = decoding(attention_case("long", torch.float16, (4, 2, 32), **options))
    together = run(case)
    for i, (context, processors) in enumerate(zip(case.meta.context_lens, (100, 1, 100, 1), strict=True)):
        monkeypatch.setattr(attention, "_num_multiprocessors", lambda device, number=processors: number)
        tables = np.zeros((1, 20 + i), np.int32)
        tables[0, : case.meta.block_tables.shape[1]] = case.meta.block_tables[i]
        alone = AttentionMetadata(1, [0, 1], [context], tables, case.meta.slot_mapping[i : i + 1], 16)
        assert same_bits(run(case, alone, slice(i, i + 1)), together[i : i + 1])


@pytest.mark.parametrize("window", [None, 9])
def test_an_infinite_value_reaches_no_row_that_does_not_see_it(monkeypatch, window):
    """In a tile of rows a hidden key's weight is 0, and 0 times infinity would be a NaN."""
    monkeypatch.setitem(CONTEXTS, "prompt", ([], [(64, 64), (9, 2)]))
    case = attention_case("prompt", torch.float16, (3, 1, 32), window=window)
    poisoned = 40  # of the first request, whose row i is at position i
    block = int(case.meta.block_tables[0, poisoned // case.meta.block_size])
    clean = dataclasses.replace(case, k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone())
    case.v_cache[block, poisoned % case.meta.block_size] = torch.inf
    case.k_cache[block, poisoned % case.meta.block_size] = torch.nan
    got = run(case)
    seen = slice(poisoned, poisoned + (window or 64 - poisoned))
    assert not got[seen].isfinite().any()
    got[seen] = run(clean)[seen]
    assert error(clean, got) <= 1


def test_padding_rows_beside_a_prompt_are_zeros():
    case = attention_case("short", torch.float32)
    rows = len(case.q)
    case.q = torch.cat([case.q, torch.full((3, *case.q.shape[1:]), torch.nan)])
    got = run(case)
    assert (got[rows:] == 0).all() and not got[:rows].isnan().any()


def _device_of(case: AttentionCase, max_requests: int = 16) -> DeviceAttention:
    device = DeviceAttention(max_requests, case.meta.block_tables.shape[1] + 2, "cpu")
    device.fill(case.meta)
    return device


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_device_form_serves_every_step(options):
    """Mixed steps, longer and shorter ones in turn, as an engine fills it; what is left over reaches nobody."""
    cases = [attention_case(name, torch.float16, **options) for name in ("decode", "short")]
    device = DeviceAttention(20, max(case.meta.block_tables.shape[1] for case in cases) + 3, "cpu")
    for case in [*cases, cases[0]]:
        case.meta.scratch.clear()
        expected = run(case)
        device.fill(case.meta)
        case.meta.scratch[SCRATCH_KEY] = device
        assert error(case, expected) <= 1 and same_bits(run(case), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_call_follows_what_is_filled_in(short_chunks, options):
    """Everything that Python says is as it was at the capture: of 5 decodes, with contexts of nobody."""
    padded, cases = 5, []
    for name in ("long", "short"):
        case = decoding(attention_case(name, torch.float16, **options))
        count = min(padded, case.meta.num_decodes)
        meta = case.meta
        tables, slots = meta.block_tables[:count], meta.slot_mapping[:count]
        part = AttentionMetadata(count, list(range(count + 1)), meta.context_lens[:count], tables, slots, 16)
        cases.append(dataclasses.replace(case, q=case.q[:count], meta=part))
    device = DeviceAttention(8, max(case.meta.block_tables.shape[1] for case in cases) + 5, "cpu")
    captured = AttentionMetadata(
        padded, list(range(padded + 1)), [1] * padded, np.zeros((padded, 1), np.int32), torch.zeros(padded).long(), 16
    )
    captured.scratch[SCRATCH_KEY] = device
    for case in [*cases, cases[0]]:
        device.fill(case.meta)
        count = len(case.q)
        case_q = torch.full((padded, *case.q.shape[1:]), torch.nan, dtype=case.q.dtype)
        case_q[:count] = case.q
        got = run(dataclasses.replace(case, q=case_q), captured)
        assert error(case, got[:count]) <= 1
        assert (got[count:] == 0).all()


def test_write_kv_of_a_packed_projection():
    """k and v are columns of one matrix; rows of nobody share the dummy block."""
    qkv = torch.randn(5, 4 * 16 + 2 * 2 * 16).bfloat16()
    k, v = (qkv[:, first : first + 32].unflatten(1, (2, 16)) for first in (64, 96))
    caches = [torch.full((4, 4, 2, 16), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.tensor([9, 4, 15, 0, 0])
    kv.write_kv(k, v, *caches, slots)
    for cache, rows in zip(caches, (k, v), strict=True):
        flat = cache.view(16, 2, 16)
        assert same_bits(flat[slots[:3]], rows[:3])
        assert flat[np.setdiff1d(np.arange(1, 16), slots[:3].numpy())].isnan().all()


def test_write_kv_of_no_rows():
    cache = torch.full((2, 4, 3, 20), torch.nan)
    empty = torch.zeros(0, 3, 20)
    kv.write_kv(empty, empty, cache, cache.clone(), torch.zeros(0, dtype=torch.int64))
    assert cache.isnan().all()
