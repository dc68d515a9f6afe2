"""Random bodies and headers: every answer is one that the document describes, and nothing is left running."""

from __future__ import annotations

import json
import time

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.openapi import OPERATIONS
from server.api.schemas import REFUSED_BY_SCHEMA, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.api.conftest import BASE

PATHS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([0, 1, 2, -1])
ids = st.lists(st.integers(-1, 300), max_size=5)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": st.text(max_size=8) | junk}
    ),
    max_size=3,
)
LIKELY = {  # values of which many are good, so that requests reach the engine
    "model": st.sampled_from([BASE, "base-alias", "support-fr", f"{BASE}:team/sql", "nobody"]),
    "prompt": st.text(min_size=1, max_size=8) | ids | st.lists(st.text(min_size=1, max_size=4), max_size=3),
    "messages": messages,
    "tokens": ids,
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 40),
    "logprobs": st.sampled_from([True, False, 0, 1, 3]),
    "top_logprobs": st.integers(0, 3),
    "prompt_logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 299).map(str), st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(st.text(min_size=1, max_size=4), max_size=2),
    "truncate_prompt_tokens": st.integers(-1, 5),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "continue_final_message": st.booleans(),
}


@st.composite
def requests(draw) -> tuple[str, dict]:
    """A path, and a body with what it needs and some other fields, good and bad."""
    path = draw(st.sampled_from(sorted(PATHS)))
    schema = PATHS[path]
    required = [name for name, field in schema.model_fields.items() if field.is_required() or name == "model"]
    names = [*schema.model_fields, *REFUSED_BY_SCHEMA[schema]]
    others = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    body = {name: draw(LIKELY.get(name, junk)) for name in dict.fromkeys([*required, *others])}
    if draw(st.integers(0, 5)) == 0:
        body[draw(st.sampled_from(names))] = draw(junk)
    return path, body


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests(), headers=st.dictionaries(st.sampled_from(["x-request-id", "x-multilora-phases"]), junk))
def test_no_request_breaks_the_server(served_in_thread, request, headers):
    path, body = request
    content = json.dumps(body)
    shown = {name: ascii(value)[:50].strip() for name, value in headers.items()}
    with httpx.Client(base_url=served_in_thread.url, verify=False) as http:
        response = http.post(path, content=content, headers={"content-type": "application/json", **shown})
    described = {200, *OPERATIONS["POST", path].errors}
    assert response.status_code in described
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
    elif body.get("stream") is True:
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        choices = [choice for event in events[:-2] for choice in json.loads(event.removeprefix("data: "))["choices"]]
        ends = [choice["index"] for choice in choices if choice["finish_reason"] is not None]
        assert sorted(ends) == sorted({choice["index"] for choice in choices})
    elif path.startswith("/v1"):
        answer = response.json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        assert all(choice["finish_reason"] for choice in answer["choices"])
    until = time.monotonic() + 5
    while served_in_thread.engine.num_open and time.monotonic() < until:
        time.sleep(0.001)
    served_in_thread.assert_quiet()
