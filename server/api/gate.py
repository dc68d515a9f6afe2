"""What every request passes first: an id for it, the API key, and whether the server takes it now."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.access_log import current_entry
from server.api.door import DRAINING, DRAINING_RETRY_AFTER_S, Door, check_queue, reset_ticket, set_ticket
from server.api.errors import InvalidApiKey, dual_error, error_response
from server.api.stall import StallGuard
from server.engine.client import Engine
from server.errors import Overloaded, ServerError

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN_PATHS = frozenset({"/health", "/metrics", "/ready", "/ping"})  # a new route is guarded unless listed
_GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
_NAMING_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Gate:
    """ASGI middleware. Echoes x-request-id (or makes one) on every response; refuses without a key, when
    draining, when the queue is full, and a generation while the engine is stalled.

    The path is the scope's, never rebuilt from headers that a client sends.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Sequence[str],
        door: Door,
        engine: Engine,
        stall: StallGuard,
        *,
        max_queue_len: int,
    ) -> None:
        self._app = app
        self._key_digests = [_digest(key) for key in api_keys]
        self._door = door
        self._engine = engine
        self._stall = stall
        self._max_queue_len = max_queue_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = identify(headers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                if not self._door.is_open:
                    answer["connection"] = "close"  # the client's next request finds another server
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
        elif scope["path"] in _GENERATION_PATHS:
            ticket = self._door.enter()
            token = set_ticket(ticket)
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                reset_ticket(token)
                self._door.leave(ticket)
        else:
            await self._app(scope, receive, send_with_id)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if scope["path"] in _OPEN_PATHS:
            return None
        respond = dual_error if scope["path"] in _NAMING_PATHS else error_response
        if not self._has_key(headers.get("authorization", "")):
            response = respond(InvalidApiKey("Incorrect API key provided: send Authorization: Bearer <key>."))
            response.headers["www-authenticate"] = "Bearer"
            return response
        try:
            self._check_open(scope)
        except ServerError as error:
            return respond(error)
        return None

    def _check_open(self, scope: Scope) -> None:
        """Raises Overloaded, QueueFull or EngineStalled if the server does not take this request now."""
        if not self._door.is_open and scope["method"] not in ("GET", "HEAD"):
            raise Overloaded(DRAINING, retry_after_s=DRAINING_RETRY_AFTER_S)
        if scope["path"] in _GENERATION_PATHS:
            self._stall.check()
            check_queue(self._door, self._engine, self._max_queue_len, 1)

    def _has_key(self, authorization: str) -> bool:
        if not self._key_digests:
            return True
        scheme, _, key = authorization.partition(" ")
        # Digests, and all of them, so that neither content nor length nor which key it was shows in the time taken.
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._key_digests]
        return scheme.lower() == "bearer" and any(matches)


def identify(headers: Headers) -> str:
    """The id of the request with `headers`: the client's if it sent a usable one. The access log has it too."""
    given = headers.get("x-request-id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
    current_entry().request_id = request_id
    return request_id


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
