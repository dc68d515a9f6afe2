"""Adapters managed in real processes: by the file, by the routes, and what the engine makes of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.tiny_server import TinyServer, World, tiny_server

TOKENS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World.make(tmp_path_factory.mktemp("managed"), num_adapters=4)
    broken = world.root / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "use_dora": true}')
    (broken / "adapter_model.safetensors").write_bytes(b"not at all")
    return world


def say(path: Path, *entries: dict[str, object]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({"adapters": entries}))
    beside.rename(path)


def answer(http: httpx.Client, model: str) -> list[int]:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    response = http.post("/v1/completions", json={**body, "return_token_ids": True})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def adapter(http: httpx.Client, name: str) -> dict:
    response = http.get(f"/v1/adapters/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def until(condition, timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it does not come to be"
        time.sleep(0.05)


def check_file(http: httpx.Client, server: TinyServer, path: Path) -> None:
    """What the file says is there at start, follows the file, and leaves when it does."""
    assert answer(http, "kept") == answer(http, "a0") != answer(http, "a1")
    kept = adapter(http, "kept")
    assert (kept["given_by"], kept["device"], kept["weight"]) == ("file", {"state": "resident", "pinned": True}, 2.0)
    state = http.get("/v1/adapters").json()["adapters_file"]
    assert state["ok"] and [entry["name"] for entry in state["failed"]] == ["broken-too"]
    assert server.metric("multilora_adapters_file_failed_entries") == 1
    say(path, {"name": "kept", "path": "a1"})
    until(lambda: answer(http, "kept") == answer(http, "a1"))
    path.write_text("nonsense")
    until(lambda: server.metric("multilora_adapters_file_ok") == 0)
    assert answer(http, "kept") == answer(http, "a1")
    say(path)
    until(lambda: http.get("/v1/adapters/kept").status_code == 404)


def check_routes(http: httpx.Client) -> None:
    added = http.post("/v1/adapters", json={"name": "q", "path": "a2", "weight": 0.5, "pin": True})
    assert added.status_code == 201, added.text
    assert answer(http, "q") == answer(http, "a2")
    report = http.post("/v1/adapters/inspect", json={"name": "a3"}).json()
    assert adapter(http, "a3")["disk"]["state"] == "absent"
    for tier, where in (("host", "host"), ("device", "device")):
        response = http.post("/v1/adapters/a3/prefetch", json={"tier": tier})
        assert response.status_code == 200, response.text
        assert response.json()[where]["state"] in ("held", "resident")
    prefetched = adapter(http, "a3")
    assert (prefetched["bytes"], prefetched["digest"]) == (report["bytes"]["device"], report["digest"])
    assert prefetched["uses"] == 0
    refused = http.post("/v1/adapters/inspect", json={"path": "broken"})
    assert refused.status_code == 422 and refused.json()["report"]["problems"], refused.text
    assert http.post("/v1/adapters", json={"name": "q", "path": "broken", "replace": True}).status_code == 422
    assert answer(http, "q") == answer(http, "a2")
    assert http.post("/v1/adapters", json={"name": "q", "path": "a3", "replace": True}).status_code == 201
    assert answer(http, "q") == answer(http, "a3")
    until(lambda: adapter(http, "q")["device"] == {"state": "resident", "pinned": True})
    assert http.post("/v1/adapters/q/reload").status_code == 200
    assert http.delete("/v1/adapters/q").status_code == 200
    assert http.get("/v1/adapters/q").status_code == 404
    assert answer(http, "a3") and answer(http, "base")


def test_a_server_whose_adapters_are_managed(world):
    path = world.root / "adapters.json"
    kept = {"name": "kept", "path": "a0", "pin": True, "weight": 2.0}
    say(path, kept, {"name": "broken-too", "path": "broken", "preload": True})
    with tiny_server(world, "--adapters-file", str(path), "--host-memory", "4MiB") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            check_file(http, server, path)
            check_routes(http)
            assert http.get("/health").status_code == 200
        server.process.terminate()
        assert server.exit_code == 0
