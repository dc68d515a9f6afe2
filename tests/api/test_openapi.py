"""The OpenAPI document: it has every route, is itself valid, and its schemas agree with what the server takes."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

from server.api.app import create_app
from server.api.openapi import OPERATIONS, document, served_operations
from server.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.api.conftest import BASE

CHAT = [{"role": "user", "content": "the lazy dog"}]


@pytest.fixture
async def spec(served):
    async with served.http() as http:
        response = await http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    return response.json()


def routes_of(served) -> list:
    """The routes of an app like the one that is served, below its middleware."""
    app = create_app(served.state)
    while not isinstance(app, FastAPI):
        app = app._app
    return app.routes


def refs(node: object) -> set[str]:
    """Every $ref below `node`."""
    if isinstance(node, list):
        return set().union(*map(refs, node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
    return own.union(*map(refs, node.values()))


async def test_every_route_is_described(served, spec):
    described = {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods}
    assert described == set(OPERATIONS)
    assert described == served_operations(routes_of(served))


async def test_every_reference_is_there(spec):
    assert refs(spec)
    for ref in refs(spec):
        assert ref.removeprefix("#/components/schemas/") in spec["components"]["schemas"]


async def test_every_field_of_the_bodies_is_described(spec):
    for model in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest):
        schema = spec["components"]["schemas"][model.__name__]
        assert set(model.model_fields) <= set(schema["properties"])
        assert schema["additionalProperties"] is False
        assert all(field for field in schema["properties"].values()), "a field without a schema says nothing"


async def test_null_is_absent_in_options_and_load_bodies_too(spec):
    schemas = spec["components"]["schemas"]
    null = {"type": "null"}
    assert null in schemas["StreamOptions"]["properties"]["include_usage"]["anyOf"]
    for name in ("LoadLoraAdapterRequest", "UnloadLoraAdapterRequest"):
        assert all(null in field["anyOf"] for field in schemas[name]["properties"].values())
        assert schemas[name].get("additionalProperties", True) is True


async def test_token_ids_are_bounded_by_the_vocabulary(served, spec):
    stop_ids = spec["components"]["schemas"]["ChatRequest"]["properties"]["stop_token_ids"]
    assert stop_ids["anyOf"][0]["items"]["maximum"] == served.engine.vocab_size - 1
    other = document(routes_of(served), 7)["components"]["schemas"]["ChatRequest"]["properties"]
    assert other["stop_token_ids"]["anyOf"][0]["items"]["maximum"] == 6


async def test_the_statuses_that_tests_see_are_described(served, spec):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": CHAT})):
        told = spec["paths"][path]["post"]["responses"]
        for status in ("200", "400", "401", "404", "413", "422", "429", "500", "503"):
            assert status in told
        async with served.http() as http:
            for change in ({"model": BASE}, {"model": "nobody"}, {"model": BASE, "n": 0}):
                response = await http.post(path, json={**body, **change})
                assert str(response.status_code) in told
