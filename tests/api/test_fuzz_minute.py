"""A minute of random bytes, as bodies and as headers: no request breaks the server, hangs, or changes what others get.

The seeds are free and nothing is kept between runs: each run looks elsewhere. A failure prints what reproduces it.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections import Counter
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.api.conftest import ANSWER, BASE, Served
from tests.api.test_fuzz import LIKELY, junk
from tests.api.test_fuzz import requests as likely_requests
from tests.api.test_schemathesis import until_quiet

SECONDS = 60.0
ROUND = 100  # requests; after each the server must be well
HANGS_S = 10.0

MESSAGES = [{"role": "user", "content": "the lazy dog"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": BASE, "prompt": "the quick", "max_tokens": 4, "logprobs": 2, "stop": ["fox", "dog"]},
    "/v1/chat/completions": {
        "model": "support-fr",
        "messages": MESSAGES,
        "stream": True,
        "n": 2,
        "logit_bias": {"7": 1},
    },
    "/tokenize": {"messages": MESSAGES, "chat_template_kwargs": {"a": [1]}, "model": BASE},
    "/detokenize": {"model": BASE, "tokens": [5, 6, 299]},
    "/v1/load_lora_adapter": {"lora_name": "support-fr", "lora_path": "team/sql", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "nobody"},
}
LETTERS = "".join(map(chr, range(32, 127))) + "\t\x00\x1f\x7f\xa0\xe9\xff\u0130\u2028\ufeff\U0001f642"
HEADERS = ["x-request-id", "authorization", "content-type", "host", "accept", "origin", "x-multilora-phases", "x-é"]
KINDS = ["application/json", "APPLICATION/JSON ; charset=latin-1", "application/json;", "text/plain", "", "json"]
numbers = st.sampled_from([0, -1, 2**31, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), 0.1])
strings = st.sampled_from(["", "\x00", "\ud800", "\U0001f642" * 200, "../..", "{{ 7 }}", "a" * 5000]) | st.text(
    max_size=9
)
ONE_IN_FIVE = st.sampled_from([False] * 4 + [True])
values = junk | numbers | strings
header_values = st.text(LETTERS, max_size=40).map(str.encode) | st.binary(max_size=20)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all values below `node`, itself included."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def changed(node: Any, path: tuple, change: Any) -> Any:
    """`node` with `change` in place of what is at `path`."""
    if not path:
        return change
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = changed(node[path[0]], path[1:], change)
    return copy


@st.composite
def bodies(draw) -> tuple[str, bytes]:
    """A path and a body for it: anything, or a good one that is changed in a few places, then in its bytes."""
    kind = draw(st.sampled_from(["any", "likely", "changed", "changed", "changed", "bytes"]))
    path = draw(st.sampled_from(sorted(GOOD)))
    if kind == "any":
        return path, json.dumps(draw(values)).encode()
    if kind == "likely":
        path, body = draw(likely_requests())
        return path, json.dumps(body).encode()
    node: Any = dict(GOOD[path])
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        place = draw(st.sampled_from(places(node)))
        node = changed(node, place, draw(values))
        if isinstance(node, dict) and draw(st.booleans()):
            name = draw(st.sampled_from([*LIKELY, "stream_options", "seed", "truncate_prompt_tokens"]) | strings)
            node[name] = draw(LIKELY.get(name, values))
    content = json.dumps(node).encode()
    if kind == "bytes":
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 8, len(content))))
        inside = draw(
            st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b'{"a":' * 3000, b"1" * 6000, b"\xed\xa0\x80"])
        )
        content = content[:start] + inside + content[end:]
    return path, content


@st.composite
def heads(draw) -> list[tuple[bytes, bytes]]:
    """Headers, some of them odd."""
    names = draw(st.lists(st.sampled_from(HEADERS), max_size=3)) if draw(ONE_IN_FIVE) else []
    odd = {name: draw(header_values) for name in names}
    if "content-type" in odd:
        odd["content-type"] = draw(st.sampled_from(KINDS).map(str.encode) | header_values)
    fields = {"host": b"x", "content-type": b"application/json", **odd}
    return [(name.encode(), value.replace(b"\r", b"").replace(b"\n", b"")) for name, value in fields.items()]


@st.composite
def lengths(draw, size: int) -> bytes:
    """What is announced for a body of `size` bytes: mostly the truth."""
    wrong = [0, size // 2, size + 1, 10**9, 10**30, -1]
    odd = ["", "x", "0x10", f"+{size}", f"{size}, {size}", "\u0663", "1e3"]
    is_odd = draw(ONE_IN_FIVE) and draw(ONE_IN_FIVE)
    return str(draw(st.sampled_from([*wrong, *odd]) if is_odd else st.just(size))).encode()


def ask(
    served: Served, path: str, headers: list[tuple[bytes, bytes]], content: bytes
) -> tuple[int, dict, bytes] | None:
    """The answer's status, headers and body. None: the connection was closed without one."""
    host, port = served.url.removeprefix("http://").split(":")
    lines = [f"POST {path} HTTP/1.1".encode(), b"connection: close", *(b": ".join(pair) for pair in headers), b"", b""]
    announced = dict(headers)[b"content-length"]
    with socket.create_connection((host, int(port)), timeout=HANGS_S) as sock:
        sock.sendall(b"\r\n".join(lines) + content)
        if announced.isdigit() and int(announced) > len(content):
            sock.shutdown(socket.SHUT_WR)  # the rest will never come
        response = http.client.HTTPResponse(sock, method="POST")
        try:
            response.begin()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return None


def check_answer(answer: tuple[int, dict, bytes], path: str) -> str:
    """Its kind, for the count."""
    status, headers, body = answer
    assert 200 <= status < 500, answer
    if "x-request-id" not in headers:  # not HTTP: the server in front of the app says so
        assert status == 400, answer
        return "not http"
    if status != 200:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"], answer
        assert "Traceback" not in error["message"], answer
    elif headers["content-type"].startswith("text/event-stream"):
        assert body.endswith(b"\n\ndata: [DONE]\n\n"), answer
    elif headers["content-type"] == "application/json":
        json.loads(body)
    return f"{status} {path}"


def assert_well(served: Served) -> None:
    """Nothing runs, the server is healthy, and a good request is answered as ever."""
    until_quiet(served)
    with httpx.Client(base_url=served.url, timeout=HANGS_S) as client:
        assert client.get("/health").status_code == 200
        answer = client.post("/v1/completions", json={"model": BASE, "prompt": "x", "max_tokens": 100})
        assert answer.json()["choices"][0]["text"] == ANSWER
    until_quiet(served)


def test_a_minute_of_random_requests(served_in_thread):
    until = time.monotonic() + SECONDS
    seen: Counter[str] = Counter()

    @settings(
        max_examples=ROUND,
        database=None,
        derandomize=False,  # hypothesis does so by itself where CI is set: every round would be the first again
        deadline=None,
        print_blob=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(request=bodies(), headers=heads(), data=st.data())
    def one_round(request: tuple[str, bytes], headers: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
        path, content = request
        length = data.draw(lengths(len(content)))
        if time.monotonic() > until:
            return
        answer = ask(served_in_thread, path, [*headers, (b"content-length", length)], content)
        if answer is None:
            assert length != str(len(content)).encode(), "closed without an answer"
        else:
            seen[check_answer(answer, path)] += 1

    while time.monotonic() < until:
        one_round()
        assert_well(served_in_thread)
    for path in GOOD:  # the requests came so far that this means something
        assert seen[f"400 {path}"] and (seen[f"200 {path}"] or seen[f"404 {path}"]), seen
