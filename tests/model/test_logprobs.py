"""Logprobs against log_softmax of unmodified transformers: tokens, ranks, lists, prompts; alone and in company."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from server.engine.batch import ScheduledRequest, StepResult
from server.engine.messages import SamplingParams, TokenLogprobs
from server.engine.request import NOT_FINITE, Request
from server.model import logprobs as logprobs_module
from server.model.logprobs import row_logprobs
from tests.model.harness import Driver, Served, make_batch, serve, whole_prompts
from tests.model.test_runner import fill_slots, merged_oracle, with_slot
from tests.zoo import load_oracle_base, random_prompts, tiny_base

ATOL = 2e-3  # fp32 logits of two implementations, as in test_runner

# --- rows of logits ---------------------------------------------------------------------------------------


def random_logits(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)


def check_row(logits: torch.Tensor, found: TokenLogprobs, token: int, num_top: int) -> None:
    """One row [V] against log_softmax and a sort by (logit, id)."""
    expected = logits.double().log_softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    assert found.token_id == token and found.rank == order.index(token) + 1
    assert found.logprob == pytest.approx(expected[token].item(), abs=1e-5)
    assert [i for i, _ in found.top] == order[:num_top]
    assert [value for _, value in found.top] == pytest.approx([expected[i].item() for i in order[:num_top]], abs=1e-5)
    assert found.rank > num_top or found.top[found.rank - 1] == (token, found.logprob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])  # bf16 is full of ties
@pytest.mark.parametrize("num_top", [0, 1, 7, 300])
def test_a_row_is_log_softmax_in_order(dtype: torch.dtype, num_top: int) -> None:
    logits = random_logits(12, 300, dtype)
    logits[0], logits[1, :150], logits[2, 7] = 1.0, -0.0, -torch.inf
    logits[1, 150:] = 0.0
    rows = torch.tensor([0, 1, 2, 5, 5, 11])
    tokens = [299, 149, 7, 8, 9, int(logits[11].argmax())]
    found = row_logprobs(logits, rows, torch.tensor(tokens), num_top).to_host([num_top] * 6)
    assert found[5].rank == 1
    for row, token, one in zip(rows.tolist(), tokens, found, strict=True):
        if row != 2:
            check_row(logits[row], one, token, num_top)
    assert found[2].logprob == -torch.inf and found[2].rank == 300


@pytest.mark.parametrize("chunk_elements", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_company_nor_its_wishes_change_a_row(dtype: torch.dtype, chunk_elements: int, monkeypatch) -> None:
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", chunk_elements)
    logits = random_logits(20, 5003, dtype)
    tokens = torch.arange(20) * 31
    num_top = [n % 6 for n in range(20)]
    together = row_logprobs(logits, torch.arange(20), tokens, max(num_top)).to_host(num_top)
    for row in range(20):
        alone = row_logprobs(logits[row : row + 1].clone(), torch.tensor([0]), tokens[row : row + 1], num_top[row])
        assert alone.to_host([num_top[row]]) == [together[row]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_is_nan_throughout_and_alone(bad: float) -> None:
    logits = random_logits(3, 50)
    logits[1, 17] = bad
    found = row_logprobs(logits, torch.arange(3), torch.tensor([4, 4, 4]), 2)
    assert found.chosen.isnan().tolist() == [False, True, False]
    assert found.top.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


# --- a model's steps --------------------------------------------------------------------------------------


def asking(prompt: list[int], name: str, **params: object) -> Request:
    return Request(name, list(prompt), len(prompt), SamplingParams(temperature=0.0, **params))


def run_chunks(served: Served, requests: list[Request], chunks: random.Random) -> dict[str, list[TokenLogprobs]]:
    """Prefill all prompts in random chunks, several requests in each step; the logprobs of each one's prompt
    tokens and of its first output."""
    whole = {item.request.request_id: item.request for item in whole_prompts(requests)}
    found: dict[str, list[TokenLogprobs]] = {name: [] for name in whole}
    while waiting := [r for r in requests if r.num_computed < r.num_prompt]:
        items = []
        for request in waiting:
            count = min(chunks.randint(1, 9), request.num_prompt - request.num_computed)
            start = request.num_computed
            positions = request.prompt_logprob_positions(start, count)
            items.append(ScheduledRequest(request, start, count, start + count == request.num_prompt, positions))
        result = served.runner.collect(served.runner.dispatch(make_batch(items)))
        for item in items:
            request = item.request
            request.num_computed += item.num_tokens
            new = result.prompt_logprobs.get(request.request_id, [])
            request.prompt_logprobs += new
            found[request.request_id] += new
            if item.samples and request.params.logprobs is not None:
                found[request.request_id].append(result.logprobs[request.request_id])
    return found


def check_prompt(oracle: torch.nn.Module, request: Request, found: list[TokenLogprobs], num_top: int) -> None:
    """Every prompt token but the first, and then the token drawn, against the oracle's log_softmax."""
    with torch.inference_mode():
        expected = oracle(torch.tensor([request.token_ids[: request.num_prompt]])).logits[0].double().log_softmax(-1)
    tokens = [*request.token_ids[1 : request.num_prompt], int(expected[-1].argmax())]
    assert [one.token_id for one in found] == tokens
    for one, row in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(row[one.token_id].item(), abs=ATOL)
        best = row.topk(num_top).values.tolist()
        assert [value for _, value in one.top] == pytest.approx(best, abs=ATOL)
        assert [row[i].item() for i, _ in one.top] == pytest.approx(best, abs=ATOL)
        higher = int((row > row[one.token_id] + ATOL).sum())
        assert higher < one.rank <= int((row >= row[one.token_id] - ATOL).sum())


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}),
    ],
)
def test_prompt_and_token_are_those_of_transformers(model_type: str, overrides, tmp_path: Path) -> None:
    """In chunks of every size, with adapters on every site (a tied head's too) beside base rows."""
    path = tiny_base(tmp_path, model_type, **overrides)
    served = serve(path)
    deltas = fill_slots(served)
    slots = (0, 1, 2, 1, 0)
    prompts = random_prompts(len(slots), 320, seed=8, lengths=(1, 24))
    prompts[4] = prompts[1]
    requests = [
        with_slot(asking(p, str(i), max_tokens=1, logprobs=3, prompt_logprobs=3), slot)
        for i, (p, slot) in enumerate(zip(prompts, slots, strict=True))
    ]
    found = run_chunks(served, requests, random.Random(5))
    oracles = {slot: merged_oracle(path, served, deltas[slot]) for slot in (1, 2)} | {0: load_oracle_base(path)}
    for request in requests:
        check_prompt(oracles[request.slot], request, found[request.request_id], 3)
    assert found["1"][0].logprob != pytest.approx(found["4"][0].logprob, abs=0.01), "the adapter changes nothing"


def test_requests_that_ask_for_nothing_cost_nothing(tmp_path: Path, monkeypatch) -> None:
    """No row of theirs reaches the head or the logprobs, and a step of only them computes none."""
    served = serve(tiny_base(tmp_path, "llama"))
    prompts = random_prompts(3, 320, seed=1, lengths=(6, 6))
    requests = [asking(p, str(i), max_tokens=1) for i, p in enumerate(prompts)]
    heads: list[int] = []
    original = served.runner.logits
    monkeypatch.setattr(served.runner, "logits", lambda b: (heads.append(len(b.head_rows)), original(b))[1])
    handle = served.runner.dispatch(make_batch(whole_prompts(requests)))
    assert handle.logprobs is None and heads == [3]
    silent = served.runner.collect(handle)
    assert silent.logprobs == silent.prompt_logprobs == {}
    requests[1].params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, prompt_logprobs=2)
    items = whole_prompts(requests)
    items[1].logprob_positions = requests[1].prompt_logprob_positions(0, 6)
    mixed = served.runner.collect(served.runner.dispatch(make_batch(items)))
    assert heads[1] == 3 + 5
    assert list(mixed.logprobs) == list(mixed.prompt_logprobs) == ["1"]
    assert mixed.tokens == silent.tokens
    told = mixed.logprobs["1"]
    assert told.token_id == mixed.tokens["1"] and told.rank == 1, "the row of another"
    assert mixed.logprobs["1"].top == [] and all(len(one.top) == 2 for one in mixed.prompt_logprobs["1"])


def test_greedy_tokens_have_rank_one_and_bans_leave_the_logprobs_alone(tmp_path: Path) -> None:
    """Raw logits: masking the best token changes what is drawn, not what is told of it."""
    served = serve(tiny_base(tmp_path, "llama"))
    prompt = random_prompts(1, 320, seed=2, lengths=(9, 9))[0]

    def step(**params: object) -> StepResult:
        request = asking(prompt, "r", max_tokens=1, logprobs=4, **params)
        return served.runner.collect(served.runner.dispatch(make_batch(whole_prompts([request]))))

    free = step().logprobs["r"]
    assert free.rank == 1 and free.top[0][0] == free.token_id
    banned = step(bad_words=((free.token_id,),)).logprobs["r"]
    assert banned.rank == 2 and banned.top == free.top and banned.token_id == free.top[1][0]
    biased = step(logit_bias=((7, 100.0),), repetition_penalty=1.5).logprobs["r"]
    assert biased.token_id == 7 and biased.top == free.top and biased.logprob < free.top[3][1]


def test_a_failed_row_beside_one_that_asks(tmp_path: Path) -> None:
    served = serve(tiny_base(tmp_path, "llama"))
    prompts = random_prompts(2, 320, seed=3, lengths=(5, 5))
    with torch.no_grad():
        served.base.model.get_input_embeddings().weight[319] = torch.nan
    requests = [
        asking([*prompts[0], 319], "0", max_tokens=1, logprobs=2),
        asking([*prompts[1], 4], "1", max_tokens=1, logprobs=2),
    ]
    result = served.runner.collect(served.runner.dispatch(make_batch(whole_prompts(requests))))
    assert result.tokens["0"] == NOT_FINITE != result.tokens["1"]
    assert result.logprobs["1"].token_id == result.tokens["1"] and result.logprobs["1"].rank == 1


def test_alone_and_in_company(tmp_path: Path) -> None:
    """A request's logprobs do not depend on who else is in the batch, or on how the prompt was chunked."""
    served = serve(tiny_base(tmp_path, "llama"))
    prompts = random_prompts(6, 320, seed=11, lengths=(4, 20))
    params = [{"max_tokens": 1, "logprobs": 2, "prompt_logprobs": i % 3} for i in range(6)]

    def fresh() -> list[Request]:
        return [asking(p, str(i), **fields) for i, (p, fields) in enumerate(zip(prompts, params, strict=True))]

    together = run_chunks(served, fresh(), random.Random(1))
    for request in fresh():
        alone = run_chunks(served, [request], random.Random(2))[request.request_id]
        assert len(alone) == len(request.token_ids)
        for one, other in zip(alone, together[request.request_id], strict=True):
            assert one.token_id == other.token_id and one.rank == other.rank
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_decodes_with_logprobs_follow_transformers(tmp_path: Path) -> None:
    """Through the harness's continuous batching: each decoded token's logprob, against one whole forward pass."""
    path = tiny_base(tmp_path, "llama")
    served, oracle = serve(path), load_oracle_base(path)
    requests = [asking(p, str(i), max_tokens=6, logprobs=0) for i, p in enumerate(random_prompts(3, 320, seed=4))]
    told: dict[str, list[TokenLogprobs]] = {r.request_id: [] for r in requests}
    original = served.runner.collect

    def collect(handle):
        result = original(handle)
        for name, one in result.logprobs.items():
            told[name].append(one)
        return result

    served.runner.collect = collect
    answers = Driver(served).run(requests)
    for request, answer in zip(requests, answers, strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([request.token_ids])).logits[0].log_softmax(-1)
        assert [one.token_id for one in told[request.request_id]] == answer
        for index, one in enumerate(told[request.request_id]):
            assert one.logprob == pytest.approx(expected[request.num_prompt + index - 1, one.token_id].item(), abs=ATOL)
            assert one.rank == 1
