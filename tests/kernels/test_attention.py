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


def test_layers_of_a_step_share_what_is_in_scratch(backend):
    """Layers of one step differ in window and cache; the first must leave nothing that misleads the next."""
    case = attention_case("ragged", torch.float32)
    other = attention_case("ragged", torch.float32, seed=5)
    layers = [dataclasses.replace(c, sliding_window=w) for w in (None, 5, 64) for c in (case, other)]
    for layer in layers + layers:
        layer = dataclasses.replace(layer, meta=case.meta)
        layer.k_cache, layer.v_cache = _recached(layer, other.meta, case.meta)
        got = layer.q.new_tensor(0) + ops.get_backend_result(backend, layer)
        assert ((got.double() - layer.exact()[0]).abs() / bound(layer)).max() <= 1
