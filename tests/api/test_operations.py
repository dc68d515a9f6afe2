"""Models, and routes that do not exist."""

from __future__ import annotations

import time

import pytest

from tests.api.conftest import BASE


async def test_models(served):
    models = (await served.client().models.list()).data
    assert [model.id for model in models] == [BASE, "base-alias", "support-fr", "team/sql"]
    by_id = {model.id: model for model in models}
    assert by_id[BASE].parent is None
    assert by_id[BASE].root == BASE
    assert by_id["base-alias"].root == BASE
    assert by_id["team/sql"].parent == BASE
    assert by_id["team/sql"].root == "team/sql"
    assert {model.max_model_len for model in models} == {128}
    assert all(model.object == "model" and model.owned_by for model in models)
    assert all(abs(model.created - time.time()) < 60 for model in models)
    async with served.http() as http:
        assert str(served.adapters_dir) not in (await http.get("/v1/models")).text  # no folders of the host


@pytest.mark.parametrize("name", [BASE, "base-alias", "support-fr", "team/sql"])
async def test_one_model(served, name):
    model = await served.client().models.retrieve(name)
    assert model.id == name
    assert model.parent == (None if name in (BASE, "base-alias") else BASE)


@pytest.mark.parametrize("name", ["nobody", "%2e%2e/secret", "a%00b", "..%2f..%2fetc/passwd", "x" * 500])
async def test_one_model_that_is_none(served, name):
    async with served.http() as http:
        response = await http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/x", 405, "method_not_allowed"),
    ],
)
async def test_routes_that_are_not_there(served, method, path, status, code):
    async with served.http() as http:
        response = await http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert response.headers["x-request-id"]
