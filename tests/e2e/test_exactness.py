"""fp32: greedy tokens equal unmerged PEFT's, 32 ragged adapters and base rows together in one batch."""

from __future__ import annotations

import pytest
import torch

from adapters_store.cpus import available_cpus
from server.demo import ensure_demo_base
from server.engine.messages import SamplingParams
from tests.driver import Driver
from tests.zoo import greedy_tokens, load_oracle_base, make_zoo, peft_oracle, random_prompts, tiny_base

NUM_ADAPTERS = 32
NUM_BASE_ROWS = 6
ROOM = {"adapter_memory": 2 << 30, "kv_memory": 256 << 20, "max_step_tokens": 1024}  # the first step has all of them

BASES = {
    "qwen3": lambda path: tiny_base(path, "qwen3"),
    "gemma3": lambda path: tiny_base(path, "gemma3_text", tie_word_embeddings=False, sliding_window=16),
    "demo": lambda path: ensure_demo_base(),
}


@pytest.fixture(scope="module", params=BASES)
def world(request, tmp_path_factory):
    """A base, a zoo of 32 adapters for it, prompts, and what the oracle answers to each."""
    root = tmp_path_factory.mktemp(request.param)
    is_demo = request.param == "demo"
    threads = available_cpus() if is_demo else 1  # tiny matrices: a second thread only waits for the first
    torch.set_num_threads(threads)
    base_path = BASES[request.param](root / "base")
    oracle = load_oracle_base(base_path)
    zoo = make_zoo(oracle, root / "adapters", NUM_ADAPTERS, scale=0.5 if is_demo else 1.0)
    num_tokens = 8 if is_demo else 16
    prompts = random_prompts(NUM_ADAPTERS + NUM_BASE_ROWS, oracle.config.vocab_size, seed=5, lengths=(5, 30))
    adapters = [*zoo, *[None] * NUM_BASE_ROWS]
    expected = []
    for adapter, prompt in zip(adapters, prompts, strict=True):
        with peft_oracle(oracle, adapter) as model:
            expected.append(greedy_tokens(model, prompt, num_tokens))
    base_answers = [greedy_tokens(oracle, prompt, num_tokens) for prompt in prompts[:NUM_ADAPTERS]]
    del oracle
    driver = Driver(base_path, root / "adapters", root / "cache", threads=threads, **ROOM)
    names = [adapter.name if adapter else None for adapter in adapters]
    yield driver, names, prompts, expected, base_answers, num_tokens
    driver.close()


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def test_one_batch_equals_unmerged_peft(world):
    driver, names, prompts, expected, base_answers, num_tokens = world
    ids = [driver.submit(p, n, greedy(num_tokens)) for p, n in zip(prompts, names, strict=True)]
    driver.wait_for_loads()
    answers = driver.finish(ids)
    wrong = [names[i] for i, request_id in enumerate(ids) if answers[request_id].token_ids != expected[i]]
    assert not wrong
    assert driver.max_distinct_adapters == NUM_ADAPTERS  # they really shared a step, with base rows beside
    # the oracle itself must be able to tell adapters apart
    assert sum(expected[i] != base_answers[i] for i in range(NUM_ADAPTERS)) >= NUM_ADAPTERS * 3 // 4


def test_alone_equals_co_batched(world):
    driver, names, prompts, expected, _, num_tokens = world
    for i in range(0, len(prompts), 5):
        request_id = driver.submit(prompts[i], names[i], greedy(num_tokens))
        assert driver.finish([request_id])[request_id].token_ids == expected[i], names[i]


def test_base_rows_are_bit_equal_to_the_same_batch_without_adapters(world):
    driver, names, prompts, *_ = world
    with_adapters, without, is_base = driver.logits_with_and_without_adapters(prompts, names)
    assert is_base.sum() == NUM_BASE_ROWS
    assert torch.equal(with_adapters[is_base], without[is_base])
    assert not torch.equal(with_adapters[~is_base], without[~is_base])
