"""Logprobs in OpenAI's two forms, prompt_logprobs in vLLM's, and the echo: against the engine's numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import pytest

from server.api.choices import MAX_TOKENS_ON_LOOP
from server.api.logprobs import LogprobsFormat
from server.engine.messages import RequestError
from server.text.output import OutputText
from tests.api.conftest import ANSWER, BASE
from tests.api.doubles import scores
from tests.api.test_adapters import until
from tests.api.test_choices import events_of
from tests.api.test_disconnect import gone, send

CHAT = [{"role": "user", "content": "the lazy dog"}]


async def post(served, path: str, **fields) -> dict | list[dict]:
    """The answer's body, or a stream's chunks."""
    async with served.http() as http:
        response = await http.post(path, json={"model": BASE, **fields})
    assert response.status_code == 200, response.text
    return events_of(response.text) if fields.get("stream") else response.json()


def answer_ids(served) -> list[int]:
    return [*served.tokenizer.encode(ANSWER, add_special_tokens=False), served.engine.eos_id]


@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_chats_logprobs(served, stream, tokens_per_event):
    served.answer(ANSWER, tokens_per_event=tokens_per_event)
    answer = await post(
        served, "/v1/chat/completions", messages=CHAT, logprobs=True, top_logprobs=2, stream=stream, max_tokens=100
    )
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    content = [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]]
    ids = answer_ids(served)
    pieces = served.tokenizer.pieces
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == ANSWER + "<|end|>"
    for token, token_id, row in zip(content, ids, scores(ids, 2), strict=True):
        assert token["token"] == pieces.text_of(token_id)
        assert token["logprob"] == row.logprob
        assert [(top["token"], top["logprob"]) for top in token["top_logprobs"]] == [
            (pieces.text_of(top_id), logprob) for top_id, logprob in row.top
        ]
        assert all(bytes(top["bytes"]).decode(errors="replace") == top["token"] for top in token["top_logprobs"])


async def test_a_chats_logprobs_without_alternatives(served):
    answer = await served.client().chat.completions.create(model=BASE, messages=CHAT, logprobs=True)
    assert served.engine.added[0].params.logprobs == 0
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completions_logprobs(served, stream):
    answer = await post(served, "/v1/completions", prompt="the", logprobs=2, stream=stream, max_tokens=100)
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    got = {
        name: [value for choice in choices for value in (choice["logprobs"] or {name: []})[name]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    ids = answer_ids(served)
    rows = scores(ids, 2)
    text = "".join(choice["text"] for choice in choices)
    pieces = served.tokenizer.pieces
    assert got["tokens"] == [pieces.text_of(token_id) for token_id in ids]
    assert got["token_logprobs"] == [row.logprob for row in rows]
    for top, row in zip(got["top_logprobs"], rows, strict=True):
        assert len(top) <= 3
        assert top[pieces.text_of(row.token_id)] >= row.logprob
    # an offset is where the token's text stands: whole characters can be read there
    assert got["text_offset"] == sorted(got["text_offset"])
    for token, offset in zip(got["tokens"][:-1], got["text_offset"], strict=False):
        if "\ufffd" not in token:
            assert text[offset : offset + len(token)] == token


async def test_tokens_as_ids(served):
    body = {"prompt": "the", "logprobs": 1, "return_tokens_as_token_ids": True, "max_tokens": 2}
    logprobs = (await post(served, "/v1/completions", **body))["choices"][0]["logprobs"]
    first = answer_ids(served)[0]
    assert logprobs["tokens"][0] == f"token_id:{first}"
    assert set(logprobs["top_logprobs"][0]) == {f"token_id:{first}", f"token_id:{(first + 1) % 256}"}


async def test_a_stop_string_cuts_the_logprobs_with_the_tokens(served):
    served.answer(ANSWER, tokens_per_event=100)
    choice = (await post(served, "/v1/completions", prompt="x", logprobs=0, stop="brown", return_token_ids=True))[
        "choices"
    ][0]
    assert choice["text"] == ANSWER[: ANSWER.index("brown")]
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) < 10


async def test_an_infinite_logprob_is_json(served, monkeypatch):
    row = scores([5], 1)[0]
    minus = type(row)(token_id=5, logprob=float("-inf"), rank=300, top=[(6, float("-inf"))])
    monkeypatch.setattr("tests.api.doubles.scores", lambda ids, num_top: [minus] * len(ids))
    logprobs = (await post(served, "/v1/completions", prompt="x", logprobs=1))["choices"][0]["logprobs"]
    assert set(logprobs["token_logprobs"]) == {-9999.0}


async def test_prompt_logprobs(served):
    prompt = [65, 66, 67]
    body = {"prompt": prompt, "prompt_logprobs": 2, "n": 2}
    answer = await post(served, "/v1/completions", **body)
    rows = scores(prompt[1:], 2)
    for choice in answer["choices"]:
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        for told, row in zip(rest, rows, strict=True):
            assert told[str(row.token_id)]["rank"] == 3
            assert told[str(row.token_id)]["logprob"] == row.logprob
            assert [told[str(token_id)]["logprob"] for token_id, _ in row.top] == [logprob for _, logprob in row.top]
            assert [told[str(token_id)]["rank"] for token_id, _ in row.top] == [1, 2]
            for token_id, entry in told.items():
                assert entry["decoded_token"] == served.tokenizer.pieces.text_of(int(token_id))
    assert "prompt_logprobs" not in answer
    assert [request.params.prompt_logprobs for request in served.engine.added] == [2, None]
    chat = await post(served, "/v1/chat/completions", messages=CHAT, prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == len(served.engine.added[-1].prompt_ids)
    assert "prompt_logprobs" not in chat["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["ein 日本 Wörterbuch", "<|end|>ein", [1, 70, 71, 280]])
async def test_echo(served, stream, prompt):
    answer = await post(served, "/v1/completions", prompt=prompt, echo=True, stream=stream, max_tokens=100)
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    said = prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
    assert "".join(choice["text"] for choice in choices) == said + ANSWER
    assert served.engine.added[0].params.prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(served, stream):
    prompt = "ein 日本 Wörterbuch"
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 100, "stream": stream}
    answer = await post(served, "/v1/completions", **body)
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    got = {
        name: [value for choice in choices for value in (choice["logprobs"] or {name: []})[name]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    sent = served.engine.added[0]
    assert sent.params.prompt_logprobs == 1
    ids = answer_ids(served)
    assert got["token_logprobs"] == [
        None,
        *(row.logprob for row in scores(sent.prompt_ids[1:], 1)),
        *(row.logprob for row in scores(ids, 1)),
    ]
    assert got["top_logprobs"][0] is None
    assert len(got["tokens"]) == len(sent.prompt_ids) + len(ids)
    text = "".join(choice["text"] for choice in choices)
    for token, offset in zip(got["tokens"][:-1], got["text_offset"], strict=False):
        if "\ufffd" not in token:
            assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_alone(served, stream):
    """max_tokens 0, what evaluations ask to score a text: the step's one token is neither shown nor counted."""
    prompt = "the quick brown"
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer = await post(served, "/v1/completions", **body)
    choices = [choice for chunk in answer for choice in chunk["choices"]] if stream else answer["choices"]
    assert "".join(choice["text"] for choice in choices) == prompt
    assert choices[-1]["finish_reason"] == "length"
    sent = served.engine.added[0]
    assert sent.params.max_tokens == 0
    assert [len(c["logprobs"]["tokens"]) for c in choices if c["logprobs"]] == [len(sent.prompt_ids)]
    usage = (answer[-1] if stream else answer)["usage"]
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"] == len(sent.prompt_ids)
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [BASE, "support-fr"])
async def test_a_prompts_logprobs_are_computed_once_for_all_its_choices(served, stream, model):
    """The first choice of each prompt asks for them; the others wait until the engine has given them."""
    prompts, n = ["ein 日本 Wörterbuch", "the lazy"], 3
    for index in range(len(prompts) * n):
        served.answer(f"dog {index}", choice=index, delay_s=0.01 if index % n == 0 else 0)
    body = {"model": model, "prompt": prompts, "n": n, "echo": True, "logprobs": 1, "stream": stream}
    answer = await post(served, "/v1/completions", **body)
    choices = [choice for chunk in answer for choice in chunk["choices"]] if stream else answer["choices"]
    sent = served.engine.added
    assert [request.request_id[-2:] for request in sent[:2]] == ["-0", "-3"]
    assert [request.params.prompt_logprobs for request in sent] == [1, 1, None, None, None, None]
    for index in range(len(prompts) * n):
        own = [choice for choice in choices if choice["index"] == index]
        prompt_ids = sent[index // n].prompt_ids
        assert "".join(choice["text"] for choice in own) == prompts[index // n] + f"dog {index}"
        told = [value for choice in own for value in (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]]
        assert told[: len(prompt_ids)] == [None, *(row.logprob for row in scores(prompt_ids[1:], 1))]
        offsets = [value for choice in own for value in (choice["logprobs"] or {"text_offset": []})["text_offset"]]
        assert offsets == sorted(offsets) and offsets[len(prompt_ids)] == len(prompts[index // n])
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_for_a_prompts_logprobs_ends_with_the_one_that_has_them_computed(served, stream):
    served.answer("", finish_reason="error", error=RequestError(503, "engine_broke", "It broke."), delay_s=0.01)
    body = {"model": "support-fr", "prompt": "x", "n": 4, "echo": True, "logprobs": 0, "stream": stream}
    async with served.http() as http:
        response = await http.post("/v1/completions", json=body)
    assert response.json()["error"]["code"] == "engine_broke"
    assert len(served.engine.added) == 1
    served.assert_quiet()


async def test_a_client_that_leaves_while_choices_wait_for_the_logprobs(served):
    served.answer("", finish_reason="length", hangs=True)
    _, writer = await send(served, {"model": "support-fr", "prompt": "x", "n": 4, "echo": True, "logprobs": 0})
    await until(lambda: served.engine.added)
    await gone(writer)
    await until(lambda: served.engine.ended)
    await until(lambda: not +served.store.leases)
    assert len(served.engine.added) == 1
    served.assert_quiet()


def with_context(served, num_tokens: int) -> None:
    served.engine.ready = msgspec.structs.replace(served.engine.ready, max_model_len=num_tokens)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_prompts_logprobs_are_written_off_the_event_loop(served, stream, monkeypatch):
    """And say the same as where every slice of them is short."""
    with_context(served, 2000)
    served.answer(ANSWER, tokens_per_event=100)
    prompt = [4 + index % 250 for index in range(1000)]
    body = {"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 100, "stream": stream}
    if not stream:
        body["prompt_logprobs"] = 2
    threads = []
    for module, name in ((LogprobsFormat, "_write"), (OutputText, "feed")):
        monkeypatch.setattr(module, name, recording(getattr(module, name), threads))
    answer = await post(served, "/v1/completions", **body)
    on_loop = [count for thread, count in threads if thread is threading.main_thread()]
    assert max(on_loop, default=0) <= MAX_TOKENS_ON_LOOP
    assert len(prompt) in [count for thread, count in threads if thread is not threading.main_thread()]

    monkeypatch.setattr("server.api.logprobs.SLICE", 10**6)
    monkeypatch.setattr("server.api.choices.MAX_TOKENS_ON_LOOP", 10**6)
    whole = await post(served, "/v1/completions", **body)
    chunks = zip(answer, whole, strict=True) if stream else [(answer, whole)]
    for got, expected in chunks:
        assert got["choices"] == expected["choices"]
    assert max(count for thread, count in threads if thread is threading.main_thread()) >= len(prompt)


def recording(function, calls: list) -> Callable:
    """`function`, a method, that writes down in which thread it had how many tokens."""

    def record(self, values, *rest):
        calls.append((threading.current_thread(), len(values)))
        return function(self, values, *rest)

    return record


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_alone_may_fill_the_context(served, stream):
    """There is no output that would need room."""
    body = {"echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    room = served.engine.max_model_len
    answer = await post(served, "/v1/completions", prompt=[65] * room, **body)
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices if choice["logprobs"]) == room
    kept = await post(served, "/v1/completions", prompt=[65] * (2 * room), truncate_prompt_tokens=-1, **body)
    assert kept
    assert [len(request.prompt_ids) for request in served.engine.added] == [room, room]
    async with served.http() as http:
        for prompt, num_tokens in (([65] * (room + 1), 0), ([65] * room, 1), ([65] * room, None)):
            response = await http.post(
                "/v1/completions", json={"model": BASE, "prompt": prompt, **body, "max_tokens": num_tokens}
            )
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
            assert error["param"] == "prompt"
