"""The document against the server: what schemathesis makes of /openapi.json is answered as /openapi.json says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core import NOT_SET
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api.openapi import OPERATIONS
from tests.api.conftest import BASE, Served
from tests.api.test_stream_chunks import data_of, validator

MANAGED = "/v1/adapters"
NAMING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
ROUTES = sorted(OPERATIONS)
WITH_BODY = [route for route in ROUTES if OPERATIONS[route].body is not None]
GENERATING = ("/v1/completions", "/v1/chat/completions")
MODELS = [BASE, "base-alias", "support-fr", f"{BASE}:team/sql"]
NUM_EXAMPLES = 60
CONFIG = SchemathesisConfig.from_dict({"max-stream-events": 1000})  # streams are read to their end

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    negative_data_rejection,
]
# Not positive_data_acceptance: several limits (the context's length, one field's with another's) are not in the
# document.


def with_integers(value: Any) -> Any:
    """`value` with 1 for 1.0: both are integers in JSON Schema, but not here."""
    if isinstance(value, dict):
        return {name: with_integers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_integers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def with_models(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the names that are served, so that requests don't all end at the name."""
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            names = MODELS if "model" in schema.get("required", ()) else [*MODELS, None]
            schema["properties"]["model"] = {"enum": names}
    (model,) = document["paths"]["/v1/models/{model}"]["get"]["parameters"]
    model["schema"] = {"enum": [*MODELS, "nobody"]}
    for path, methods in document["paths"].items():
        for operation in methods.values() if "{name}" in path else ():
            operation["parameters"][0]["schema"] = {"enum": ["support-fr", "team/sql", "nobody"]}
    return document


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with those names and few tokens, so that requests reach the engine."""
    for schema in with_adapters(with_models(document))["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "max_tokens" in fields:
            fields["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 40}
            fields["n"] = {"allOf": [fields["n"], {"maximum": 3}]}
            schema["required"] = [*schema["required"], "max_tokens", "stream"]  # or streams are rare
        if "messages" in fields:
            fields["messages"] = {**fields["messages"], "maxItems": 1}
    return document


def with_adapters(document: dict[str, Any]) -> dict[str, Any]:
    """The document with adapters that are there, and names for them: some new, some taken."""
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "lora_name" in fields:
            fields["lora_name"] = {"anyOf": [{"enum": ["support-fr", "team/sql"]}, {"pattern": "^[a-z]{1,8}$"}]}
            fields["lora_name"]["type"] = "string"
            schema["required"] = [name for name in ("lora_name", "lora_path") if name in fields]
        if "lora_path" in fields:
            fields["lora_path"] = {"enum": ["support-fr", "team/sql", "nobody"]}
            fields["base_model_name"] = {"enum": [BASE, None]}
        if "path" in fields:  # of the bodies that manage adapters
            fields["name"] = {
                "type": "string",
                "anyOf": [{"enum": ["support-fr", "team/sql"]}, {"pattern": "^[a-z]{1,8}$"}],
            }
            fields["path"] = {"enum": ["support-fr", "team/sql", "nobody", None]}
            fields.pop("source", None)
    return document


def run_all(served: Served, route: tuple[str, str], mode: GenerationMode, change: Callable[[Any], Any]) -> Counter[str]:
    """Sends what schemathesis makes of one route and checks each answer; how many there were of each kind."""
    method, path = route
    document = httpx.get(f"{served.url}/openapi.json").json()
    chunks = validator(document, path, "text/event-stream") if path in GENERATING else None
    operation = schemathesis.openapi.from_dict(change(document), config=CONFIG)[path][method]
    seen: Counter[str] = Counter()

    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # one failure is enough, and shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        if mode == GenerationMode.POSITIVE and case.body is not NOT_SET:
            case.body = with_integers(case.body)
        response = case.call(base_url=served.url)
        kind = response.headers["content-type"][0].partition(";")[0]
        seen[f"{response.status_code} {kind}"] += 1
        is_stream = kind == "text/event-stream"
        case.validate_response(response, checks=[*CHECKS, *(() if is_stream else (response_schema_conformance,))])
        if is_stream:
            for chunk in data_of(response.text):  # schemathesis would hold the event, and not its data, against it
                chunks.validate(chunk)

    check()
    return seen


def until_quiet(served: Served) -> None:
    """Nothing is left running when the last answer has come, and nothing is held but by pins."""
    until = time.monotonic() + 5
    while served.engine.num_open and time.monotonic() < until:
        time.sleep(0.001)
    for image_key in set(served.engine.pinned):
        served.store.leases.pop(image_key, None)
    served.assert_quiet()


def test_the_routes_with_a_body():
    managing = {MANAGED, f"{MANAGED}/inspect", f"{MANAGED}/{{name}}/prefetch"}
    assert {path for _, path in WITH_BODY} == {*GENERATING, *NAMING, *managing, "/tokenize", "/detokenize"}


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_what_the_document_allows(served_in_thread, route):
    seen = run_all(served_in_thread, route, GenerationMode.POSITIVE, narrowed)
    kind = "text/plain" if route[1] in (*NAMING, "/metrics") else "application/json"
    num_answered = sum(seen[f"{status} {kind}"] for status in OPERATIONS[route].well)
    assert num_answered, seen
    if route[1] in NAMING:
        assert seen["400 application/json"] + seen["404 application/json"] >= 10, seen
    if route == ("POST", MANAGED):
        assert min(seen[f"{status} application/json"] for status in (201, 202, 404, 409)) >= 1, seen
    if route[1] in GENERATING:  # so many that the engine was really at work, and on streams too
        assert num_answered >= 10 and seen["200 text/event-stream"] >= 5, seen
        assert len({request.adapter for request in served_in_thread.engine.added if not request.pending}) >= 2
    until_quiet(served_in_thread)


def test_any_name_of_a_model(served_in_thread):
    seen = run_all(served_in_thread, ("GET", "/v1/models/{model}"), GenerationMode.POSITIVE, lambda document: document)
    assert seen["404 application/json"] >= 10, seen


@pytest.mark.parametrize("route", WITH_BODY, ids=" ".join)
def test_what_the_document_forbids_is_refused(served_in_thread, route):
    seen = run_all(served_in_thread, route, GenerationMode.NEGATIVE, with_models)
    assert seen["400 application/json"] >= 10, seen
    assert not served_in_thread.engine.added
    until_quiet(served_in_thread)
