"""Filters and draws as a device computes them, against sorted fp64 weights and sums without rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import sampler as sampler_module
from server.model.nucleus import exact_cumsum
from server.model.sampler import Sampler, draw, filtered_weights
from tests.model.test_sampler import EOS, GRID, make_request, mixed_requests, random_logits


@pytest.fixture(autouse=True)
def _far(monkeypatch) -> None:
    """The CPU's tensors are taken for those of a device that nobody looks at."""
    monkeypatch.setattr(sampler_module, "is_near", lambda device: False)


def kept_by_sorting(logits: torch.Tensor, top_k: int, top_p: float, min_p: float, temperature: float) -> set[int]:
    """The tokens of one row that the filters leave: masses are sums of the fp64 weights, unrounded.

    A row whose mass lies nearer to the share than fp64 can tell gives no example.
    """
    scaled = logits.double()
    weights = ((scaled - scaled.max()) / temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if 0 < top_k < len(order):
        edge = weights[order[top_k - 1]]
        order = [token for token in order if weights[token] >= edge]
    if top_p < 1.0:
        target = Fraction(top_p) * sum(Fraction(weights[token]) for token in order)
        mass, last = Fraction(0), -1
        while mass < target:
            last += 1
            mass += Fraction(weights[order[last]])
            assume(abs(mass - target) > target / 2**50)
        order = [token for token in order if weights[token] >= weights[order[last]]]
    return {token for token in order if weights[token] > 0 and weights[token] >= min_p}


SHARES = st.one_of(
    st.just(1.0),
    st.floats(1e-9, 1.0),
    st.integers(-30, -1).map(lambda power: 2.0**power),
    st.integers(1, 45).map(lambda power: 1 - 2.0**-power),
)


@st.composite
def rows(draw_from) -> tuple[torch.Tensor, dict[str, float]]:
    seed, vocab = draw_from(st.integers(0, 2**32)), draw_from(st.integers(2, 400))
    generator = np.random.default_rng(seed)
    kind = draw_from(st.sampled_from(["normal", "uniform", "equal", "ties", "far apart", "denormal"]))
    values = {
        "normal": lambda: generator.normal(size=vocab) * 3,
        "uniform": lambda: generator.uniform(-1e-3, 1e-3, size=vocab),
        "equal": lambda: np.full(vocab, generator.normal()),
        "ties": lambda: generator.integers(-3, 4, size=vocab) / 2,
        "far apart": lambda: generator.normal(size=vocab) * 10.0 ** generator.integers(-3, 4, size=vocab),
        "denormal": lambda: generator.integers(-4, 5, size=vocab) * 2.0**-149,
    }[kind]()
    logits = torch.from_numpy(values).to(draw_from(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    masked = generator.random(vocab) < draw_from(st.sampled_from([0.0, 0.3, 0.99]))
    masked[generator.integers(vocab)] = False
    logits[torch.from_numpy(masked)] = -math.inf
    fields = {
        "top_k": draw_from(st.one_of(st.just(0), st.integers(1, vocab + 3))),
        "top_p": draw_from(SHARES),
        "min_p": draw_from(st.sampled_from([0.0, 0.0, 1e-6, 0.1, 1.0])),
        "temperature": draw_from(st.sampled_from([1e-4, 0.3, 1.0, 2.0, 50.0])),
    }
    return logits, fields


@settings(max_examples=400, deadline=None)
@given(rows())
def test_what_is_kept_is_what_sorting_keeps(row) -> None:
    logits, fields = row
    expected = kept_by_sorting(logits, **fields)
    weights = filtered_weights(logits[None], [make_request(**fields)])[0]
    assert set(weights.nonzero()[:, 0].tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), min_size=2, max_size=6), st.integers(0, 2**62))
def test_a_row_is_the_same_bits_in_any_batch(found, seed) -> None:
    """Rows of one vocabulary and dtype, together and alone: weights, and the tokens drawn of them."""
    vocab = min(len(logits) for logits, _ in found)
    logits = torch.stack([logits[:vocab].float() for logits, _ in found])
    assume(bool(logits.isfinite().any(dim=-1).all()))
    requests = [make_request(seed=seed, **fields) for _, fields in found]
    together = filtered_weights(logits, requests)
    tokens = draw(logits, torch.arange(len(logits)), requests).tolist()
    for row, request in enumerate(requests):
        assert torch.equal(filtered_weights(logits[row : row + 1], [request])[0], together[row])
        assert draw(logits, torch.tensor([row]), [request]).tolist() == [tokens[row]]
        assert together[row, tokens[row]] > 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_sums_are_rounded_once_and_have_no_order(seed: int, vocab: int) -> None:
    generator = np.random.default_rng(seed)
    weights = torch.from_numpy(generator.random(vocab) ** generator.integers(1, 60))
    weights[0] = 1.0
    sums = exact_cumsum(weights[None])[0]
    total = Fraction(0)
    for weight, found in zip(weights.tolist(), sums.tolist(), strict=True):
        total += Fraction(weight)
        assert abs(Fraction(found) - total) <= total / 2**51
    order = torch.from_numpy(generator.permutation(vocab))
    assert exact_cumsum(weights[order][None])[0, -1] == sums[-1] and (sums.diff() >= 0).all()


def test_a_large_vocabulary_and_its_tail() -> None:
    """As many tokens as models have: the shares of a flat distribution fall where they must, to the token."""
    vocab = 200_000
    logits = -torch.arange(vocab).float()[None] / 2**20
    weights = (logits[0].double()).exp()
    for share in (1e-9, 0.25, 0.999, 1 - 2.0**-16):
        kept = filtered_weights(logits, [make_request(top_p=share)])[0] > 0
        expected = int((weights.cumsum(0) < share * weights.sum()).sum()) + 1
        assert int(kept.sum()) == expected and kept[:expected].all()


def test_tokens_are_those_of_the_cpu(monkeypatch) -> None:
    requests, logits = mixed_requests(60), random_logits(60, 5003, scale=1.0)
    found = Sampler([EOS]).sample(logits, requests)
    monkeypatch.undo()
    assert torch.equal(found, Sampler([EOS]).sample(logits, mixed_requests(60)))


@pytest.mark.parametrize(("number", "expected"), [(0.0, 3), (1 - 2.0**-52, 6)])
def test_extreme_numbers_land_on_allowed_tokens(number: float, expected: int, monkeypatch) -> None:
    monkeypatch.setattr(sampler_module, "uniforms", lambda seeds, indices: np.full(len(seeds), number))
    logits = torch.tensor([[-math.inf, -9.0, -9.0, 5.0, 4.0, -9.0, 5.0, -9.0, -math.inf]])
    assert draw(logits, torch.tensor([0]), [make_request(top_k=3)]).tolist() == [expected]


def test_a_row_of_nan_disturbs_nobody() -> None:
    logits = random_logits(3, 300)
    logits[1] = torch.nan
    requests = [make_request(top_p=0.7, top_k=40) for _ in range(3)]
    tokens = draw(logits, torch.arange(3), requests)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 300
    assert torch.equal(tokens[[0, 2]], draw(logits[[0, 2]], torch.arange(2), [requests[0], requests[2]]))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_sorted_and_the_work_does_not_follow_the_values() -> None:
    """The same operations for a flat distribution as for a peaked one, none of them a sort or a search for the best."""
    seen = []
    for scale in (0.0, 0.3, 30.0):
        with Operations() as operations:
            filtered_weights(random_logits(len(GRID), 3000, scale=scale), [make_request(**f) for f in GRID])
        seen.append(operations.names)
    assert seen[0] == seen[1] == seen[2]
    assert not {"aten::sort", "aten::topk", "aten::kthvalue", "aten::nonzero"} & set(seen[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where torch sees an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_waits_for_nothing_and_a_row_is_the_same_alone(dtype: torch.dtype) -> None:
    requests = [make_request(seed=n, **fields) for n, fields in enumerate(GRID)]
    logits = random_logits(len(GRID), 128_256, scale=1.0).to(dtype)
    here = draw(logits, torch.arange(len(GRID)), requests)
    there, rows = logits.cuda(), torch.arange(len(GRID)).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = draw(there, rows, requests)
        alone = torch.cat([draw(there, rows[i : i + 1], [request]) for i, request in enumerate(requests)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(together, alone)
    assert torch.equal(together.cpu(), here)
