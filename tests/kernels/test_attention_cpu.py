"""The native attention at every level that this machine runs: what a row's bits may depend on, and its edges."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from kernels import torch_backend
from kernels.cpu import build
from kernels.cpu.attention import PagedAttention
from kernels.types import AttentionMetadata
from tests.kernels.builders import CONTEXTS, AttentionCase, attention_case
from tests.kernels.test_attention import bound
from tests.kernels.test_lora import same_bits

LEVELS = [level for level in build.LEVELS if build.is_supported(level)]
HEADS = [(6, 2, 16), (4, 4, 32), (2, 1, 48), (9, 3, 64), (14, 2, 64), (4, 1, 80), (8, 1, 96), (4, 2, 128), (2, 1, 256)]
GROUPS = [(group, 1, 64) for group in range(2, 14)]
OPTIONS = [{}, {"window": 5}, {"window": 64, "softcap": 3.0}, {"softcap": 20.0, "has_sinks": True}]


@functools.cache
def attention_at(level: str) -> PagedAttention:
    return PagedAttention(build.open_library(level, build.default_cache()))


@pytest.fixture(scope="module", params=LEVELS)
def attention(request) -> PagedAttention:
    return attention_at(request.param)


@pytest.fixture(autouse=True)
def threads():
    """Two threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(attention, case: AttentionCase, meta: AttentionMetadata | None = None, rows: slice = slice(None)):
    return attention.paged_attention(case.q[rows], case.k_cache, case.v_cache, meta or case.meta, **case.options)


def part_of(case: AttentionCase, request: int, first: int, count: int) -> tuple[AttentionMetadata, slice]:
    """Rows first : first + count of a request as a step of its own, with the context that it had then."""
    meta = case.meta
    start, end = meta.query_starts[request], meta.query_starts[request + 1]
    rows = slice(start + first, start + first + count)
    context = meta.context_lens[request] - (end - start) + first + count
    tables = meta.block_tables[request : request + 1]
    slots = meta.slot_mapping[rows]
    return AttentionMetadata(int(count == 1), [0, count], [context], tables, slots, meta.block_size), rows


def decoding(case: AttentionCase, rows: list[int]) -> AttentionCase:
    """A step that decodes these rows of a case's only request, prefilled from position 0, side by side."""
    tables = np.repeat(case.meta.block_tables, len(rows), axis=0)
    contexts, starts = [row + 1 for row in rows], list(range(len(rows) + 1))
    meta = AttentionMetadata(len(rows), starts, contexts, tables, case.meta.slot_mapping[rows], case.meta.block_size)
    return dataclasses.replace(case, q=case.q[rows], meta=meta)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_fp64(attention, heads, options):
    for block_size, contexts in ((4, "ragged"), (16, "prefill"), (6, "decode")):
        case = attention_case(contexts, torch.bfloat16, heads, block_size=block_size, **options)
        got = run(attention, case)
        assert ((got.double() - case.exact()[0]).abs() / bound(case)).max() <= 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_depend_on_the_row_alone(attention, options, monkeypatch):
    """Not on threads, neighbours, or how a prompt is cut: a row decoded equals itself in a prefill."""
    monkeypatch.setitem(CONTEXTS, "long", ([700, 257, 256], [(800, 300), (90, 70)]))
    case = attention_case("long", torch.bfloat16, (6, 2, 64), **options)
    together = run(attention, case)
    assert ((together.double() - case.exact()[0]).abs() / bound(case)).max() <= 1
    torch.set_num_threads(1)
    assert same_bits(run(attention, case), together)
    for request in range(len(case.meta.context_lens)):
        count = case.meta.query_starts[request + 1] - case.meta.query_starts[request]
        for first, rows in ((0, count), (0, 1), (count // 2, 1), (count // 3, count - count // 3), (count - 1, 1)):
            meta, at = part_of(case, request, first, rows)
            assert same_bits(run(attention, case, meta, at), together[at])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [*HEADS, *GROUPS], ids=str)
def test_a_decoded_row_is_its_row_of_the_prefill(attention, heads, options, monkeypatch):
    """Bit for bit, at every border of panels, pairs and chunks, and whatever lies where it does not look."""
    monkeypatch.setitem(CONTEXTS, "whole", ([], [(273, 273)]))
    for block_size in (16, 6):
        case = attention_case("whole", torch.bfloat16, heads, block_size=block_size, **options)
        prefilled = run(attention, case)
        rows = [0, 1, 14, 15, 16, 17, 31, 32, 47, 48, 100, 255, 256, 272]
        assert same_bits(run(attention, decoding(case, rows)), prefilled[rows])
        last, blocks = decoding(case, [272]), case.meta.block_tables[0]
        for position in range(273 - (options.get("window") or 273)):
            at = blocks[position // block_size], position % block_size
            last.k_cache[at] = last.v_cache[at] = torch.nan
        assert same_bits(run(attention, last), prefilled[272:])


@pytest.mark.parametrize("window", [None, 9])
def test_an_infinite_value_reaches_no_row_that_does_not_see_it(attention, window):
    """In a tile of rows a hidden key's weight is 0, and 0 times infinity would be a NaN."""
    case = attention_case("prefill", torch.bfloat16, (6, 2, 32), window=window)
    clean = run(attention, case)
    poisoned = 40  # of the first request, whose row i is at position i
    block = int(case.meta.block_tables[0, poisoned // case.meta.block_size])
    case.v_cache[block, poisoned % case.meta.block_size] = torch.inf
    case.k_cache[block, poisoned % case.meta.block_size] = torch.nan
    got = run(attention, case)
    seen = slice(poisoned, poisoned + (window or 64 - poisoned))
    others = [row for row in range(len(got)) if not seen.start <= row < seen.stop]
    assert same_bits(got[others], clean[others])
    assert not got[seen].isfinite().any()


def test_nan_stays_in_its_request_and_unread_cache_is_not_read(attention):
    case = attention_case("short", torch.bfloat16)
    clean = run(attention, case)
    block = int(case.meta.block_tables[1, 0])
    case.k_cache[block, 0], case.v_cache[block, 0] = torch.nan, torch.inf
    case.q[2] = torch.nan
    got, poisoned = run(attention, case), [1, 2]
    others = [row for row in range(len(got)) if row not in poisoned]
    assert same_bits(got[others], clean[others])
    assert got[poisoned].isnan().all()


def test_rows_of_no_request_are_zeros(attention):
    case = attention_case("decode", torch.bfloat16)
    rows = len(case.q)
    case.q = torch.cat([case.q, torch.full((3, *case.q.shape[1:]), torch.nan, dtype=torch.bfloat16)])
    got = run(attention, case)
    assert (got[rows:] == 0).all() and got[:rows].isfinite().all()


def test_more_heads_of_one_kv_head_than_a_tile_has_rows(attention):
    case = attention_case("short", torch.bfloat16, (71, 1, 64))
    assert ((run(attention, case).double() - case.exact()[0]).abs() / bound(case)).max() <= 1


@pytest.mark.parametrize("head_dim", [20, 8])
def test_other_head_dims_are_torchs(attention, head_dim):
    case = attention_case("ragged", torch.bfloat16, (4, 2, head_dim))
    got = run(attention, case)
    case.meta.scratch.clear()
    assert same_bits(got, run(torch_backend, case))


def test_write_kv_of_a_packed_projection(attention):
    """k and v are columns of one matrix; rows of nobody share the dummy block."""
    qkv = torch.randn(5, 4 * 16 + 2 * 2 * 16).bfloat16()
    k, v = (qkv[:, first : first + 32].unflatten(1, (2, 16)) for first in (64, 96))
    caches = [torch.full((4, 4, 2, 16), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.tensor([9, 4, 15, 0, 0])
    attention.write_kv(k, v, *caches, slots)
    for cache, rows in zip(caches, (k, v), strict=True):
        flat = cache.view(16, 2, 16)
        assert same_bits(flat[slots[:3]], rows[:3])
        assert flat[np.setdiff1d(np.arange(1, 16), slots[:3].numpy())].isnan().all()
