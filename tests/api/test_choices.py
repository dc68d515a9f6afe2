"""Several choices of one request: n, lists of prompts, their streams, and how one's end is the end of all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from server.api.choices import Part, _merged
from server.engine.messages import RequestError
from server.text.output import Delta
from tests.api.conftest import ANSWER, BASE
from tests.api.test_adapters import until
from tests.api.test_disconnect import WITHIN_S, gone, send

CHAT = [{"role": "user", "content": "the lazy dog"}]
TEXTS = ["the quick", "日本語", "brown fox jumps over"]


def events_of(text: str) -> list[dict]:
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_of_a_chat(served, stream):
    for index, text in enumerate(TEXTS):
        served.answer(text, choice=index, delay_s=0.002 * index, num_cached_tokens=4)
    body = {"model": BASE, "messages": CHAT, "n": 3, "stream": stream, "seed": 2**63 - 1}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with served.http() as http:
        response = await http.post("/v1/chat/completions", json=body)
    counts = [len(served.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in TEXTS]
    num_prompt = len(served.engine.added[0].prompt_ids)
    if stream:
        chunks = events_of(response.text)
        assert len({chunk["id"] for chunk in chunks}) == 1
        usage = chunks.pop()["usage"]
        for index, text in enumerate(TEXTS):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(choice["delta"].get("content", "") for choice in own) == text
            assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        order = [chunk["choices"][0]["index"] for chunk in chunks]
        assert order != sorted(order)  # interleaved
    else:
        answer = response.json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == TEXTS
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        usage = answer["usage"]
    assert usage["prompt_tokens"] == num_prompt  # once
    assert usage["completion_tokens"] == sum(counts)
    assert usage["total_tokens"] == num_prompt + sum(counts)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4
    assert [request.params.seed for request in served.engine.added] == [2**63 - 1, 0, 1]
    ids = [request.request_id for request in served.engine.added]
    assert [request_id.rpartition("-") for request_id in ids] == [(ids[0][:-2], "-", str(i)) for i in range(3)]
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_times_n(served, stream):
    prompts = ["the quick", "fox"]
    for index in range(4):
        served.answer(f"dog {index}", choice=index)
    body = {"model": BASE, "prompt": prompts, "n": 2, "seed": 7, "stream": stream, "return_token_ids": True}
    async with served.http() as http:
        response = await http.post("/v1/completions", json=body)
    if stream:
        choices = [choice for chunk in events_of(response.text) for choice in chunk["choices"]]
    else:
        choices = response.json()["choices"]
    for index in range(4):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == f"dog {index}"
        ids = served.tokenizer.encode(prompts[index // 2], add_special_tokens=True)
        assert [choice["prompt_token_ids"] for choice in own if "prompt_token_ids" in choice] == [ids]
    # a prompt is answered as if it had been sent alone
    assert [request.params.seed for request in served.engine.added] == [7, 8, 7, 8]
    if not stream:
        num_prompt = sum(len(served.tokenizer.encode(prompt, add_special_tokens=True)) for prompt in prompts)
        assert response.json()["usage"]["prompt_tokens"] == num_prompt
    served.assert_quiet()


async def test_drawn_seeds_differ_among_choices(served):
    await served.client().completions.create(model=BASE, prompt="x", n=4)
    assert len({request.params.seed for request in served.engine.added}) == 4


async def test_a_list_of_token_prompts(served):
    await served.client().completions.create(model=BASE, prompt=[[5, 6], [7]])
    assert [request.prompt_ids for request in served.engine.added] == [[5, 6], [7]]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_choices_error_ends_its_siblings(served, stream):
    for index in range(3):
        served.answer("the quick brown", choice=index, hangs=True)
    error = RequestError(503, "engine_broke", "It broke.")
    served.answer("the", choice=1, finish_reason="error", error=error, delay_s=0.02)
    body = {"model": "support-fr", "prompt": "x", "n": 3, "stream": stream}
    async with served.http() as http:
        response = await http.post("/v1/completions", json=body)
    if stream:
        assert events_of(response.text)[-1]["error"]["code"] == "engine_broke"
    else:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_broke"
    assert sorted(served.engine.aborted) == sorted(
        request.request_id for request in served.engine.added if not request.request_id.endswith("-1")
    )
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_any_output_is_a_status(served, stream):
    served.answer("", finish_reason="error", error=RequestError(503, "overloaded", "Full.", retry_after_s=2))
    async with served.http() as http:
        response = await http.post("/v1/completions", json={"model": BASE, "prompt": "x", "n": 5, "stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_every_choice(served, stream):
    for index in range(3):
        served.answer("the quick", choice=index, hangs=index > 0)
    _, writer = await send(served, {"model": "support-fr", "prompt": "x", "n": 3, "stream": stream})
    await until(lambda: len(served.engine.ended) == 1)
    assert served.engine.aborted == []
    await gone(writer)
    await until(lambda: len(served.engine.aborted) == 2, WITHIN_S)
    await until(lambda: not +served.store.leases, WITHIN_S)
    served.assert_quiet()


async def test_choices_of_a_cold_adapter_share_one_fetch(served):
    answer = await served.client().completions.create(model="support-fr", prompt=["x", "y"], n=3)
    assert len(answer.choices) == 6
    assert served.store.ensured == ["support-fr"]
    served.assert_quiet()


async def test_a_slow_reader_of_many_choices_holds_no_backlog():
    """What the reader can't take stays where it comes from, whose collectors merge it."""
    num_pulled = [0, 0, 0]
    closed = []

    async def source(index: int) -> AsyncGenerator[Part, None]:
        try:
            for count in range(1000):
                num_pulled[index] += 1
                yield Part(index, Delta("x", [1], "length" if count == 999 else None))
        finally:
            closed.append(index)

    sources = [source(index) for index in range(3)]  # references keep the garbage collector away
    merged = _merged(sources)
    await anext(merged)
    for _ in range(100):
        await asyncio.sleep(0)
    assert sum(num_pulled) <= 1 + 3 + 3  # the reader's, the queue's, and one in each hand
    assert min(num_pulled) > 0
    await merged.aclose()
    assert sorted(closed) == [0, 1, 2]


async def test_many_multi_choice_requests_at_once(served):
    served.answer(ANSWER, delay_s=0.001)
    client = served.client()

    async def one(index: int) -> None:
        stream = await client.chat.completions.create(model=BASE, messages=CHAT, n=1 + index % 4, stream=True)
        texts = [""] * (1 + index % 4)
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [ANSWER] * (1 + index % 4)

    await asyncio.gather(*(one(index) for index in range(20)))
    served.assert_quiet()
