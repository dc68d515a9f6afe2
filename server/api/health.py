"""GET /health and /metrics: what probes, routers and dashboards read; no key needed."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.api.errors import json_response
from server.api.service import Service
from server.metrics import CONTENT_TYPE


def health_routes(service: Service) -> APIRouter:
    """Liveness and metrics."""
    router = APIRouter()

    @router.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the engine takes requests, else 503."""
        is_alive = service.state.engine.is_alive
        return json_response(b'{"status":"ok"}' if is_alive else b'{"status":"engine_dead"}', 200 if is_alive else 503)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """The Prometheus exposition."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    return router
