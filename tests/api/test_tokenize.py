"""/tokenize, /detokenize, /version: what the generating routes would see, without generating."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.tokenize import server_version
from tests.api.conftest import BASE

CHAT = [{"role": "user", "content": "the lazy dog"}]


async def post(served, path: str, body: dict) -> dict:
    async with served.http() as http:
        response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_prompt(served):
    ids = served.tokenizer.encode("the quick 日", add_special_tokens=True)
    for body in ({"prompt": "the quick 日"}, {"prompt": "the quick 日", "model": "support-fr"}):
        told = await post(served, "/tokenize", body)
        assert told == {"count": len(ids), "max_model_len": 128, "tokens": ids, "token_strs": None}
    told = await post(served, "/tokenize", {"prompt": "the quick 日", "return_token_strs": True})
    assert told["token_strs"] == [served.tokenizer.pieces.raw(token_id) for token_id in ids]
    assert (await post(served, "/tokenize", {"prompt": ""}))["tokens"] == []


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}, {"add_special_tokens": True}])
async def test_messages_are_what_a_chat_would_send(served, fields):
    told = await post(served, "/tokenize", {"messages": CHAT, "model": BASE, **fields})
    await post(served, "/v1/chat/completions", {"messages": CHAT, "model": BASE, **fields})
    assert told["tokens"] == served.engine.added[0].prompt_ids
    assert told["count"] == len(told["tokens"])


async def test_a_long_prompt_is_counted(served):
    assert (await post(served, "/tokenize", {"prompt": "quick " * 500}))["count"] > 128


async def test_back_to_text(served):
    text = "<|user|>the quick 日<|end|>"
    ids = (await post(served, "/tokenize", {"prompt": text}))["tokens"]
    assert (await post(served, "/detokenize", {"tokens": ids, "model": BASE}))["prompt"] == text
    assert (await post(served, "/detokenize", {"tokens": []}))["prompt"] == ""


async def test_version(served):
    async with served.http() as http:
        assert (await http.get("/version")).json() == {"version": server_version()}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, 400, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": CHAT, "tools": [{}]}, 400, "tools"),
        ("/tokenize", {"messages": CHAT, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "x", "odd": 1}, 400, "odd"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
async def test_bad_bodies(served, path, body, status, param):
    async with served.http() as http:
        response = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


async def test_the_key_is_asked_for(guarded):
    async with guarded.http() as http:
        for method, path in (
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/version"),
            ("GET", "/openapi.json"),
        ):
            assert (await http.request(method, path, json={})).status_code == 401


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20))
def test_pieces_joined_are_the_text(tokenizer, text):
    """Byte-level: every byte of the text is in exactly one token's piece."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.pieces.bytes_of, ids)) == text.encode()
