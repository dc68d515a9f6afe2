"""GET /health, /ready, /ping and /metrics: what probes, routers and dashboards read; no key needed."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from server.api.errors import json_response
from server.api.service import ServerState, Service
from server.api.stall import StallGuard
from server.exposition import CONTENT_TYPE


def health_of(state: ServerState, stall: StallGuard) -> str:
    """ok, engine_dead, or engine_stalled: for the stall time-out it has said nothing, or its requests did not get on.

    A live engine speaks after every step and once a second while idle, so silence is a step that does not end.
    """
    if not state.engine.is_alive:
        return "engine_dead"
    return "engine_stalled" if stall.is_stalled else "ok"


def health_routes(service: Service) -> APIRouter:
    """Liveness, readiness and metrics."""
    router = APIRouter()

    @router.get("/health", response_class=Response)
    @router.api_route("/ping", methods=["GET", "POST"], response_class=Response)
    async def health() -> Response:
        """200 while the engine works, else 503: the process should be replaced. Draining is healthy."""
        return _answer(health_of(service.state, service.stall))

    @router.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 while new requests are taken: healthy and not draining."""
        status = health_of(service.state, service.stall)
        return _answer("draining" if status == "ok" and not service.state.door.is_open else status)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """The Prometheus exposition."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    return router


def _answer(status: str) -> Response:
    return json_response(msgspec.json.encode({"status": status}), 200 if status == "ok" else 503)
