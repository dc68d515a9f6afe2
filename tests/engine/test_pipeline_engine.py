"""Two steps in flight over a real base with adapters: as with one, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.inproc import InprocEngine
from server.engine.messages import AddRequest, SamplingParams
from tests.driver import Answer, Driver
from tests.zoo import load_oracle_base, make_zoo, random_prompts, tiny_base

VOCAB = 320
BLOCK_BYTES = 4 * 2 * 2 * 2 * 16 * 4  # positions, layers, k|v, heads, dim, fp32
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 40, "logprobs": 1},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.0, "presence_penalty": 1.5},
    {"temperature": 0.0, "bad_words": ((5, 6), (7,)), "min_tokens": 4},
    {"temperature": 1.0, "stop_token_ids": tuple(range(0, VOCAB, 7)), "min_tokens": 2},
    {"temperature": 1.0, "stop_token_ids": tuple(range(0, VOCAB, 3))},
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny base, and beside it a folder with four adapters."""
    root = tmp_path_factory.mktemp("pipeline")
    path = tiny_base(root / "base", "llama", num_hidden_layers=2)
    make_zoo(load_oracle_base(path), root / "adapters", 4, max_rank=16)
    return path


@pytest.fixture
def drive(base: Path, tmp_path_factory):
    """A driver of so many steps in flight, over KV blocks and device memory for some of the requests."""
    opened = []
    cache = tmp_path_factory.mktemp("cache")

    def drive(steps_in_flight: int, **config: object) -> Driver:
        options = {
            "block_size": 4, "kv_memory": 28 * BLOCK_BYTES, "adapter_memory": 128 << 10, "max_num_seqs": 8,
            "max_step_tokens": 48, "max_adapters_per_step": 3, "threads": 1, **config,
        }  # fmt: skip
        opened.append(Driver(base, base.parent / "adapters", cache, steps_in_flight=steps_in_flight, **options))
        return opened[-1]

    yield drive
    for driver in opened:
        driver.assert_nothing_leaked()
        driver.close()


def run(driver: Driver, seed: int) -> list[Answer]:
    """Forty requests of all kinds, with and without adapters, coming while others run."""
    rng = random.Random(seed)
    prompts = random_prompts(40, VOCAB, seed=seed, lengths=(1, 30))
    names = [None, *(f"zoo-{index:02d}" for index in range(4))]
    ids = []
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=rng.randint(1, 24), seed=number, **rng.choice(KINDS))
        ids.append(driver.submit(prompt, rng.choice(names), params))
        if rng.random() < 0.4:
            driver.step()
    driver.finish(ids)
    return [driver.answers[request_id] for request_id in ids]


@pytest.mark.parametrize("seed", range(3))
def test_the_answers_are_those_of_one_step_in_flight(drive, seed) -> None:
    one, two = drive(1), drive(2)
    expected, found = run(one, seed), run(two, seed)
    assert two.core.scheduler.num_preemptions > 0 and two.core.slots.evictions > 0, "it is too roomy for a test"
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    for answer, right in zip(found, expected, strict=True):
        assert (answer.token_ids, answer.finish_reason) == (right.token_ids, right.finish_reason)
        told, wanted = ([*(a.prompt_logprobs or []), *a.logprobs] for a in (answer, right))
        assert [(one.token_id, one.rank) for one in told] == [(one.token_id, one.rank) for one in wanted]
        assert [one.logprob for one in told] == pytest.approx([one.logprob for one in wanted], abs=1e-4)


def test_on_the_cpu_one_step_is_in_flight_unless_asked(base: Path, drive) -> None:
    assert drive(None).core.scheduler.limits.steps_in_flight == 1
    assert drive(2).core.scheduler.limits.steps_in_flight == 2


def test_streams_that_end_stop_and_leave(drive) -> None:
    """Through InprocEngine: each stream has one end, the answers are those of a lone request, nothing is held."""
    driver = drive(2)
    prompts = random_prompts(24, VOCAB, seed=9, lengths=(2, 20))
    params = [SamplingParams(max_tokens=20, seed=n, **KINDS[n % len(KINDS)]) for n in range(24)]
    refs = [None if n % 3 == 0 else driver.ref(f"zoo-{n % 4:02d}") for n in range(24)]
    leaving = [n % 5 if n % 4 == 1 else None for n in range(24)]

    async def read(engine: InprocEngine, number: int, leaves_after: int | None) -> tuple[list[int], str | None]:
        tokens: list[int] = []
        request = AddRequest(
            request_id=f"{number}-{leaves_after}-{engine.last_stats.rows_total}",
            prompt_ids=prompts[number],
            params=params[number],
            adapter=refs[number],
        )
        async for output in engine.generate(request):
            tokens += output.token_ids
            if output.finish_reason is not None:
                return tokens, output.finish_reason
            if leaves_after is not None and len(tokens) >= leaves_after:
                return tokens, None
        raise AssertionError("a stream without an end")

    async def read_all() -> tuple[list[Any], list[Any]]:
        engine = InprocEngine(driver.core)
        together = await asyncio.gather(*(read(engine, n, leaving[n]) for n in range(24)))
        alone = [await read(engine, n, None) for n in range(24)]
        return together, alone

    together, alone = asyncio.run(read_all())
    for (tokens, reason), (right, right_reason) in zip(together, alone, strict=True):
        assert tokens == right[: len(tokens)] and reason in (right_reason, None)
        assert reason is None or len(tokens) == len(right)
    assert {reason for _, reason in together} == {"stop", "length", None}
