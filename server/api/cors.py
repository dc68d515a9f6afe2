"""CORS: which pages' scripts may call the server, and what they may read of its answers."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.api.answers import IDENTITY_HEADERS
from server.api.errors import body_of, json_response
from server.api.gate import identify

_EXPOSED = ("x-request-id", *IDENTITY_HEADERS, "retry-after")


class Cors(CORSMiddleware):
    """ASGI middleware for pages of `origins`. Outside the gate, since a preflight request carries no key."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(_EXPOSED),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Starlette's answer with an id, as every response has one, and a refusal in the form of our errors."""
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            words = f"{bytes(response.body).decode()}: see --allowed-origins; methods are GET and POST."
            kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            body = body_of(words, "invalid_request_error", None, "cors_refused")
            response = json_response(body, response.status_code, kept)
        response.headers["x-request-id"] = identify(request_headers)
        return response
