"""The HTTP application: routes, error bodies and the gate, put together around one ServerState."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from adapters_store.errors import AdapterError
from server.api.access_log import AccessLog
from server.api.adapters import adapter_routes
from server.api.cors import Cors
from server.api.errors import body_of, error_response, error_type, json_response, shown
from server.api.gate import Gate
from server.api.health import health_routes
from server.api.manage import manage_routes
from server.api.models import model_routes
from server.api.openapi import OPERATIONS, openapi_routes
from server.api.routes import generation_routes
from server.api.service import ServerState, Service
from server.api.tokenize import tokenize_routes
from server.errors import ServerError

logger = logging.getLogger(__name__)

_CLOSE = {"connection": "close"}  # what uvicorn does after an exception


def create_app(state: ServerState) -> ASGIApp:
    """The ASGI application of `state`. Its lifespan ends the app's own background work, not the engine or store."""
    service = Service(state)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.stall.watch(), name="stall watch")
        if service.desired is not None:
            await service.desired.start()
        yield
        watching.cancel()
        await service.close()

    app = FastAPI(
        title="multilora",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
    )
    app.include_router(generation_routes(service))
    app.include_router(tokenize_routes(service))
    app.include_router(model_routes(service))
    app.include_router(adapter_routes(service))
    app.include_router(manage_routes(service))
    app.include_router(health_routes(service))
    app.include_router(openapi_routes(app, service))
    app.add_exception_handler(ServerError, _on_error)
    app.add_exception_handler(AdapterError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)
    gate = Gate(app, state.api_keys, state.door, state.engine, service.stall, max_queue_len=state.limits.max_queue_len)
    return AccessLog(
        Cors(gate, origins) if (origins := state.limits.allowed_origins) else gate,
        service.metrics.http,
        frozenset(path for _, path in OPERATIONS),
        is_enabled=state.limits.has_access_log,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError | AdapterError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: no such route, no such method."""
    assert isinstance(error, HTTPException)
    path, status = shown(request.scope["path"]), error.status_code
    what, code = {
        404: (f"There is no route {request.method} {path}.", "not_found"),
        405: (f"{path} does not take {request.method}.", "method_not_allowed"),
    }.get(status, (str(error.detail), "http_error"))
    return json_response(body_of(what, error_type(status), None, code), status, error.headers)


async def _on_defect(request: Request, error: Exception) -> Response:
    """A defect of ours: logged with its trace by the server, told to the client without it."""
    return json_response(body_of("The server failed.", "server_error", None, "internal_error"), 500, _CLOSE)
