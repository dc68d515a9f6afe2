"""What every request passes first: an id for it, and the API key."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import InvalidApiKey, error_response

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN_PATHS = frozenset({"/health", "/metrics"})  # for probes and scrapers; a new route is guarded unless listed


class Gate:
    """ASGI middleware. Echoes x-request-id (or makes one) on every response; answers 401 without the key.

    The path is the scope's, never rebuilt from headers that a client sends.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key_digest = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if scope["path"] not in _OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            response = error_response(InvalidApiKey("Incorrect API key provided: send Authorization: Bearer <key>."))
            response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _has_key(self, authorization: str) -> bool:
        if self._key_digest is None:
            return True
        scheme, _, key = authorization.partition(" ")
        # Digests, so that neither content nor length of the key shows in the time a comparison takes.
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(key.strip()), self._key_digest)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
