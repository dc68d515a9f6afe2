"""GET /v1/models: the base under its names, and every adapter of the catalog."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.errors import json_response
from server.api.service import Service


def model_routes(service: Service) -> APIRouter:
    """The list, and one model by name."""
    router = APIRouter()

    @router.get("/v1/models", response_class=Response)
    async def models() -> Response:
        """All models: the base's names first, then the adapters by name."""
        listed = await service.state.catalog.list()
        cards = [_card(service, name, is_adapter=False) for name in service.state.base_names]
        cards += [_card(service, entry.name, is_adapter=True) for entry in listed]
        return json_response(msgspec.json.encode({"object": "list", "data": cards}))

    @router.get("/v1/models/{model:path}", response_class=Response)
    async def model(request: Request) -> Response:
        """One model, by the names that requests take."""
        target = await service.supply.resolve(request.path_params["model"])
        card = _card(service, target.name, is_adapter=target.version is not None)
        return json_response(msgspec.json.encode(card))

    return router


def _card(service: Service, name: str, *, is_adapter: bool) -> dict[str, object]:
    """vLLM's model card. `root` is the adapter's path below its source: folders of the host are nobody's business."""
    base = service.state.base_names[0]
    return {
        "id": name,
        "object": "model",
        "created": int(service.state.started_s),
        "owned_by": "multilora",
        "root": name if is_adapter else base,
        "parent": base if is_adapter else None,
        "max_model_len": service.state.engine.ready.max_model_len,
    }
