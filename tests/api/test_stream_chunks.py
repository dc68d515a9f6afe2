"""Streams, and whole answers, against the schemas that /openapi.json gives for them: nothing else is in them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from server.api.openapi import document
from server.engine.messages import RequestError
from tests.api.conftest import BASE
from tests.api.test_openapi import routes_of

CHAT = [{"role": "user", "content": "the lazy dog"}]
PATHS = {"/v1/completions": {"prompt": ["the quick", "fox"]}, "/v1/chat/completions": {"messages": CHAT}}
OPTIONS: list[dict[str, Any]] = [
    {"n": 2},
    {"return_token_ids": True},
    {"logprobs": True, "top_logprobs": 2},
    {"stop": "brown"},
    {"max_tokens": 2, "model": "support-fr"},
]


def closed(node: Any) -> Any:
    """A schema under which an object has no other fields than those it names."""
    if isinstance(node, list):
        return [closed(value) for value in node]
    if not isinstance(node, dict):
        return node
    inner = {key: closed(value) for key, value in node.items()}
    return {**inner, "additionalProperties": False} if "properties" in node and "type" in node else inner


def validator(spec: dict[str, Any], path: str, kind: str) -> Draft202012Validator:
    """For the contents of a 200 of POST `path`, or for the data of its events."""
    schema = spec["paths"][path]["post"]["responses"]["200"]["content"][kind]["schema"]
    return Draft202012Validator(closed({**schema, "components": spec["components"]}))


def data_of(stream: str) -> list[Any]:
    """The data of a stream's events, without the last."""
    *events, done, end = stream.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_as_described(served, path, stream):
    """With none, and with each two, of the options that add to an answer."""
    spec = document(routes_of(served), served.engine.vocab_size)
    check = validator(spec, path, "text/event-stream" if stream else "application/json")
    options = list(OPTIONS)
    options.append({"stream_options": {"include_usage": True}} if stream else {"prompt_logprobs": 1})
    if path == "/v1/completions":
        options[2] = {"logprobs": 2, "echo": True}
    served.answer("the quick brown fox 日本語", adapter="support-fr", stop_token_id=7)
    async with served.http() as http:
        for first, second in [({}, {}), *itertools.combinations(options, 2)]:
            body = {"model": BASE, **PATHS[path], "stream": stream, **first, **second}
            response = await http.post(path, json=body, headers={"x-multilora-phases": "1"})
            assert response.status_code == 200, response.text
            for answer in data_of(response.text) if stream else [response.json()]:
                check.validate(answer)


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_in_a_stream_is_as_described(served, path):
    spec = document(routes_of(served), served.engine.vocab_size)
    served.answer("the", finish_reason="error", error=RequestError(503, "engine_broke", "It broke."))
    async with served.http() as http:
        response = await http.post(path, json={"model": BASE, **PATHS[path], "stream": True})
    events = data_of(response.text)
    assert "error" in events[-1] and len(events) >= 2
    for event in events:
        validator(spec, path, "text/event-stream").validate(event)


@pytest.mark.parametrize("path", PATHS)
async def test_another_chunk_is_not(served, path):
    """The schemas say enough to tell: a chunk with a field more, less or wrong does not fit."""
    check = validator(document(routes_of(served), 300), path, "text/event-stream")
    async with served.http() as http:
        response = await http.post(path, json={"model": BASE, **PATHS[path], "stream": True})
    chunk = data_of(response.text)[1]
    (choice,) = chunk["choices"]
    check.validate(chunk)
    wrong = [{**chunk, "choices": [{**choice, **change}]} for change in ({"more": 1}, {"index": "0"}, {"logprobs": 1})]
    wrong += [{**chunk, "object": "other"}, {key: value for key, value in chunk.items() if key != "id"}]
    wrong += [{**chunk, "choices": [{**choice, "finish_reason": "gone"}]}, {**chunk, "choices": [choice, choice]}]
    for other in wrong:
        with pytest.raises(ValidationError):
            check.validate(other)
