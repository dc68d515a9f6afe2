"""write_kv and paged_attention of every backend against dense fp64, in caches full of NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels import ops, reference
from kernels.types import AttentionMetadata
from tests.kernels.builders import CONTEXTS, DTYPES, AttentionCase, attention_case, pairwise
from tests.kernels.test_lora import name_of, same_bits

CASES = list(
    pairwise(
        contexts=tuple(CONTEXTS),
        dtype=DTYPES,
        heads=((6, 2, 16), (4, 4, 32), (9, 3, 64), (4, 1, 20)),
        block_size=(4, 16),
        window=(None, 1, 5, 64),
        softcap=(None, 3.0),
        has_sinks=(False, True),
    )
)


@pytest.fixture(params=CASES, ids=name_of)
def case(request) -> AttentionCase:
    return attention_case(**request.param)


def run(backend, case: AttentionCase) -> torch.Tensor:
    case.meta.scratch.clear()
    return backend.paged_attention(case.q, case.k_cache, case.v_cache, case.meta, **case.options)


def bound(case: AttentionCase) -> torch.Tensor:
    """One rounding of the result, one of each probability, and fp32 scores and sums."""
    exact, magnitude = case.exact()
    u, u32 = torch.finfo(case.q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    largest = case.q.double().norm(dim=-1).max() * max(k.norm(dim=-1).max() for k in case.keys) * case.scale
    return 1.01 * u * exact.abs() + (2 * u + (200 + 4 * largest) * u32) * magnitude + 1e-7


def test_matches_fp64(backend, case):
    got = run(backend, case)
    assert got.shape == case.q.shape and got.dtype == case.q.dtype and got.is_contiguous()
    assert ((got.double() - case.exact()[0]).abs() / bound(case)).max() <= 1


def test_matches_the_reference(backend, case):
    difference = (run(backend, case).double() - run(reference, case).double()).abs()
    assert (difference / bound(case)).max() <= 1.5


def test_layers_of_a_step_share_one_metadata(backend):
    """They differ in cache and window; what the first leaves in scratch must not mislead the next."""
    case = attention_case("ragged", torch.float32)
    doubled = dataclasses.replace(
        case, k_cache=2 * case.k_cache, v_cache=2 * case.v_cache, keys=[2 * k for k in case.keys]
    )
    doubled.values = [2 * v for v in case.values]
    for window in (None, 5, 64, None, 5):
        for layer in (case, doubled):
            layer = dataclasses.replace(layer, sliding_window=window)
            got = backend.paged_attention(layer.q, layer.k_cache, layer.v_cache, layer.meta, **layer.options)
            assert ((got.double() - layer.exact()[0]).abs() / bound(layer)).max() <= 1


def test_same_arguments_give_the_same_bits(backend, case):
    assert same_bits(run(backend, case), run(backend, case))


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 5.0, "has_sinks": True}], ids=str)
def test_a_request_alone_equals_itself_in_the_batch(backend, options):
    """Neighbours decide how far a decode row is padded; they must not decide its result."""
    case = attention_case("ragged", torch.float32, **options)
    together, meta = run(backend, case), case.meta
    for i, context in enumerate(meta.context_lens):
        rows = slice(meta.query_starts[i], meta.query_starts[i + 1])
        count = rows.stop - rows.start
        is_decode = int(i < meta.num_decodes)
        tables = meta.block_tables[i : i + 1]
        alone = AttentionMetadata(is_decode, [0, count], [context], tables, meta.slot_mapping[rows], meta.block_size)
        got = backend.paged_attention(case.q[rows], case.k_cache, case.v_cache, alone, **case.options)
        assert ((got - together[rows]).abs() / bound(case)[rows]).max() <= 2


def test_nan_in_one_request_stays_there(backend):
    """Decode rows share a batched product: a poisoned request must not reach its neighbours."""
    case = attention_case("short", torch.float32)
    clean = run(backend, case)
    block, last = int(case.meta.block_tables[1, 0]), case.meta.query_starts[-1]
    case.k_cache[block, 0], case.v_cache[block, 0] = torch.nan, torch.inf
    case.q[2] = torch.nan
    got, poisoned = run(backend, case), [1, 2]
    others = [row for row in range(last) if row not in poisoned]
    assert same_bits(got[others], clean[others])
    assert got[poisoned].isnan().all()


def test_many_decode_rows_exceed_one_gather(backend, monkeypatch):
    monkeypatch.setattr("kernels.torch_backend.attention.MAX_DECODE_TOKENS", 130)  # two of the five short rows
    monkeypatch.setattr("kernels.torch_backend.attention.MAX_TILE_ROWS", 7)
    for window in (None, 9):
        case = attention_case("ragged", torch.float32, window=window)
        assert ((run(backend, case).double() - case.exact()[0]).abs() / bound(case)).max() <= 1


def test_rows_of_no_request_are_zeros(backend):
    """A captured graph's batch is padded with rows that belong to nobody."""
    case = attention_case("short", torch.float32)
    rows = len(case.q)
    case.q = torch.cat([case.q, torch.full((3, *case.q.shape[1:]), torch.nan)])
    got = run(backend, case)
    assert (got[rows:] == 0).all() and not got[:rows].isnan().any()


def test_no_request(backend):
    case = attention_case("short", torch.float32)
    meta = AttentionMetadata(0, [0], [], case.meta.block_tables[:0], case.meta.slot_mapping[:0], 16)
    assert backend.paged_attention(case.q[:0], case.k_cache, case.v_cache, meta, **case.options).shape == (0, 6, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_writes_its_rows_and_nothing_else(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 5, 8, generator=generator).to(dtype).transpose(0, 1) for _ in range(2))  # strided
    caches = [torch.full((6, 4, 2, 8), torch.nan, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([23, 4, 5, 17, 8])
    backend.write_kv(k, v, *caches, slots)
    others = [position for position in range(24) if position not in slots.tolist()]
    for cache, rows in zip(caches, (k, v), strict=True):
        assert same_bits(cache.view(24, 2, 8)[slots], rows)
        assert cache.view(24, 2, 8)[others].isnan().all()


def test_a_step_writes_then_attends(backend):
    """As a layer does: the rows' own keys come from write_kv."""
    case = attention_case("ragged", torch.float32)
    shape = (-1, *case.k_cache.shape[2:])
    k, v = (c.view(shape)[case.meta.slot_mapping].clone() for c in (case.k_cache, case.v_cache))
    for cache in (case.k_cache, case.v_cache):
        cache.view(shape)[case.meta.slot_mapping] = torch.nan
    backend.write_kv(k, v, case.k_cache, case.v_cache, case.meta.slot_mapping)
    assert ((run(backend, case).double() - case.exact()[0]).abs() / bound(case)).max() <= 1


def attention_call(**change: object) -> torch.Tensor:
    case = attention_case("short", torch.float32)
    call = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "meta": case.meta} | case.options
    return ops.paged_attention(**call | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(13, 6, 15)}, "does not fit a cache"),
        ({"q": torch.zeros(13, 5, 16)}, "does not fit a cache"),
        ({"q": torch.zeros(12, 6, 16)}, "12 rows don't fit"),
        ({"q": torch.zeros(13, 6, 16, dtype=torch.float16)}, "one dtype"),
        ({"v_cache": torch.zeros(1, 16, 2, 16)}, "one shape"),
        ({"sinks": torch.zeros(2)}, "sinks are"),
        ({"meta": AttentionMetadata(1, [0, 1], [17], torch.zeros(1, 1).int().numpy(), torch.zeros(1), 16)}, "longer"),
        ({"backend": "fpga"}, "unknown kernel backend"),
    ],
)
def test_attention_dispatch_refuses_what_does_not_fit(change, message):
    attention_call()
    with pytest.raises(ValueError, match=message):
        attention_call(**change)


def test_write_kv_dispatch_refuses_what_does_not_fit():
    k, cache, slots = torch.zeros(3, 2, 8), torch.zeros(4, 4, 2, 8), torch.tensor([4, 5, 6])
    ops.write_kv(k, k, cache, cache, slots)
    for change in ({"k": k[:2]}, {"v": k.half()}, {"slot_mapping": slots.int()}, {"v_cache": cache[:, :, :1]}):
        call = {"k": k, "v": k, "k_cache": cache, "v_cache": cache, "slot_mapping": slots}
        with pytest.raises(ValueError, match="k"):
            ops.write_kv(**call | change)


def test_nan_before_a_window_is_not_seen(backend):
    """Blocks that a window has left behind may be somebody else's by now."""
    case = attention_case("ragged", torch.float32, window=20)
    clean = run(backend, case)
    for i, context in enumerate(case.meta.context_lens):
        rows = case.meta.query_starts[i + 1] - case.meta.query_starts[i]
        for position in range(max(0, context - rows - 20 + 1)):
            block = int(case.meta.block_tables[i, position // 16])
            case.k_cache[block, position % 16] = case.v_cache[block, position % 16] = torch.nan
    assert same_bits(run(backend, case), clean)
