"""The official client against both endpoints: whole answers and streams, of the base and of adapters."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from server.engine.messages import RequestError
from tests.api.conftest import ANSWER, BASE, CORPUS

CHAT = [{"role": "user", "content": "the lazy dog"}]


async def test_a_completion(served):
    served.answer(ANSWER, num_cached_tokens=3)
    answer = await served.client().completions.create(model=BASE, prompt="the quick", max_tokens=100)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == BASE
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    num_prompt = len(served.tokenizer.encode("the quick", add_special_tokens=True))
    num_answer = len(served.tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == num_answer
    assert answer.usage.total_tokens == num_prompt + num_answer
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    served.assert_quiet()


async def test_a_chat(served):
    answer = await served.client().chat.completions.create(model="base-alias", messages=CHAT)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "base-alias"
    assert answer.object == "chat.completion"
    sent = served.engine.added[0]
    rendered = "<|user|>the lazy dog<|end|><|assistant|>"
    assert sent.prompt_ids == served.tokenizer.encode(rendered, add_special_tokens=False)
    # without a bound, a chat may use the rest of the context
    assert sent.params.max_tokens == served.engine.max_model_len - len(sent.prompt_ids)


def test_the_sync_client(served_in_thread):
    served = served_in_thread
    client = served.sync_client()
    answer = client.chat.completions.create(model=BASE, messages=CHAT)
    assert answer.choices[0].message.content == ANSWER
    with client.chat.completions.create(model=BASE, messages=CHAT, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER
    raw = client.completions.with_raw_response.create(model="support-fr", prompt="x")
    assert raw.headers["x-multilora-image-key"] == "image-of-support-fr"
    assert raw.parse().model == "support-fr"


async def test_a_chat_stream_has_role_deltas_finish_and_usage(served):
    stream = await served.client().chat.completions.create(
        model=BASE, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    num_answer = len(served.tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert chunks[-1].usage.completion_tokens == num_answer
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    served.assert_quiet()


async def test_a_completion_stream(served):
    stream = await served.client().completions.create(model=BASE, prompt="the", max_tokens=100, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_stream_on_the_wire(served):
    body = {"model": BASE, "messages": CHAT, "stream": True}
    async with served.http() as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


async def test_characters_are_never_split(served):
    stream = await served.client().completions.create(model=BASE, prompt="the", max_tokens=100, stream=True)
    texts = [chunk.choices[0].text async for chunk in stream]
    ids = served.tokenizer.encode(ANSWER, add_special_tokens=False)
    assert any("\ufffd" in served.tokenizer.decode([token_id]) for token_id in ids)  # or this test tests nothing
    assert not any("\ufffd" in text for text in texts)


async def test_length_ends_an_answer(served):
    answer = await served.client().completions.create(model=BASE, prompt="the")
    assert served.engine.added[0].params.max_tokens == 16  # OpenAI's default
    assert answer.choices[0].finish_reason == "length"
    ids = served.tokenizer.encode(ANSWER, add_special_tokens=False)
    assert answer.choices[0].text == served.tokenizer.decode(ids[:16])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["brown f", ["zebra", "wn fox", "fox"]])
@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
async def test_stop_strings_across_tokens(served, stream, stop, tokens_per_event):
    served.answer(ANSWER, tokens_per_event=tokens_per_event, hangs=True)
    answer = await served.client().completions.create(
        model=BASE, prompt="the", max_tokens=100, stop=stop, stream=stream
    )
    if stream:
        choices = [chunk.choices[0] async for chunk in answer]
    else:
        choices = answer.choices
    matched = stop if isinstance(stop, str) else "wn fox"
    assert "".join(choice.text for choice in choices) == ANSWER[: ANSWER.index(matched)]
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].stop_reason == matched
    # the engine was going on, and was told to stop
    await asyncio.sleep(0)
    assert served.engine.aborted == [served.engine.added[0].request_id]
    served.assert_quiet()


async def test_a_held_back_prefix_of_a_stop_string_is_given_out_at_the_end(served):
    answer = await served.client().completions.create(model=BASE, prompt="the", max_tokens=100, stop=["done!"])
    assert answer.choices[0].text == ANSWER


async def test_a_stop_id_has_no_text_and_is_told(served):
    ids = served.tokenizer.encode("the quick brown", add_special_tokens=False)
    served.answer("the quick brown", stop_token_id=ids[-1])
    answer = await served.client().completions.create(
        model=BASE, prompt="the", extra_body={"stop_token_ids": [ids[-1], ids[-1]], "return_token_ids": True}
    )
    assert served.engine.added[0].params.stop_token_ids == (ids[-1],)
    assert answer.choices[0].text == served.tokenizer.decode(ids[:-1])
    assert answer.choices[0].stop_reason == ids[-1]
    assert answer.choices[0].token_ids == ids


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_in_and_out(served, stream):
    ids = served.tokenizer.encode(ANSWER, add_special_tokens=False)
    prompt = [5, 6, 7]
    answer = await served.client().completions.create(
        model=BASE, prompt=prompt, max_tokens=100, stream=stream, extra_body={"return_token_ids": True}
    )
    choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    assert served.engine.added[0].prompt_ids == prompt
    assert choices[0].prompt_token_ids == prompt
    got = [token_id for choice in choices for token_id in getattr(choice, "token_ids", [])]
    assert got == [*ids, served.engine.eos_id]


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_of_a_chat(served, stream):
    answer = await served.client().chat.completions.create(
        model=BASE, messages=CHAT, stream=stream, extra_body={"return_token_ids": True}
    )
    parts = [chunk async for chunk in answer] if stream else [answer]
    assert parts[0].prompt_token_ids == served.engine.added[0].prompt_ids
    got = [token_id for part in parts for token_id in getattr(part.choices[0], "token_ids", [])]
    assert got == [*served.tokenizer.encode(ANSWER, add_special_tokens=False), served.engine.eos_id]


@pytest.mark.parametrize("prompt", ["the quick", ["the quick"]])
async def test_forms_of_a_text_prompt(served, prompt):
    await served.client().completions.create(model=BASE, prompt=prompt)
    assert served.engine.added[0].prompt_ids == served.tokenizer.encode("the quick", add_special_tokens=True)


async def test_a_list_of_one_token_prompt(served):
    await served.client().completions.create(model=BASE, prompt=[[9, 8]])
    assert served.engine.added[0].prompt_ids == [9, 8]


async def test_message_parts_are_joined(served):
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}]
    await served.client().chat.completions.create(model=BASE, messages=[{"role": "user", "content": parts}])
    rendered = "<|user|>the\ndog<|end|><|assistant|>"
    assert served.engine.added[0].prompt_ids == served.tokenizer.encode(rendered, add_special_tokens=False)


async def test_a_replayed_assistant_message(served):
    """What the client got is what it may send back, nulls and all."""
    client = served.client()
    first = await client.chat.completions.create(model=BASE, messages=CHAT)
    messages = [*CHAT, first.choices[0].message.model_dump(), *CHAT]
    await client.chat.completions.create(model=BASE, messages=messages)
    assert len(served.engine.added) == 2


async def test_without_generation_prompt(served):
    await served.client().chat.completions.create(
        model=BASE, messages=CHAT, extra_body={"add_generation_prompt": False}
    )
    rendered = "<|user|>the lazy dog<|end|>"
    assert served.engine.added[0].prompt_ids == served.tokenizer.encode(rendered, add_special_tokens=False)


async def test_sampling_fields_reach_the_engine(served):
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": 42,
        "presence_penalty": -1.5,
        "frequency_penalty": 1,
        "repetition_penalty": 1.5,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
    }
    body = {"model": BASE, "prompt": "the", "cache_salt": "tenant", **fields}
    async with served.http() as http:
        response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200
    sent = served.engine.added[0]
    assert sent.cache_salt == "tenant"
    for name, value in fields.items():
        got = getattr(sent.params, name)
        assert got == (tuple(value) if isinstance(value, list) else value), name


async def test_seeds_are_drawn_and_top_k_minus_one_means_all(served):
    client = served.client()
    for _ in range(2):
        await client.completions.create(model=BASE, prompt="x", extra_body={"top_k": -1})
    first, second = (request.params for request in served.engine.added)
    assert first.seed != second.seed
    assert first.top_k == 0


async def test_inert_fields(served):
    answer = await served.client().chat.completions.create(
        model=BASE,
        messages=CHAT,
        user="someone",
        metadata={"a": "b"},
        store=False,
        n=1,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        logit_bias={},
        stop=None,
        temperature=None,
    )
    assert answer.choices[0].message.content == ANSWER


async def test_phases_on_demand(served):
    body = {"model": "support-fr", "prompt": "x"}
    async with served.http() as http:
        plain = (await http.post("/v1/completions", json=body)).json()
        served.store.on_disk.clear()
        cold = (await http.post("/v1/completions", json=body, headers={"x-multilora-phases": "1"})).json()
    assert "multilora" not in plain["usage"]
    phases = cold["usage"]["multilora"]["phases"]
    assert phases["fetch_s"] == 3.0
    assert phases["compile_s"] == 4.0
    assert phases["compile_queue_s"] == 2.0
    assert (phases["queue_s"], phases["adapter_wait_s"], phases["prefill_s"]) == (0.25, 0.5, 0.125)
    assert 0 < phases["ttft_s"] < 10
    assert 0 < phases["resolve_s"] < 10


@pytest.mark.parametrize("with_tokens", [False, True])
async def test_an_engine_error_of_a_whole_answer_is_a_status(served, with_tokens):
    error = RequestError(503, "overloaded", "The queue is full.", retry_after_s=7)
    served.answer("the quick" if with_tokens else "", finish_reason="error", error=error)
    async with served.http() as http:
        response = await http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert response.json() == {
        "error": {"message": "The queue is full.", "type": "server_error", "param": None, "code": "overloaded"}
    }
    served.assert_quiet()


async def test_an_error_in_mid_stream_is_an_event(served):
    error = RequestError(503, "engine_dead", "The engine stopped before this request ended.")
    served.answer("the quick", finish_reason="error", error=error, delay_s=0.01)
    async with served.http() as http:
        response = await http.post("/v1/completions", json={"model": BASE, "prompt": "x", "stream": True})
    assert response.status_code == 200
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "engine_dead"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2]) == "the quick"
    stream = await served.client().completions.create(model=BASE, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="engine stopped"):
        async for _ in stream:
            pass
    served.assert_quiet()


async def test_an_error_before_the_first_token_of_a_stream_is_a_status(served):
    served.answer("", finish_reason="error", error=RequestError(503, "overloaded", "Full.", retry_after_s=2))
    async with served.http() as http:
        response = await http.post("/v1/completions", json={"model": BASE, "prompt": "x", "stream": True})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_server_ends_is_no_answer(served, stream):
    """An abort that the client did not cause: the text so far must not pass for the whole."""
    served.answer("the quick", hangs=True)
    body = {"model": BASE, "prompt": "x", "stream": stream}
    async with served.http() as http:
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        while not served.engine.added:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        served.engine.abort(served.engine.added[0].request_id)
        response = await task
    if stream:
        event = response.text.split("\n\n")[-3]
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == "request_aborted"
    else:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "request_aborted"
    served.assert_quiet()


async def test_a_dead_engine(served):
    served.answer(ANSWER, hangs=True, delay_s=0.001)
    client = served.client()
    stream = await client.completions.create(model=BASE, prompt="x", stream=True)
    await anext(stream)
    served.engine.die()
    with pytest.raises(openai.APIError, match="engine stopped"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model=BASE, prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.code == "engine_dead"
    async with served.http() as http:
        assert (await http.get("/health")).status_code == 503


async def test_many_at_once(served):
    served.answer(ANSWER, delay_s=0.001)
    served.answer("ein kleines Wörterbuch", adapter="support-fr", delay_s=0.001)
    client = served.client()

    async def one(index: int) -> None:
        model, text = [(BASE, ANSWER), ("support-fr", "ein kleines Wörterbuch")][index % 2]
        stream = await client.completions.create(model=model, prompt=CORPUS[0], max_tokens=80, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert {chunk.model for chunk in chunks} == {model}

    await asyncio.gather(*(one(index) for index in range(60)))
    served.assert_quiet()
