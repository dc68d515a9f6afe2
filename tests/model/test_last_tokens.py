"""Draws of requests whose last token only the device has: the same bits as when the host knows it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import Request
from server.model.penalties import TokenCounts, _seen_tokens, _with_last, apply_penalties
from server.model.sampler import Sampler
from tests.model.test_sampler import EOS, make_request, mixed_requests, random_logits

VOCAB = 12


def without_last(request: Request) -> Request:
    """The same request a step earlier: its last token is being drawn, and the next one too."""
    ahead = copy.copy(request)
    ahead.token_ids, ahead.num_draws, ahead.penalty_state = request.token_ids[:-1], 2, None
    assert ahead.lacks_last_token and ahead.draw_index == request.draw_index == request.num_output
    return ahead


tokens = st.integers(0, VOCAB - 1)
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.4]),
    }
)
rows = st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, min_size=1, max_size=8), penalties)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(rows, st.booleans()), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_token_on_the_device_is_penalised_like_one_on_the_host(of, seed) -> None:
    """Rows that lack it beside rows that don't; it may stand in the prompt, in the output before, or nowhere."""
    known = [make_request(prompt, output, **params) for (prompt, output, params), _ in of]
    mixed = [without_last(request) if lacks else request for request, (_, lacks) in zip(known, of, strict=True)]
    last_tokens = torch.tensor([request.token_ids[-1] for request in known])
    logits = random_logits(len(of), VOCAB, seed=seed)
    expected, found = logits.clone(), logits.clone()
    apply_penalties(expected, known)
    for request in mixed:
        request.penalty_state = None
    apply_penalties(found, mixed, last_tokens)
    assert torch.equal(found, expected)


def test_a_token_seen_before_is_counted_alike_wherever_it_stands() -> None:
    """What is written for it twice has to be the same: a GPU says nothing of which comes last."""
    requests = [make_request([1, 2], [3, 3, 2], presence_penalty=1.0), make_request([3], [1], presence_penalty=1.0)]
    requests.append(make_request([5], [6, 6, 6, 7], presence_penalty=1.0))
    ahead = [without_last(request) for request in requests]
    last_tokens = torch.tensor([request.token_ids[-1] for request in requests])
    known = _seen_tokens([0, 1, 2], ahead, last_tokens.device)
    seen = _with_last(known, torch.tensor([0, 2]), last_tokens)
    found: dict[tuple[int, int], set[int]] = {}
    for row, token, count in zip(*(one.tolist() for one in seen), strict=True):
        found.setdefault((row, token), set()).add(count)
    assert found == {(0, 1): {0}, (0, 2): {1}, (0, 3): {2}, (1, 3): {0}, (2, 5): {0}, (2, 6): {3}, (2, 7): {1}}


def by_definition(row: torch.Tensor, request: Request) -> torch.Tensor:
    params, row = request.params, row.clone()
    for token in set(request.token_ids):
        count = request.token_ids[request.num_prompt :].count(token)
        value = row[token]
        value = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        row[token] = value - (params.frequency_penalty * count + params.presence_penalty * (count > 0))
    return row


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 1000))
def test_penalties_are_what_they_are_defined_as(of, seed) -> None:
    requests = [make_request(prompt, output, **params) for prompt, output, params in of]
    logits = random_logits(len(of), VOCAB, seed=seed)
    expected = torch.stack([by_definition(row, request) for row, request in zip(logits, requests, strict=True)])
    apply_penalties(logits, requests)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("num_output", "is_masked"), [(1, True), (2, True), (3, False)])
def test_the_end_is_masked_below_min_tokens_by_the_index_of_the_draw(num_output, is_masked) -> None:
    """A token that is not known yet counts."""
    logits = random_logits(1, VOCAB)
    logits[0, EOS] = 99.0
    request = make_request([5], [4] * num_output, temperature=0.0, min_tokens=3)
    for one in (request, without_last(request)):
        token = Sampler([EOS]).sample(logits, [one], torch.tensor([4])).item()
        assert (token != EOS) == is_masked


def test_a_token_without_a_place_to_look_is_an_error() -> None:
    request = without_last(make_request([1], [2], presence_penalty=1.0))
    with pytest.raises(AssertionError, match="nobody says where"):
        apply_penalties(random_logits(1, VOCAB), [request])


def test_counts_take_in_the_token_when_it_is_known() -> None:
    request = make_request([1], [2, 3], presence_penalty=1.0)
    ahead = without_last(request)
    apply_penalties(random_logits(1, VOCAB), [ahead], torch.tensor([3]))
    ahead.token_ids, ahead.num_draws = request.token_ids, 1
    counts = TokenCounts.of(ahead)
    assert dict(zip(counts.ids.tolist(), counts.output_counts.tolist(), strict=True)) == {1: 0, 2: 1, 3: 1}


def test_draws_are_those_of_a_host_that_knows_all() -> None:
    """Greedy, seeded, penalised, below min_tokens: by the index of the draw, not by what is known."""
    known = [request for request in mixed_requests(42) if request.num_output]
    logits = random_logits(len(known), 3000)
    last_tokens = torch.tensor([request.token_ids[-1] for request in known])
    expected = Sampler([EOS]).sample(logits, known)
    ahead = [without_last(request) for request in known]
    assert torch.equal(Sampler([EOS]).sample(logits, ahead, last_tokens), expected)
    assert not torch.equal(Sampler([EOS]).sample(logits, ahead, expected), expected), "it counts nothing"
