"""The OpenAPI document: built from the schemas that requests are validated by, so it can't say anything else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import BaseRoute

from server.api.adapter_bodies import (
    InspectRequest,
    LoadLoraAdapterRequest,
    NewAdapter,
    PrefetchRequest,
    UnloadLoraAdapterRequest,
)
from server.api.answer_schemas import (
    ADAPTER,
    ADAPTER_REPORT,
    ANY,
    CHAT,
    CHUNKS,
    COMPLETION,
    ERROR,
    MODEL,
    STRING,
    TOKENS,
    Schema,
    list_of,
    nullable,
    object_of,
)
from server.api.errors import json_response
from server.api.fields import REFUSED_IN_MESSAGES, Refused
from server.api.schemas import (
    REFUSED_BY_SCHEMA,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TokenizeRequest,
)
from server.api.service import Service
from server.api.tokenize import server_version

_OPEN_PATHS = ("/health", "/metrics", "/ready", "/ping")  # no key needed


class Operation(NamedTuple):
    """One route. `answers` are the contents of what is well; `errors` the statuses of what is not, without 401."""

    summary: str
    answers: Mapping[str, Schema]
    errors: tuple[int, ...] = ()
    body: type[BaseModel] | None = None
    well: tuple[int, ...] = (200,)
    query: Mapping[str, Schema] = {}
    needs_body: bool = True


def _json(schema: Schema) -> dict[str, Schema]:
    return {"application/json": schema}


def _streamed(chunk: str) -> dict[str, Schema]:
    """A stream, by the schema of its events' data: OpenAPI 3.1 has no other place to say it."""
    about = "The data of each event; the last one's is [DONE]."
    return {"text/event-stream": {"anyOf": [_ref(chunk), _ref("Error")], "description": about}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT = {"text/plain": STRING}
_GENERATION_ERRORS = (400, 404, 413, 422, 429, 500, 503)
_TOKENIZE_ERRORS = (400, 404, 413, 422, 500, 503)
_NAME_ERRORS = (400, 403, 404, 413, 500, 503)
_MANAGE_ERRORS = (400, 403, 404, 409, 413, 422, 500, 503)
_DELETED = object_of({"name": STRING, "object": {"const": "adapter"}, "deleted": {"const": True}})
_BOOLEAN: Schema = {"type": "boolean"}

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/completions"): Operation(
        "Continue prompts", _json(COMPLETION) | _streamed("CompletionChunk"), _GENERATION_ERRORS, CompletionRequest
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "Answer a chat", _json(CHAT) | _streamed("ChatChunk"), _GENERATION_ERRORS, ChatRequest
    ),
    ("POST", "/tokenize"): Operation(
        "The token ids of a prompt or of messages", _json(TOKENS), _TOKENIZE_ERRORS, TokenizeRequest
    ),
    ("POST", "/detokenize"): Operation(
        "The text of token ids", _json(object_of({"prompt": STRING})), _TOKENIZE_ERRORS, DetokenizeRequest
    ),
    ("GET", "/version"): Operation("The server's version", _json(object_of({"version": STRING}))),
    ("GET", "/openapi.json"): Operation("This document", _json(object_of({"openapi": STRING}))),
    ("GET", "/v1/models"): Operation("The base and all adapters", _json(list_of(MODEL)), (500, 503)),
    ("GET", "/v1/models/{model}"): Operation("One model by its name", _json(MODEL), (400, 404, 500, 503)),
    ("GET", "/v1/adapters"): Operation("All adapters and where they are", _json(list_of(ADAPTER)), (500, 503)),
    ("POST", "/v1/load_lora_adapter"): Operation("Give a name an adapter", _TEXT, _NAME_ERRORS, LoadLoraAdapterRequest),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Take an adapter's name away", _TEXT, _NAME_ERRORS, UnloadLoraAdapterRequest
    ),
    ("POST", "/v1/adapters"): Operation(
        "Give a name an adapter, or say how it is kept",
        _json(ADAPTER),
        _MANAGE_ERRORS,
        NewAdapter,
        well=(200, 201, 202),
        query={"wait": _BOOLEAN},
    ),
    ("POST", "/v1/adapters/inspect"): Operation(
        "What an adapter is and how it would be served", _json(ADAPTER_REPORT), _MANAGE_ERRORS, InspectRequest
    ),
    ("GET", "/v1/adapters/{name}"): Operation("One adapter and where it is", _json(ADAPTER), (403, 404, 500, 503)),
    ("DELETE", "/v1/adapters/{name}"): Operation("Take an adapter's name away", _json(_DELETED), _MANAGE_ERRORS),
    ("POST", "/v1/adapters/{name}/pin"): Operation(
        "Keep an adapter on the device", _json(ADAPTER), _MANAGE_ERRORS, well=(200, 202)
    ),
    ("POST", "/v1/adapters/{name}/unpin"): Operation("Let an adapter be evicted again", _json(ADAPTER), _MANAGE_ERRORS),
    ("POST", "/v1/adapters/{name}/reload"): Operation(
        "Ask an adapter's source now, and compile what it has", _json(ADAPTER), _MANAGE_ERRORS
    ),
    ("POST", "/v1/adapters/{name}/prefetch"): Operation(
        "Bring an adapter to disk, host memory or the device",
        _json(ADAPTER),
        _MANAGE_ERRORS,
        PrefetchRequest,
        well=(200, 202),
        needs_body=False,
    ),
    ("GET", "/metrics"): Operation("Prometheus metrics", _TEXT),
    ("GET", "/health"): Operation("Whether the engine runs", _json(ANY), (503,)),
    ("GET", "/ready"): Operation("Whether new requests are taken", _json(ANY), (503,)),
    ("GET", "/ping"): Operation("The same as /health", _json(ANY), (503,)),
    ("POST", "/ping"): Operation("The same as /health", _json(ANY), (503,)),
}
"""Every route of the app. One that is missing here is not in the document, and a test is red."""


def openapi_routes(app: FastAPI, service: Service) -> APIRouter:
    """GET /openapi.json. Include it last, or whenever: the routes are read when it is asked for."""
    router = APIRouter()

    @router.get("/openapi.json", response_class=Response)
    async def show_document() -> Response:
        """The document of this server: its routes, its vocabulary."""
        vocab_size = service.state.engine.ready.vocab_size
        return json_response(msgspec.json.encode(document(app.routes, vocab_size)))

    return router


def document(routes: Sequence[BaseRoute], vocab_size: int) -> Schema:
    """The OpenAPI 3.1 document of `routes`; token ids are bounded by `vocab_size`."""
    components: dict[str, Schema] = {}
    paths: dict[str, dict[str, Schema]] = {}
    for method, path in sorted(served_operations(routes)):
        operation = OPERATIONS.get((method, path))
        if operation is not None:
            paths.setdefault(path, {})[method.lower()] = _described(path, operation, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "multilora", "version": server_version()},
        "paths": paths,
        "components": {
            "schemas": _bounded(components, vocab_size) | CHUNKS | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def served_operations(routes: Sequence[BaseRoute]) -> set[tuple[str, str]]:
    """(method, path) of each route, with paths as OpenAPI writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FastAPI's operation ids, which nobody reads
        paths: dict[str, dict[str, object]] = get_openapi(title="", version="", routes=routes)["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


def _described(path: str, operation: Operation, components: dict[str, Schema]) -> Schema:
    has_key = path not in _OPEN_PATHS
    content = {kind: {"schema": schema} for kind, schema in operation.answers.items()}
    responses: dict[str, Schema] = {
        str(status): {"description": _REASONS[status], "content": content} for status in operation.well
    }
    for status in (*operation.errors, *((401,) if has_key else ())):
        responses[str(status)] = {
            "description": _REASONS[status],
            "content": _content(_ref("Error") if has_key else ANY),
        }
    described: Schema = {"summary": operation.summary, "responses": responses}
    if has_key:
        described["security"] = [{}, {"key": []}]  # a server without --api-key takes requests without one
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": STRING} for name in _IN_PATHS if f"{{{name}}}" in path
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        schema = _body_schema(operation.body, components)
        described["requestBody"] = {"required": operation.needs_body, "content": _content(schema)}
    return described


_IN_PATHS = ("model", "name")
_REASONS = {
    200: "It is done.",
    201: "The name has its adapter.",
    202: "It was begun, or waits for room on the device.",
    400: "The request is wrong; the error names the field.",
    401: "The API key is missing or wrong.",
    403: "The server was started without this.",
    404: "There is no such model.",
    409: "The name is taken, kept by --adapters-file, or being changed.",
    413: "The body is too large.",
    422: "The adapter can't be served; the error says what is wrong with it.",
    429: "Too many requests are waiting; Retry-After says when to come again.",
    500: "The server failed.",
    503: "The server can't do it now; Retry-After says when to come again.",
}


def _content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _body_schema(model: type[BaseModel], components: dict[str, Schema]) -> Schema:
    """A reference to the model's schema, which is put into `components` with what it refers to."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, Schema] = schema.pop("$defs", {})
    if Message.__name__ in parts:
        parts[Message.__name__] = _open(parts[Message.__name__], REFUSED_IN_MESSAGES)
    if StreamOptions.__name__ in parts:
        parts[StreamOptions.__name__] = _open(parts[StreamOptions.__name__], {})
    components |= parts | {model.__name__: _open(schema, REFUSED_BY_SCHEMA.get(model, {}))}
    return _ref(model.__name__)


def _open(schema: Schema, refused: Refused) -> Schema:
    """`schema` as requests may be: null means absent, and a refused field may hold what asks for nothing."""
    properties: dict[str, Schema] = {}
    for name, field in schema["properties"].items():
        is_required = name in schema.get("required", ())
        field = {key: value for key, value in field.items() if key != "title"}
        properties[name] = field if is_required or {"type": "null"} in field.get("anyOf", ()) else nullable(field)
    for name, inert in refused.items():
        properties[name] = {"enum": [None, *inert], "description": "Not supported: any other value is refused."}
    return {**schema, "properties": properties}


def _bounded(node: Any, vocab_size: int) -> Any:
    """`node` with the vocabulary's size in every list of token ids."""
    if isinstance(node, list):
        return [_bounded(value, vocab_size) for value in node]
    if not isinstance(node, dict):
        return node
    if node == {"type": "integer", "minimum": 0}:
        return {**node, "maximum": vocab_size - 1}
    return {key: _bounded(value, vocab_size) for key, value in node.items()}
