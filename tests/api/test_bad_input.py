"""Every bad request gets a 4xx that names the field, and never reaches the engine."""

from __future__ import annotations

import asyncio
import json
import typing

import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from server.api.body import MAX_JSON_VALUES
from server.api.schemas import ChatRequest, CompletionRequest
from tests.api.conftest import BASE

OK = {"model": BASE, "prompt": "the quick"}
CHAT_OK = {"model": BASE, "messages": [{"role": "user", "content": "the quick"}]}
BIG = 10**25
V = 300  # the vocabulary of the test base; checked below


def message(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "x", **fields}]}


# (what is changed in a good request, the field that the error must name, the code)
BAD_ANYWHERE = [
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": ""}, "model", "invalid_value"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": "\ud800"}, "model", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"max_tokens": 5.0}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": BIG}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1000}, "max_tokens", "context_length_exceeded"),
    ({"min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": [1]}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"top_k": BIG}, "top_k", "invalid_value"),
    ({"min_p": 1.5}, "min_p", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": -(2**63) - 1}, "seed", "invalid_value"),
    ({"seed": "1"}, "seed", "invalid_type"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ["a", None]}, "stop", "invalid_type"),
    ({"stop": ["\udfff"]}, "stop", "invalid_value"),
    ({"stop": [str(i) for i in range(17)]}, "stop", "invalid_value"),
    ({"stop": "x" * 1025}, "stop", "invalid_value"),
    ({"stop_token_ids": 5}, "stop_token_ids", "invalid_type"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [V]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [BIG]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [True]}, "stop_token_ids", "invalid_type"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids", "invalid_value"),
    ({"ignore_eos": 1}, "ignore_eos", "invalid_type"),
    ({"stream": "true"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"stream": True, "stream_options": {"x": None}}, "stream_options.x", "unknown_parameter"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "invalid_value",
    ),
    ({"return_token_ids": 1}, "return_token_ids", "invalid_type"),
    ({"cache_salt": "x" * 129}, "cache_salt", "invalid_value"),
    ({"cache_salt": 5}, "cache_salt", "invalid_type"),
    ({"user": 5}, "user", "invalid_type"),
    ({"user": "\ud800"}, "user", "invalid_value"),
    ({"metadata": "x"}, "metadata", "invalid_type"),
    ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
    ({"metadata": {"a": ["x"]}}, "metadata", "invalid_type"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "invalid_value"),
    ({"metadata": {"k" * 65: "x"}}, "metadata", "invalid_value"),
    ({"metadata": {"a": "x" * 513}}, "metadata", "invalid_value"),
    ({"metadata": {"a": "\ud800"}}, "metadata", "invalid_value"),
    ({"metadata": {"\ud800": "x"}}, "metadata", "invalid_value"),
    ({"store": "x"}, "store", "invalid_type"),
    ({"no_such_field": 1}, "no_such_field", "unknown_parameter"),
    ({"no_such_field": None}, "no_such_field", "unknown_parameter"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"9" * 21: 1}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(V): 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": -100.5}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": True}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": True}, "prompt_logprobs", "invalid_type"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"bad_words": "x"}, "bad_words", "invalid_type"),
    ({"bad_words": [5]}, "bad_words", "invalid_type"),
    ({"bad_words": [""]}, "bad_words", "invalid_value"),
    ({"bad_words": ["  "]}, "bad_words", "invalid_value"),
    ({"bad_words": ["x"] * 129}, "bad_words", "invalid_value"),
    ({"bad_words": ["x" * 257]}, "bad_words", "invalid_value"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({"allowed_token_ids": 5}, "allowed_token_ids", "invalid_type"),
    ({"allowed_token_ids": [V]}, "allowed_token_ids", "invalid_value"),
    ({"allowed_token_ids": ["5"]}, "allowed_token_ids", "invalid_type"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
    ({"truncate_prompt_tokens": 2.0}, "truncate_prompt_tokens", "invalid_type"),
    ({"priority": "high"}, "priority", "invalid_type"),
    ({"priority": BIG}, "priority", "invalid_value"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "invalid_type"),
    ({"skip_special_tokens": 0}, "skip_special_tokens", "invalid_type"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids", "invalid_type"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs", "unsupported_parameter"),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
]
BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": [""]}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": ["a", [1]]}, "prompt", "invalid_type"),
    ({"prompt": ["a", 5]}, "prompt", "invalid_type"),
    ({"prompt": [[1], []]}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 43, "n": 3}, "n", "invalid_value"),
    ({"prompt": ["a", "quick " * 128]}, "prompt", "context_length_exceeded"),
    ({"echo": "yes"}, "echo", "invalid_type"),
    ({"max_tokens": 0, "echo": False}, "max_tokens", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
    ({"prompt": [1.0]}, "prompt", "invalid_type"),
    ({"prompt": [True]}, "prompt", "invalid_type"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [V]}, "prompt", "invalid_value"),
    ({"prompt": [BIG]}, "prompt", "invalid_value"),
    ({"prompt": "a\ud83d"}, "prompt", "invalid_value"),
    ({"prompt": [1] * 128}, "prompt", "context_length_exceeded"),
    ({"prompt": "quick " * 128}, "prompt", "context_length_exceeded"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"logprobs": -1}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"messages": CHAT_OK["messages"]}, "messages", "unknown_parameter"),
]
ODD_KWARGS = [{"a": "\ud800"}, {"\ud800": 1}, {"a": [{"b": "\udfff"}]}, {"a": {"\udfff": 1}}]
BAD_CHATS = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_type"),
    ({"messages": ["hello"]}, "messages[0]", "invalid_type"),
    (message(role="narrator"), "messages[0].role", "invalid_value"),
    (message(role="tool"), "messages[0].role", "unsupported_parameter"),
    (message(role=None), "messages[0].role", "missing_required_parameter"),
    (message(content=None), "messages[0].content", "missing_required_parameter"),
    (message(content=5), "messages[0].content", "invalid_type"),
    (message(content=[]), "messages[0].content", "invalid_value"),
    (message(content=["x"]), "messages[0].content", "invalid_type"),
    (message(content=[{"type": "text"}]), "messages[0].content", "invalid_value"),
    (message(content=[{"type": "text", "text": 5}]), "messages[0].content", "invalid_type"),
    (message(content=[{"type": "text", "text": "x", "y": 1}]), "messages[0].content", "invalid_value"),
    (message(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content", "unsupported_parameter"),
    (message(content="\ud800"), "messages[0].content", "invalid_value"),
    (message(name=5), "messages[0].name", "invalid_type"),
    (message(name="\ud800"), "messages[0].name", "invalid_value"),
    (message(mood="happy"), "messages[0].mood", "unknown_parameter"),
    (message(tool_calls=[{"id": "x"}]), "messages[0].tool_calls", "unsupported_parameter"),
    (message(audio={"id": "x"}), "messages[0].audio", "unsupported_parameter"),
    (message(content="quick " * 128), "messages", "context_length_exceeded"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_completion_tokens": 1000}, "max_completion_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 2, "logprobs": False}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {str(i): i for i in range(65)}}, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "invalid_type"),
    *(({"chat_template_kwargs": kwargs}, "chat_template_kwargs", "invalid_value") for kwargs in ODD_KWARGS),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "invalid_value",
    ),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
]


async def check(served, path, body, param, code):
    async with served.http() as http:
        response = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["code"] == code, error
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert served.engine.added == []


def changed(good: dict, change: dict) -> dict:
    return {**good, **change}


async def test_bad_fields_of_both_endpoints(served):
    assert served.engine.vocab_size == V
    for change, param, code in BAD_ANYWHERE:
        await check(served, "/v1/completions", changed(OK, change), param, code)
        await check(served, "/v1/chat/completions", changed(CHAT_OK, change), param, code)


async def test_bad_completions(served):
    for change, param, code in BAD_COMPLETIONS:
        await check(served, "/v1/completions", changed(OK, change), param, code)


async def test_bad_chats(served):
    for change, param, code in BAD_CHATS:
        await check(served, "/v1/chat/completions", changed(CHAT_OK, change), param, code)


async def test_metadata_and_stream_options_at_their_bounds(served):
    metadata = {f"{i:064}": "x" * 512 for i in range(15)} | {"none": None}
    bodies = [
        {"metadata": metadata},
        {"metadata": None},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}},
    ]
    async with served.http() as http:
        for change in bodies:
            for path, good in (("/v1/completions", OK), ("/v1/chat/completions", CHAT_OK)):
                response = await http.post(path, json=changed(good, change))
                assert response.status_code == 200, response.text
                assert ('"usage":{' in response.text) is ("stream" not in change)  # null is absent, which is false


@pytest.mark.parametrize("model", [BASE, "support-fr"])
async def test_what_no_template_can_be_given(served, model):
    """Neither the base's nor an adapter's own, which is rendered elsewhere."""
    (served.adapters_dir / "support-fr" / "chat_template.jinja").write_text("{{ a }}{{ messages[0].name }}")
    given = [(f'"chat_template_kwargs": {json.dumps(kwargs)}', "chat_template_kwargs") for kwargs in ODD_KWARGS]
    given += [
        (f'"chat_template_kwargs": {{"a": {number}}}', "chat_template_kwargs") for number in ("1e999", "[-1e999]")
    ]
    given += [('"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]', "messages[0].name")]
    async with served.http() as http:
        for path in ("/v1/chat/completions", "/tokenize"):
            for fields, param in given:
                good = json.dumps({**CHAT_OK, "model": model})
                response = await http.post(
                    path, content=f"{good[:-1]}, {fields}}}", headers={"content-type": "application/json"}
                )
                assert response.status_code == 400, response.text
                assert response.json()["error"]["param"] == param
    assert served.engine.added == []


FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
async def test_non_finite_floats(served, number):
    for name in FLOATS:
        text = json.dumps(OK)[:-1] + f', "{name}": {number}}}'
        async with served.http() as http:
            response = await http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400
        error = response.json()["error"]
        if "e999" in number:
            assert error["param"] == name
        else:
            assert number in error["message"]  # no JSON, so there are no fields
    assert served.engine.added == []


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"{", "application/json", "invalid_json"),
        (b"", "application/json", "invalid_json"),
        (b'{"model": "\xff"}', "application/json", "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", "invalid_json"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "application/json", "invalid_json"),
        (b'{"a": [' + b"[]," * (MAX_JSON_VALUES // 2) + b"[]]}", "application/json", "invalid_body"),
        (b'{"a": [' + b"{}," * (MAX_JSON_VALUES // 2) + b"{}]}", "application/json", "invalid_body"),
        (b"[]", "application/json", "invalid_body"),
        (b"null", "application/json", "invalid_body"),
        (b'"text"', "application/json; charset=utf-8", "invalid_body"),
        (json.dumps(OK).encode(), "text/plain", "invalid_content_type"),
        (json.dumps(OK).encode(), "application/x-www-form-urlencoded", "invalid_content_type"),
        (json.dumps(OK).encode(), None, "invalid_content_type"),
    ],
)
async def test_bad_bodies(served, content, kind, code):
    async with served.http() as http:
        headers = {} if kind is None else {"content-type": kind}
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = await http.post(path, content=content, headers=headers)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["code"] == code


def body_of_values(num_values: int) -> bytes:
    return b'{"a":[' + b"1," * (num_values - 2) + b"1]}"


async def test_the_number_of_values_in_a_body(served):
    async with served.http() as http:
        for route in ("/v1/completions", "/tokenize"):
            headers = {"content-type": "application/json"}
            allowed, refused = [
                (await http.post(route, content=body_of_values(num), headers=headers)).json()["error"]["message"]
                for num in (MAX_JSON_VALUES, MAX_JSON_VALUES + 1)
            ]
            assert "JSON values" not in allowed
            assert str(MAX_JSON_VALUES) in refused and str(MAX_JSON_VALUES + 1) in refused


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_is_too_large(guarded, is_chunked):
    async def chunks() -> typing.AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    headers = {"content-type": "application/json", "authorization": "Bearer s3cret"}
    async with guarded.http() as http:
        content = chunks() if is_chunked else b"x" * 20_001
        response = await http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


async def test_a_body_that_says_it_is_too_large_is_not_waited_for(guarded):
    host, port = guarded.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer s3cret\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: 20001\r\n\r\n".encode())
    status = await asyncio.wait_for(reader.readline(), 5)
    assert b" 413 " in status
    writer.close()


async def test_the_words_for_an_overlong_prompt(served):
    with pytest.raises(openai.BadRequestError) as caught:
        await served.client().completions.create(model=BASE, prompt=[1] * 200)
    assert caught.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 128 tokens. However, you requested 201 tokens" in str(caught.value)


async def test_a_prompt_that_just_fits(served):
    client = served.client()
    await client.completions.create(model=BASE, prompt=[1] * 127)
    assert served.engine.added[0].params.max_tokens == 1  # the default shrinks to what is left
    await client.completions.create(model=BASE, prompt=[1] * 100, max_tokens=28)
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model=BASE, prompt=[1] * 100, max_tokens=29)


@pytest.mark.parametrize(
    ("schema", "params"),
    [
        (CompletionRequest, completion_params.CompletionCreateParamsBase),
        (ChatRequest, chat_params.CompletionCreateParamsBase),
    ],
)
async def test_no_field_of_the_official_client_is_unknown(served, schema, params):
    """Each is served, inert, or refused by its name: a new client release shows here."""
    path, good = ("/v1/chat/completions", CHAT_OK) if schema is ChatRequest else ("/v1/completions", OK)
    assert len(params.__annotations__) >= 17
    for name in params.__annotations__:
        if name in good:
            continue
        async with served.http() as http:
            unset = await http.post(path, json={**good, name: None})
            odd = await http.post(path, json={**good, name: {"odd": "value"}})
        assert unset.status_code == 200, (name, unset.text)
        if odd.status_code != 200:  # metadata takes any object
            error = odd.json()["error"]
            assert error["param"].partition(".")[0] == name
            assert error["code"] != "unknown_parameter" or error["param"] == "stream_options.odd"
        else:
            assert name == "metadata"


async def test_errors_never_echo_much(served):
    async with served.http() as http:
        response = await http.post("/v1/completions", json={**OK, "model": "x\n" * 5000})
        assert response.status_code == 404
        assert len(response.text) < 600
        response = await http.post("/v1/completions", json={**OK, "y" * 50_000: 1})
        assert response.status_code == 400
        assert len(response.text) < 2000
        response = await http.post(
            "/v1/completions",
            content=json.dumps({**OK, "\ud800": 1}),
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "\ufffd"
