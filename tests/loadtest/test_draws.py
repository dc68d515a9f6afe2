"""What is drawn, against the formulas: seeded, so each bound holds or does not, always."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loadtest.arrivals import parse_arrivals
from loadtest.lengths import parse_lengths
from loadtest.popularity import parse_popularity, power_weights
from loadtest.workload import WorkloadSpec, draw, expand_names

NUM = 200_000


def rng(seed=1):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("text", "cv"), [("poisson:5", 1.0), ("gamma:5:4", 4.0), ("gamma:5:0.5", 0.5)])
def test_gaps_have_the_rate_and_the_cv(text, cv):
    arrivals = parse_arrivals(text)
    times = arrivals.times(NUM, rng())
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 5, rel=4 * cv / NUM**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)
    assert arrivals.burstiness == pytest.approx(1 / cv**2)


def test_poisson_gaps_are_exponential():
    gaps = np.sort(np.diff(parse_arrivals("poisson:2").times(NUM, rng()), prepend=0.0))
    distance = np.abs(np.arange(1, NUM + 1) / NUM - (1 - np.exp(-2 * gaps))).max()
    assert distance < 1.63 / NUM**0.5  # Kolmogorov-Smirnov, 1 %


def test_constant_all_and_closed():
    np.testing.assert_allclose(parse_arrivals("constant:4").times(5, rng()), [0, 0.25, 0.5, 0.75, 1.0])
    assert not parse_arrivals("all").times(5, rng()).any()
    closed = parse_arrivals("closed:3")
    assert (closed.concurrency, closed.is_open) == (3, False)
    assert [closed.bounded(bound) for bound in (None, 2, 8)] == [3, 2, 3]
    assert [parse_arrivals("all").bounded(bound) for bound in (None, 2)] == [None, 2]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("uniform", np.ones(8)),
        ("zipf:1.5", np.arange(1, 9) ** -1.5),
        ("shares:5,3,2", np.array([5, 3, 2, 0, 0, 0, 0, 0])),
        ("shares:c=0.3,*=0.7", np.array([0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1])),
    ],
)
def test_popularity_follows_its_weights(text, weights):
    drawn = np.bincount(parse_popularity(text, "abcdefgh")(NUM, rng()), minlength=8)
    expected = weights / weights.sum() * NUM
    assert (np.abs(drawn - expected) <= 4.5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_the_power_law_is_the_one_of_s_lora(alpha):
    """Which draws floor(power(alpha) * n): the weights are its cells."""
    names = [str(index) for index in range(100)]
    drawn = np.bincount(parse_popularity(f"power:{alpha}", names)(NUM, rng()), minlength=100)
    theirs = np.bincount((rng(2).power(alpha, NUM) * 100).astype(int), minlength=100)
    expected = power_weights(alpha, 100) * NUM
    for counts in (drawn, theirs):
        assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()
    assert power_weights(alpha, 100)[0] == pytest.approx(0.01**alpha)


def test_distinct_repeats_a_name_only_after_all_others():
    drawn = parse_popularity("distinct", "abcdefgh")(20, rng())
    assert sorted(drawn[:8]) == list(range(8))
    assert (drawn[8:16] == drawn[:8]).all()


def test_lengths():
    assert set(parse_lengths("7")(10, rng())) == {7}
    uniform = parse_lengths("uniform:3:6")(NUM, rng())
    assert (np.abs(np.bincount(uniform)[3:] - NUM / 4) < 4.5 * (NUM / 4) ** 0.5).all()
    lognormal = parse_lengths("lognormal:100:0.8")(NUM, rng())
    assert np.median(lognormal) == pytest.approx(100, rel=0.02)
    assert np.log(lognormal).std() == pytest.approx(0.8, rel=0.01)
    held = parse_lengths("lognormal:100:2:20:300")(NUM, rng())
    assert (held.min(), held.max()) == (20, 300)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_arrivals, text) for text in ("poisson", "poisson:0", "gamma:1", "closed:1.5", "x:1", "poisson:inf")),
        *((parse_arrivals, text) for text in ("gamma:1000:1e160", "gamma:1000:1e-160")),
        *(
            (parse_lengths, text)
            for text in ("0", "uniform:5:4", "lognormal:10", "lognormal:10:1:9", "x", "1.5", "uniform:1:1e30")
        ),
        *(
            (lambda text: parse_popularity(text, "ab"), text)
            for text in ("zipf", "power:0", "shares:1,2,3", "shares:c=1", "shares:0,0", "shares:a=1,b=1,*=1", "x")
        ),
        (lambda text: parse_popularity(text, "ab"), "shares:1e308,1e308"),
    ],
)
def test_what_makes_no_sense_is_named(parse, text):
    with pytest.raises(ValueError, match=text[:2]):
        parse(text)


def test_a_workload_is_its_seed():
    spec = WorkloadSpec(seed=3, num_requests=50, arrivals="poisson:9", num_adapters=4, base_share=0.25)
    assert draw(spec, "abcd") == draw(spec, "abcd")
    assert draw(spec, "abcd") != draw(dataclasses.replace(spec, seed=4), "abcd")


def test_one_property_leaves_the_others_as_they_were():
    spec = WorkloadSpec(num_requests=50, arrivals="poisson:9", num_adapters=4, output_tokens="uniform:1:9")
    _, one = draw(spec, "abcd")
    _, other = draw(dataclasses.replace(spec, popularity="zipf:2", arrivals="gamma:2:3"), "abcd")
    assert [r.adapter for r in one] != [r.adapter for r in other]
    assert [(r.prompt, r.max_tokens) for r in one] == [(r.prompt, r.max_tokens) for r in other]


def test_the_share_of_the_base():
    spec = WorkloadSpec(num_requests=5000, num_adapters=3, base_share=0.9, prompt_tokens="1")
    _, requests = draw(spec, "abc")
    adapters = [request.adapter for request in requests]
    assert adapters.count(None) == pytest.approx(4500, abs=4.5 * (5000 * 0.9 * 0.1) ** 0.5)
    assert set(adapters) == {None, 0, 1, 2}


@pytest.mark.parametrize("fields", [{"popularity": "zipf"}, {"popularity": "shares:a=1"}, {"base_share": 1.5}])
def test_what_is_wrong_of_adapters_is_refused_without_any_too(fields):
    with pytest.raises(ValueError, match=r"popularity|base share"):
        draw(WorkloadSpec(num_requests=1, **fields), [])


@pytest.mark.parametrize("popularity", ["uniform", "zipf:1", "power:0.3", "distinct"])
def test_without_adapters_all_go_to_the_base(popularity):
    _, requests = draw(WorkloadSpec(num_requests=3, popularity=popularity), [])
    assert [request.adapter for request in requests] == [None] * 3


@pytest.mark.parametrize(("lowest", "highest"), [(-1, 5), (5, 5), (5, 10**30)])
def test_prompt_ids_that_are_none_name_their_flags(lowest, highest):
    with pytest.raises(ValueError, match=r"--lowest-id .* --highest-id"):
        draw(WorkloadSpec(lowest_id=lowest, highest_id=highest), [])


def test_prompts_have_the_asked_length_and_ids():
    _, ids = draw(WorkloadSpec(num_requests=20, lowest_id=5, highest_id=9, prompt_tokens="uniform:1:30"), [])
    assert all(len(request.prompt) == request.prompt_tokens for request in ids)
    assert {token for request in ids for token in request.prompt} == {5, 6, 7, 8}
    _, words = draw(WorkloadSpec(num_requests=1, prompt_kind="text", prompt_tokens="12"), [])
    assert len(words[0].prompt.split()) == 12


def test_names():
    assert expand_names("a,b-[08-11],c") == ["a", "b-08", "b-09", "b-10", "b-11", "c"]
    assert expand_names("a[0-1]b[9-10]") == ["a0b9", "a0b10", "a1b9", "a1b10"]
    assert expand_names("") == []


@pytest.mark.parametrize("text", ["a[3-1]", ",", "a,,b"])
def test_names_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="names"):
        expand_names(text)
