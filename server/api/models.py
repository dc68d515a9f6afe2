"""GET /v1/models: the base under its names, and every adapter of the catalog."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from adapters_store.ref import SourceVersion
from adapters_store.sources.alias import MARK
from server.api.errors import json_response
from server.api.service import Service


def model_routes(service: Service) -> APIRouter:
    """The list, and one model by name."""
    router = APIRouter()

    @router.get("/v1/models", response_class=Response)
    async def models() -> Response:
        """All models: the base's names first, then the adapters by name."""
        listed = await service.state.catalog.list()
        cards = [_card(service, name, None) for name in service.state.base_names]
        cards += [_card(service, entry.name, entry.version) for entry in listed]
        return json_response(msgspec.json.encode({"object": "list", "data": cards}))

    @router.get("/v1/models/{model:path}", response_class=Response)
    async def model(request: Request) -> Response:
        """One model, by the names that requests take."""
        target = await service.supply.resolve(request.path_params["model"])
        card = _card(service, target.name, target.version)
        return json_response(msgspec.json.encode(card))

    return router


def root_of(version: SourceVersion) -> str:
    """The adapter's path below its source; folders of the host are nobody's business."""
    if not Path(version.source).is_absolute():  # a remote one, or an alias at one
        return version.path.removeprefix(f"{version.source.partition(MARK)[0]}/")
    path = os.path.relpath(version.path, version.source)
    return version.name if path == "." else path


def _card(service: Service, name: str, version: SourceVersion | None) -> dict[str, object]:
    """vLLM's model card of the base (without a version) or an adapter."""
    base = service.state.base_names[0]
    return {
        "id": name,
        "object": "model",
        "created": int(service.state.started_s),
        "owned_by": "multilora",
        "root": base if version is None else root_of(version),
        "parent": None if version is None else base,
        "max_model_len": service.state.engine.ready.max_model_len,
    }
