"""The offline API: bad input is refused before anything is queued, and what is right runs."""

from __future__ import annotations

import math

import pytest

from server.config import EngineConfig
from server.engine.messages import SamplingParams
from server.errors import BadRequest, ContextLengthExceeded
from server.offline import LLM
from tests.zoo import tiny_base


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    root = tmp_path_factory.mktemp("offline")
    base = tiny_base(root / "base", "llama")
    config = EngineConfig(
        model=str(base),
        cache_dir=str(root / "cache"),
        max_model_len=64,
        kv_memory=4 << 20,
        adapter_memory=1 << 20,
        threads=1,
    )
    llm = LLM(config)
    yield llm
    llm.close()


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ],
)
def test_sampling_out_of_range_is_named(llm, sampling, name):
    with pytest.raises(BadRequest) as caught:
        llm.generate([[5, 6]], **sampling)
    assert caught.value.param == name and name in caught.value.message


@pytest.mark.parametrize("bad", [[10**6], [-1], []])
def test_a_bad_prompt_takes_nothing_and_leaves_nothing(llm, bad):
    with pytest.raises(BadRequest):
        llm.generate([[5, 6, 7], bad])
    assert not llm.core.has_work()
    llm.core.check_integrity()


def test_a_prompt_beyond_the_context_and_a_bare_string_are_refused(llm):
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 64 tokens"):
        llm.generate([[5] * 60], max_tokens=5)
    with pytest.raises(BadRequest, match="list of prompts"):
        llm.generate("a string")


def test_top_k_1_and_a_vanishing_temperature_are_greedy(llm):
    def ids(**sampling: object) -> list[int]:
        llm.core.step()
        request = llm.submit([5, 6, 7], None, _params(**sampling))
        found: list[int] = []
        while True:
            for output in llm.core.step().outputs:
                assert output.request_id == request
                found += output.token_ids
                if output.finish_reason:
                    return found

    greedy = ids(temperature=0.0)
    assert ids(temperature=1.0, top_k=1, seed=3) == ids(temperature=1e-8, seed=4) == greedy


def _params(**sampling: object) -> SamplingParams:
    return SamplingParams(max_tokens=8, ignore_eos=True, **sampling)
