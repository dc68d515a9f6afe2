"""Logprobs, biases and priorities through a whole engine core: chunks, prefix cache, preemption, adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from server.engine.messages import SamplingParams, TokenLogprobs
from server.engine.request import RequestState
from server.offline import LLM
from tests.driver import Answer, Driver
from tests.zoo import ZooAdapter, load_oracle_base, peft_oracle, random_prompts, save_adapter, tiny_base

ATOL = 2e-3
HEAD = "head"  # an adapter on the tied head and some projections


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tied tiny base, and beside it a folder with one adapter."""
    root = tmp_path_factory.mktemp("logprobs")
    path = tiny_base(root / "base", "llama", tie_word_embeddings=True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj", "down_proj"])
    save_adapter(load_oracle_base(path), config, root / "adapters" / HEAD, 7, scale=1.0, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def drive(base: Path, cache: Path, **config: object) -> Driver:
    return Driver(base, base.parent / "adapters", cache, max_step_tokens=24, max_num_seqs=8, threads=1, **config)


@pytest.fixture
def driver(base: Path, cache: Path) -> Iterator[Driver]:
    driver = drive(base, cache)
    yield driver
    driver.assert_nothing_leaked()
    driver.close()


def asking(max_tokens: int = 5, **fields: object) -> SamplingParams:
    params = {"temperature": 0.0, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 3, **fields}
    return SamplingParams(max_tokens=max_tokens, **params)


def oracle_logprobs(base: Path, adapter: str | None, token_ids: Sequence[int]) -> torch.Tensor:
    """log_softmax of unmodified transformers' logits, PEFT's adapter unmerged on it: [tokens, V]."""
    zoo = ZooAdapter(adapter, base.parent / "adapters" / adapter) if adapter else None
    with peft_oracle(load_oracle_base(base), zoo) as model, torch.inference_mode():
        return model(torch.tensor([list(token_ids)])).logits[0].log_softmax(-1)


def check(base: Path, adapter: str | None, prompt: list[int], answer: Answer, params: SamplingParams) -> None:
    """Every prompt token but the first and every output token, against one forward pass of the oracle."""
    expected = oracle_logprobs(base, adapter, [*prompt, *answer.token_ids])
    told: list[TokenLogprobs] = [*(answer.prompt_logprobs or []), *answer.logprobs]
    assert len(answer.prompt_logprobs or []) == len(prompt) - 1 and len(answer.logprobs) == len(answer.token_ids)
    assert [one.token_id for one in told] == [*prompt[1:], *answer.token_ids]
    for index, (one, row) in enumerate(zip(told, expected, strict=False)):
        num_top = (params.prompt_logprobs if index < len(prompt) - 1 else params.logprobs) or 0
        assert one.logprob == pytest.approx(row[one.token_id].item(), abs=ATOL)
        assert [value for _, value in one.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=ATOL)


def test_prompts_in_chunks_with_and_without_an_adapter(base: Path, driver: Driver) -> None:
    """Prompts of several chunks, a tied head with an adapter on it; the adapter changes the numbers."""
    prompt = random_prompts(1, 320, seed=1, lengths=(50, 50))[0]
    ids = {name: driver.submit(prompt, name, asking()) for name in (None, HEAD)}
    silent = driver.submit(prompt[:30], HEAD)
    answers = driver.finish([*ids.values(), silent])
    for name, request_id in ids.items():
        check(base, name, prompt, answers[request_id], asking())
    own, other = (answers[request_id].prompt_logprobs for request_id in ids.values())
    assert max(abs(a.logprob - b.logprob) for a, b in zip(own, other, strict=True)) > 0.1
    assert answers[silent].logprobs == [] and answers[silent].prompt_logprobs is None


def test_nothing_is_taken_from_the_prefix_cache(base: Path, driver: Driver) -> None:
    """A cached position has no logits. What such a request computes may be taken by others."""
    prompt = random_prompts(1, 320, seed=2, lengths=(40, 40))[0]
    driver.finish([driver.submit(prompt)])
    num_queried = driver.core.scheduler.stats().prefix_queries
    asked = driver.submit(prompt, None, asking())
    assert driver.finish([asked])[asked].num_cached_tokens == 0
    check(base, None, prompt, driver.answers[asked], asking())
    assert driver.core.scheduler.stats().prefix_queries == num_queried, "it asked nothing of the cache"
    later = driver.submit(prompt)
    assert driver.finish([later])[later].num_cached_tokens == 32
    of_output = driver.submit(prompt, None, asking(prompt_logprobs=None))
    assert driver.finish([of_output])[of_output].num_cached_tokens == 32
    assert [one.logprob for one in driver.answers[of_output].logprobs] == pytest.approx(
        [one.logprob for one in driver.answers[asked].logprobs], abs=1e-4
    )
    fresh = [8, *prompt]
    driver.finish([driver.submit(fresh, None, asking())])
    filled = driver.submit(fresh)
    assert driver.finish([filled])[filled].num_cached_tokens == 32


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_preemption_tells_nothing_twice(base: Path, cache: Path, has_prefix_cache: bool) -> None:
    """Too few blocks for all: requests are preempted in mid-answer, computed anew, and told of once."""
    blocks = 11 * 2 * 3 * 16 * 2 * 16 * 4  # k and v, layers, positions, heads, head_dim, fp32
    driver = drive(base, cache, kv_memory=blocks, enable_prefix_cache=has_prefix_cache)
    prompts = random_prompts(5, 320, seed=3, lengths=(20, 45))
    names = [None, HEAD, None, HEAD, None]
    params = asking(30)
    ids = [driver.submit(p, name, params) for p, name in zip(prompts, names, strict=True)]
    driver.finish(ids)
    assert driver.core.scheduler.num_preemptions > 0
    for request_id, name, prompt in zip(ids, names, prompts, strict=True):
        check(base, name, prompt, driver.answers[request_id], params)
    driver.assert_nothing_leaked()
    driver.close()


def test_rows_of_the_head_are_bounded(base: Path, cache: Path, monkeypatch) -> None:
    """At most so many logits a step for prompt logprobs; the numbers are the same, in more steps."""
    monkeypatch.setattr("server.engine.build.MAX_PROMPT_LOGITS", 5 * 320)
    driver = drive(base, cache)
    runner, widths = driver.core._runner, []
    original = runner.logits
    monkeypatch.setattr(runner, "logits", lambda batch: (widths.append(len(batch.prompt_rows)), original(batch))[1])
    prompts = random_prompts(3, 320, seed=4, lengths=(20, 30))
    ids = [driver.submit(p, HEAD, asking()) for p in prompts]
    driver.finish([*ids, driver.submit(prompts[0])])
    assert max(widths) == 5 and sum(widths) == sum(len(p) - 1 for p in prompts)
    for request_id, prompt in zip(ids, prompts, strict=True):
        check(base, HEAD, prompt, driver.answers[request_id], asking())
    driver.assert_nothing_leaked()
    driver.close()


def test_no_output_tokens_at_all(base: Path, driver: Driver) -> None:
    """max_tokens 0, for echo: what the prompt gives, and the end."""
    prompt = random_prompts(1, 320, seed=5, lengths=(30, 30))[0]
    ids = [driver.submit(prompt, HEAD, asking(0)), driver.submit([9], None, asking(0)), driver.submit([9, 8])]
    zero, one, _ = driver.finish(ids).values()
    check(base, HEAD, prompt, zero, asking(0))
    assert zero.finish_reason == one.finish_reason == "length" and zero.token_ids == one.token_ids == []
    assert one.prompt_logprobs == [] and one.logprobs == [] and zero.num_cached_tokens == 0
    longest = random_prompts(1, 320, seed=5, lengths=(512, 512))[0]
    full = driver.submit(longest, None, asking(0, prompt_logprobs=0))
    assert len(driver.finish([full])[full].prompt_logprobs) == 511
    refused = driver.submit(longest, None, asking(1))
    assert driver.finish([refused])[refused].error.code == "context_length_exceeded"


def test_alone_and_in_company(base: Path, driver: Driver) -> None:
    prompts = random_prompts(6, 320, seed=6, lengths=(3, 40))
    names = [None, HEAD, HEAD, None, HEAD, None]
    params = [asking(6, logprobs=n % 3, prompt_logprobs=n % 4, temperature=n % 2, seed=n) for n in range(6)]
    ids = [driver.submit(*one) for one in zip(prompts, names, params, strict=True)]
    driver.finish(ids)
    for request_id, *one in zip(ids, prompts, names, params, strict=True):
        lonely = driver.submit(*one)
        alone, together = driver.finish([lonely])[lonely], driver.answers[request_id]
        assert alone.token_ids == together.token_ids
        pairs = zip(
            [*alone.prompt_logprobs, *alone.logprobs], [*together.prompt_logprobs, *together.logprobs], strict=True
        )
        for a, b in pairs:
            assert (a.token_id, a.rank, [i for i, _ in a.top]) == (b.token_id, b.rank, [i for i, _ in b.top])
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_a_request_with_nothing_to_draw_ends_alone(driver: Driver) -> None:
    """At once, or when its output has made the last allowed token a bad word."""
    prompt = random_prompts(1, 320, seed=7, lengths=(10, 10))[0]
    good = driver.submit(prompt)
    at_once = driver.submit(prompt, HEAD, asking(allowed_token_ids=(5,), bad_words=((5,),)))
    later = driver.submit(prompt, None, asking(allowed_token_ids=(5,), bad_words=((5, 5, 5),)))
    answers = driver.finish([good, at_once, later])
    for request_id, tokens in ((at_once, []), (later, [5, 5])):
        error = answers[request_id].error
        assert answers[request_id].token_ids == tokens and answers[request_id].finish_reason == "error"
        assert (error.status, error.code) == (400, "no_token_allowed") and "bad_words" in error.message
    assert answers[good].finish_reason == "length"


def test_a_prompt_position_that_is_not_finite(driver: Driver) -> None:
    """Logits that overflow at one prompt position end the request, as an error and not as a NaN in an answer."""
    head = driver.core._runner._forward._model.get_output_embeddings()
    prompt = random_prompts(1, 320, seed=8, lengths=(12, 12))[0]

    def overflow(module, args, output):
        output[..., 1, :] = torch.inf  # row 0 is the sampled one
        return output

    handle = head.register_forward_hook(overflow)
    asked = driver.submit(prompt, None, asking())
    answer = driver.finish([asked])[asked]
    handle.remove()
    assert answer.error.code == "not_finite" and answer.prompt_logprobs is None


# --- priority -----------------------------------------------------------------------------------------------


def test_priority_comes_with_the_request(driver: Driver) -> None:
    """Nine wait for eight places: the ones of least number run, whoever came first."""
    prompts = random_prompts(9, 320, seed=9, lengths=(3, 3))
    ids = [driver.submit(p, None, asking(3), priority=-n) for n, p in enumerate(prompts)]
    driver.step()
    states = {r.request_id: r.state for r in driver.core.scheduler._requests.values()}
    assert [states[i] for i in ids] == [RequestState.WAITING] + [RequestState.RUNNING] * 8
    driver.finish(ids)


# --- offline ------------------------------------------------------------------------------------------------


def test_offline_answers_have_them(base: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    llm = LLM(str(base), adapters=base.parent / "adapters")
    monkeypatch.setattr(llm, "_tokenizer", type("Ids", (), {"decode": staticmethod(str)}))
    prompts = random_prompts(2, 320, seed=10, lengths=(8, 8))
    free = llm.generate(prompts, adapter=[None, HEAD], max_tokens=4, temperature=0.0, logprobs=1, prompt_logprobs=0)
    for prompt, name, answer in zip(prompts, (None, HEAD), free, strict=True):
        params = asking(4, logprobs=1, prompt_logprobs=0)
        check(base, name, prompt, answer, params)
    biased = llm.generate(prompts, max_tokens=2, temperature=0.0, ignore_eos=True, logit_bias={17: 1e4})
    assert [answer.token_ids for answer in biased] == [[17, 17]] * 2 and biased[0].logprobs == []
    llm.close()
