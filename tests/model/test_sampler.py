"""The sampler against transformers' logits processors, and its promise: a draw depends on its own row alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.messages import SamplingParams
from server.engine.request import NOT_FINITE, Request
from server.model import sampler as sampler_module
from server.model.penalties import TokenCounts
from server.model.philox import philox4x32, uniforms
from server.model.sampler import Sampler, draw, filtered_weights

EOS = 2


def make_request(prompt=(5, 6, 7), output=(), **params) -> Request:
    fields = {"max_tokens": 100, **params}
    return Request("r", [*prompt, *output], len(prompt), SamplingParams(**fields))


def random_logits(rows: int, vocab_size: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


# --- the generator --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    words = philox4x32(
        tuple(np.array([word], np.uint64) for word in counter),
        tuple(np.array([word], np.uint64) for word in key),
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_uniforms_depend_on_all_bits_of_both() -> None:
    seeds = [0, 1, -1, 2**32, 2**63 - 1]
    pairs = list(itertools.product(seeds, [0, 1, 2, 2**32]))
    numbers = uniforms([seed for seed, _ in pairs], [index for _, index in pairs])
    assert len(set(numbers.tolist())) == len(pairs)
    assert uniforms([-1], [3])[0] == uniforms([2**64 - 1], [3])[0]
    # seed 0, index 0: the first two words of the first known answer
    assert numbers[0] == ((0x6627E8D5 << 20) | (0xE169C58D >> 12)) / 2**52


def test_uniforms_are_uniform_and_below_every_total() -> None:
    numbers = uniforms([7] * 20_000, range(20_000))
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 150  # chi-square, 99 degrees of freedom: p = 7e-4
    largest = (2**52 - 1) / 2**52
    assert all(largest * total < total for total in (1.0, math.nextafter(1, 0), 0.5, 1 / 3, 49152.123, 5e-300))


# --- greedy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_of_the_largest(dtype: torch.dtype) -> None:
    logits = random_logits(3, 50).to(dtype)
    logits[0, [9, 4, 30]] = 99.0
    tokens = Sampler([EOS]).sample(logits, [make_request(temperature=0.0)] * 3)
    assert tokens.tolist() == [4, *logits[1:].argmax(-1).tolist()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_row_that_is_not_finite_fails_alone(temperature: float, bad: float, penalty: float) -> None:
    logits = random_logits(3, 50)
    logits[1, 17] = bad
    requests = [make_request(temperature=temperature, repetition_penalty=penalty) for _ in range(3)]
    tokens = Sampler([EOS]).sample(logits, requests).tolist()
    assert tokens[1] == NOT_FINITE
    assert tokens[0] != NOT_FINITE != tokens[2]
    assert Sampler([EOS]).sample(torch.full((1, 50), -math.inf), requests[:1]).tolist() == [NOT_FINITE]


def test_masking_does_not_hide_a_broken_row() -> None:
    logits = random_logits(1, 50)
    logits[0, EOS] = math.nan
    assert Sampler([EOS]).sample(logits, [make_request(temperature=0.0, min_tokens=5)]).item() == NOT_FINITE


# --- distributions --------------------------------------------------------------------------------------


def hf_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    processors = LogitsProcessorList()
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.zeros(1, 1, dtype=torch.int64), logits.double()[None])[0].softmax(-1)


GRID = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 7, 1500)
    for top_p in (1.0, 0.9, 0.3, 0.001)
    for min_p in (0.0, 0.05)
]


@pytest.mark.parametrize("scale", [0.3, 3.0])  # flat: a nucleus of thousands; peaked: of a few
def test_probabilities_are_those_of_transformers(scale: float) -> None:
    requests = [make_request(**fields) for fields in GRID]
    logits = random_logits(len(GRID), 3000, scale=scale)
    weights = filtered_weights(logits, requests)
    for row, request in enumerate(requests):
        expected = hf_probabilities(logits[row], request.params)
        torch.testing.assert_close(weights[row] / weights[row].sum(), expected, atol=1e-12, rtol=1e-9)


def test_ties_at_an_edge_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, 0.0, 3.0]])
    kept = filtered_weights(logits, [make_request(top_k=2)])[0] > 0
    assert kept.tolist() == [False, True, True, True, False, True]


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[30.0, 40.0, -50.0]])
    assert filtered_weights(logits, [make_request(temperature=5e-324)]).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.8}, {"top_k": 5, "temperature": 1.5}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(fields) -> None:
    """Chi-square of 20,000 draws, one output index each."""
    count = 20_000
    logits = random_logits(1, 40, scale=1.5, seed=1)
    requests = [make_request(output=[0] * n, seed=11, **fields) for n in range(0, count, 100)]
    tokens = []
    for shift in range(100):  # many indices without many tokens: only num_output matters
        for request in requests:
            request.num_prompt = 3 - shift
        tokens.append(draw(logits.expand(len(requests), -1), torch.arange(len(requests)), requests))
    observed = torch.cat(tokens).bincount(minlength=40).double()
    expected = hf_probabilities(logits[0], requests[0].params) * count
    allowed = expected > 0
    assert observed[~allowed].sum() == 0
    statistic = ((observed - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = int(allowed.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("number", "expected"), [(0.0, 3), (1 - 2.0**-52, 6)])
def test_extreme_numbers_land_on_allowed_tokens(number: float, expected: int, monkeypatch) -> None:
    monkeypatch.setattr(sampler_module, "uniforms", lambda seeds, indices: np.full(len(seeds), number))
    logits = torch.tensor([[-math.inf, -9.0, -9.0, 5.0, 4.0, -9.0, 5.0, -9.0, -math.inf]])
    assert draw(logits, torch.tensor([0]), [make_request(top_k=3)]).tolist() == [expected]


# --- independence ---------------------------------------------------------------------------------------


def mixed_requests(count: int) -> list[Request]:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"top_k": 50, "repetition_penalty": 1.2},
        {"min_p": 0.02, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"temperature": 1.3},
        {"temperature": 0.0, "min_tokens": 9},
    ]
    return [
        make_request(prompt=range(3, 9 + n), output=range(n % 7), seed=n, **kinds[n % len(kinds)]) for n in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 22])
def test_batch_composition_changes_no_draw(dtype: torch.dtype, chunk_elements: int, monkeypatch) -> None:
    monkeypatch.setattr(sampler_module, "_CHUNK_ELEMENTS", chunk_elements)
    count, sampler = 30, Sampler([EOS])
    logits = random_logits(count, 5003, scale=1.0).to(dtype)
    together = sampler.sample(logits, mixed_requests(count)).tolist()
    alone = [
        sampler.sample(logits[row : row + 1], [request]).item() for row, request in enumerate(mixed_requests(count))
    ]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2)).tolist()
    requests = mixed_requests(count)
    shuffled = sampler.sample(logits[order], [requests[row] for row in order]).tolist()
    assert together == alone
    assert shuffled == [together[row] for row in order]
    assert len(set(together)) > count // 2


def test_weights_are_the_same_bits_in_any_batch() -> None:
    """Stronger than equal draws: the distribution itself does not move by a rounding."""
    requests = [make_request(**fields) for fields in GRID]
    logits = random_logits(len(GRID), 4999, scale=1.0)
    together = filtered_weights(logits, requests)
    for row, request in enumerate(requests):
        alone = filtered_weights(logits[row : row + 1].clone(), [request])
        assert torch.equal(alone[0], together[row])


def test_the_seed_and_the_index_decide() -> None:
    logits = random_logits(1, 500, scale=0.5).expand(64, -1)
    requests = [make_request(output=[9] * (n // 8), seed=n % 8) for n in range(64)]
    tokens = Sampler([EOS]).sample(logits, requests).tolist()
    assert tokens == Sampler([EOS]).sample(logits, requests).tolist()
    assert len(set(tokens)) > 40


# --- penalties and ends ---------------------------------------------------------------------------------


def test_repetition_penalty_is_that_of_transformers() -> None:
    request = make_request(prompt=[5, 6, 5], output=[9, 9, 4], temperature=0.0, repetition_penalty=1.7)
    logits = random_logits(1, 20)
    adjusted = Sampler([EOS])._adjusted(logits.clone(), [request])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([request.token_ids]), logits.clone())
    torch.testing.assert_close(adjusted, expected, atol=0, rtol=0)


def test_presence_and_frequency_count_the_output_alone() -> None:
    request = make_request(prompt=[5, 6], output=[9, 9, 6, 9], presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = Sampler([EOS])._adjusted(torch.zeros(1, 12), [request])[0]
    expected = torch.zeros(12)
    expected[9] = -0.5 - 3 * 0.25
    expected[6] = -0.5 - 0.25
    torch.testing.assert_close(adjusted, expected, atol=0, rtol=0)


def test_counts_grow_with_the_request() -> None:
    request = make_request(prompt=[1, 2, 2])
    generator = np.random.default_rng(0)
    for token in generator.integers(0, 60, 200).tolist():
        request.token_ids.append(token)
        counts = TokenCounts.of(request)
    fresh = TokenCounts.of(make_request(prompt=[1, 2, 2], output=request.token_ids[3:]))
    assert dict(zip(counts.ids, counts.output_counts, strict=True)) == dict(
        zip(fresh.ids, fresh.output_counts, strict=True)
    )
    expected = np.bincount(request.token_ids[3:], minlength=60)
    assert {int(i): int(c) for i, c in zip(counts.ids, counts.output_counts, strict=True) if c} == {
        i: int(c) for i, c in enumerate(expected) if c
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_keeps_ends_away(temperature: float) -> None:
    logits = torch.zeros(1, 10)
    logits[0, [EOS, 8]] = 50.0
    params = {"temperature": temperature, "min_tokens": 3, "stop_token_ids": (8, 999)}
    sampler = Sampler([EOS])
    for length in range(3):
        assert sampler.sample(logits, [make_request(output=[1] * length, **params)]).item() not in (EOS, 8)
    assert sampler.sample(logits, [make_request(output=[1] * 3, **params)]).item() in (EOS, 8)
    ignoring = make_request(ignore_eos=True, **params)
    assert sampler.sample(logits, [ignoring]).item() == EOS  # an eos that ends nothing is a token like any


def test_penalties_of_one_row_leave_the_others() -> None:
    logits = random_logits(3, 30)
    plain = make_request(temperature=0.0)
    heavy = make_request(output=range(10, 20), temperature=0.0, frequency_penalty=2.0)
    before = logits.clone()
    tokens = Sampler([EOS]).sample(logits, [plain, heavy, plain]).tolist()
    assert torch.equal(logits, before)
    assert [tokens[0], tokens[2]] == logits[[0, 2]].argmax(-1).tolist()
