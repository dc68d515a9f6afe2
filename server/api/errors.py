"""Errors as HTTP: one body, {"error": {"message", "type", "param", "code"}}, for every way a request can fail."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from adapters_store.errors import AdapterError
from server.engine.messages import RequestError
from server.errors import BadRequest, ServerError

DEFAULT_RETRY_AFTER_S = 1  # of a 429 or 503 whose cause gave no time
MAX_SHOWN_CHARS = 256  # of what a client sent, in a message

ERROR_TYPES = {  # vLLM's
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}

_OF_ADAPTERS = (404, 422)  # the engine's statuses that are about the adapter, which `model` named


class RequestFailed(ServerError):
    """The engine ended the request with an error; status, code and message are the engine's."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message, code=error.code, param="model" if error.status in _OF_ADAPTERS else None)
        self.http_status = error.status
        self.type = error_type(error.status)
        self.retry_after_s = error.retry_after_s


class NameRefused(ServerError):
    """A load or unload of an adapter that can't be done, with vLLM's error type."""

    def __init__(self, message: str, *, status: int = 400, kind: str = "InvalidUserInput") -> None:
        super().__init__(message)
        self.http_status = status
        self.type = kind


class InvalidApiKey(ServerError):
    """401 invalid_api_key."""

    http_status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"


class BodyTooLarge(BadRequest):
    """413 request_too_large."""

    http_status = 413
    code = "request_too_large"


class BodyTimeout(BadRequest):
    """408 request_timeout."""

    http_status = 408
    code = "request_timeout"


def shown(text: str) -> str:
    """What a client sent, as a message may quote it: bounded, one line, printable."""
    cut = text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
    return "".join(char if char.isprintable() else "\ufffd" for char in cut)


def error_type(status: int) -> str:
    """OpenAI's error type for an HTTP status."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def error_body(error: ServerError | AdapterError, field: str = "model") -> bytes:
    """The JSON body of `error`; `field`: what named the adapter."""
    if isinstance(error, AdapterError):
        return body_of(error.message, error_type(error.http_status), field, error.code)
    return body_of(error.message, error.type, error.param, error.code)


def body_of(message: str, kind: str, param: str | None, code: str) -> bytes:
    """The JSON body of an error."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_response(error: ServerError | AdapterError, field: str = "model") -> Response:
    """The response for `error`; a 429 or 503 says when to try again. `field`: what named the adapter."""
    return json_response(error_body(error, field), error.http_status, _headers_of(error))


def dual_error(error: ServerError | AdapterError) -> Response:
    """An error as newer vLLM nests it and as older vLLM had it flat, in one body: controllers read either."""
    status = 400 if error.http_status == 422 else error.http_status  # vLLM has 400 for an adapter that is wrong
    kind = error.type if isinstance(error, NameRefused) else ERROR_TYPES.get(status, "BadRequestError")
    told: Mapping[str, object] = {"message": error.message, "type": kind, "param": None, "code": status}
    return json_response(msgspec.json.encode({"object": "error", **told, "error": told}), status, _headers_of(error))


def _headers_of(error: ServerError | AdapterError) -> dict[str, str]:
    if error.http_status == BodyTimeout.http_status:
        return {"connection": "close"}  # the rest of the body may come yet
    if error.http_status not in (429, 503):
        return {}
    after_s = error.retry_after_s if isinstance(error, ServerError) else None
    return {"retry-after": str(DEFAULT_RETRY_AFTER_S if after_s is None else after_s)}


def json_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of encoded JSON."""
    return Response(body, status, dict(headers or {}), "application/json")
