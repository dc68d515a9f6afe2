"""Biases, allowed tokens and bad words against transformers' logits processors."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from server.engine.messages import SamplingParams
from server.engine.request import NO_TOKEN, NOT_FINITE, Request
from server.model.sampler import Sampler

EOS, VOCAB = 2, 40


def make_request(prompt=(5, 6, 7), output=(), **params) -> Request:
    fields = {"max_tokens": 100, "temperature": 0.0, **params}
    return Request("r", [*prompt, *output], len(prompt), SamplingParams(**fields))


def random_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(request: Request, logits: torch.Tensor) -> torch.Tensor:
    return Sampler([EOS])._adjusted(logits.clone(), [request])


def by_transformers(request: Request, logits: torch.Tensor, *processors) -> torch.Tensor:
    """Over the output alone behind one token of the prompt, as transformers' processors want something to see."""
    seen = torch.tensor([[request.token_ids[request.num_prompt - 1], *request.token_ids[request.num_prompt :]]])
    return LogitsProcessorList(processors)(seen, logits.clone())


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


words = st.lists(st.lists(st.integers(3, 8), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8, unique=True)


@settings(max_examples=150, deadline=None)
@given(words, st.lists(st.integers(3, 8), max_size=7))
def test_bad_words_are_those_of_transformers(bad_words, output) -> None:
    """Few tokens, so sequences overlap, nest and repeat. The prompt's last token is in no word."""
    request = make_request(prompt=[9], output=output, bad_words=tuple(bad_words))
    logits = random_logits()
    processor = NoBadWordsLogitsProcessor([list(word) for word in bad_words])
    equal(adjusted(request, logits), by_transformers(request, logits, processor))


def test_a_bad_word_that_began_in_the_prompt_may_end_in_the_output() -> None:
    """The output is what may not complete a word; also with transformers the difference shows here only."""
    logits = random_logits()
    equal(adjusted(make_request(prompt=[4, 5], bad_words=((4, 5, 6), (5, 7))), logits), logits)
    found = adjusted(make_request(prompt=[4], output=[5], bad_words=((4, 5, 6), (5, 7))), logits)
    assert found[0].isinf().nonzero()[:, 0].tolist() == [7]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), min_size=1))
def test_biases_are_those_of_transformers(bias) -> None:
    request = make_request(logit_bias=tuple(bias.items()))
    logits = random_logits()
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    equal(adjusted(request, logits), by_transformers(request, logits, processor))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, unique=True))
def test_allowed_tokens_are_those_of_transformers(allowed) -> None:
    request = make_request(allowed_token_ids=tuple(allowed))
    logits = random_logits()
    expected = by_transformers(request, logits, PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1))
    equal(adjusted(request, logits), expected)
    others = [token for token in range(VOCAB) if token not in allowed]
    if others:
        equal(expected, by_transformers(request, logits, SuppressTokensLogitsProcessor(others)))


@pytest.mark.parametrize("seed", range(20))
def test_all_together_in_the_order_of_transformers(seed: int) -> None:
    """Bias before the repetition penalty: a bias that turns a sign turns division into multiplication."""
    rng = random.Random(seed)
    output = [rng.randrange(3, 9) for _ in range(6)]
    bias = {token: rng.uniform(-9, 9) for token in range(3, 12)}
    bad_words = ((output[-1], 10), (11,), (output[-2], output[-1], 12))
    request = make_request(
        prompt=[9],
        output=output,
        logit_bias=tuple(bias.items()),
        bad_words=bad_words,
        allowed_token_ids=tuple(range(3, 30)),
        repetition_penalty=1.7,
    )
    logits = random_logits(seed=seed)
    expected = by_transformers(
        request,
        logits,
        SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        RepetitionPenaltyLogitsProcessor(1.7),
        NoBadWordsLogitsProcessor([list(word) for word in bad_words]),
        PrefixConstrainedLogitsProcessor(lambda *_: list(range(3, 30)), 1),
    )
    equal(adjusted(request, logits), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": (EOS,), "min_tokens": 2},
        {"allowed_token_ids": (4, 5), "bad_words": ((4,), (5,))},
        {"allowed_token_ids": (VOCAB, 999)},
        {"allowed_token_ids": (4,), "bad_words": ((4,),), "logit_bias": ((4, 100.0),), "repetition_penalty": 1.4},
    ],
)
def test_a_row_with_nothing_left_fails_alone(temperature: float, params) -> None:
    requests = [make_request(temperature=temperature), make_request(temperature=temperature, **params)]
    requests += [make_request(temperature=temperature, allowed_token_ids=(8,))]
    tokens = Sampler([EOS]).sample(random_logits(3), requests).tolist()
    assert tokens[1] == NO_TOKEN and tokens[2] == 8 and 0 <= tokens[0] < VOCAB


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masks_do_not_hide_a_broken_row(bad: float) -> None:
    logits = random_logits()
    logits[0, 30] = bad
    for params in ({"allowed_token_ids": (4,)}, {"bad_words": ((30,),)}, {"allowed_token_ids": (VOCAB,)}):
        assert Sampler([EOS]).sample(logits, [make_request(**params)]).item() == NOT_FINITE


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ids_outside_the_vocabulary_are_no_tokens(temperature: float) -> None:
    """-1 is the last token to an index; here it is none."""
    logits = random_logits()
    plain = make_request(temperature=temperature)
    odd = make_request(
        temperature=temperature,
        logit_bias=((-1, 100.0), (VOCAB, 100.0)),
        bad_words=((-1,), (VOCAB,), (7, VOCAB + 3)),
        output=[],
    )
    assert Sampler([EOS]).sample(logits, [odd]).tolist() == Sampler([EOS]).sample(logits, [plain]).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_edits_of_one_row_leave_the_others(temperature: float) -> None:
    """Alone, among others and in another order: the same tokens; the logits given are not written."""
    logits = random_logits(6)
    kinds = [
        {},
        {"logit_bias": ((7, 3.0), (9, -50.0))},
        {"bad_words": ((3, 4), (5,))},
        {"allowed_token_ids": tuple(range(10, 30)), "top_k": 4},
        {"min_tokens": 5, "presence_penalty": 1.0},
        {"logit_bias": ((EOS, 90.0),), "min_tokens": 5},
    ]

    def requests() -> list[Request]:
        return [make_request(output=[3], temperature=temperature, seed=n, **kind) for n, kind in enumerate(kinds)]

    before = logits.clone()
    together = Sampler([EOS]).sample(logits, requests()).tolist()
    assert torch.equal(logits, before)
    alone = [Sampler([EOS]).sample(logits[n : n + 1], [r]).item() for n, r in enumerate(requests())]
    backwards = Sampler([EOS]).sample(logits.flip(0), requests()[::-1]).tolist()
    assert together == alone == backwards[::-1]
    assert together[5] != EOS, "an end is masked whatever its bias"


def test_a_banned_sequence_never_appears() -> None:
    """Drawn from three equal tokens for a long time, and never 3 4 3, 4 4 4 or 5."""
    logits = torch.full((1, VOCAB), -30.0)
    logits[0, 3:6] = 5.0
    request = make_request(temperature=1.0, bad_words=((3, 4, 3), (4, 4, 4), (5,)), seed=3)
    sampler = Sampler([EOS])
    for _ in range(400):
        request.token_ids.append(sampler.sample(logits, [request]).item())
    text = "".join(map(str, request.token_ids[3:]))
    assert set(text) == {"3", "4"} and "343" not in text and "444" not in text
    assert "3443" in text and "333" in text
