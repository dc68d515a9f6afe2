"""Adapters at run time: GET /v1/adapters, and vLLM's two routes that give and take names."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from adapters_store.errors import AdapterError
from server.api.adapter_bodies import AdapterEntry, LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from server.api.body import read_object
from server.api.describe import describe
from server.api.errors import ERROR_TYPES, NameRefused, dual_error, json_response, shown
from server.api.local_pages import foreign_header
from server.api.naming import TAKEN
from server.api.service import Service
from server.errors import BadRequest, Conflict, Forbidden, ServerError

LISTED_AT_ONCE = 100  # adapters described between two turns of the event loop

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)


def adapter_routes(service: Service) -> APIRouter:
    """GET /v1/adapters, POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter."""
    router = APIRouter()

    @router.get("/v1/adapters", response_class=Response)
    async def adapters() -> Response:
        """Every adapter of the catalog and where it is: source, fetched files, disk, host memory, device."""
        versions = {listing.name: listing.version for listing in await service.state.catalog.list()}
        described = []
        # names that are not there yet too: who asked for them looks here
        for index, name in enumerate(sorted({*versions, *service.names.failed, *service.names.changing}), start=1):
            described.append(describe(service, name, versions.get(name)))
            if index % LISTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        told: dict[str, object] = {"object": "list", "data": described}
        if service.desired is not None:
            told["adapters_file"] = service.desired.status()
        return json_response(msgspec.json.encode(told))

    @router.post("/v1/load_lora_adapter", response_class=Response)
    async def load(request: Request) -> Response:
        """Give a name an adapter; answers when it is compiled, or says why it can't be."""
        try:
            asked = await _read(service, request, LoadLoraAdapterRequest)
            await _load(service, asked)
        except (ServerError, AdapterError) as error:
            return dual_error(error)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=Response)
    async def unload(request: Request) -> Response:
        """Take a name away; requests that run under it go on."""
        try:
            asked = await _read(service, request, UnloadLoraAdapterRequest)
            await _unload(service, asked.lora_name)
        except (ServerError, AdapterError) as error:
            return dual_error(error)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


async def _load(service: Service, asked: LoadLoraAdapterRequest) -> None:
    name = asked.lora_name
    if not name or not asked.lora_path:
        raise NameRefused("Both 'lora_name' and 'lora_path' must be provided.")
    base_names = service.state.base_names
    try:
        service.names.check_name(name)
        if asked.base_model_name not in (None, *base_names):
            given = shown(asked.base_model_name or "")
            logger.warning("load of %r: base_model_name is %r, but the base is %r", name, given, base_names[0])
        entry = AdapterEntry(name=name, path=asked.lora_path)
        await service.names.give(entry, replaces=asked.load_inplace, compiles=True)
    except Conflict as error:
        if error.code != TAKEN:
            raise NameRefused(error.message) from error
        raise NameRefused(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        ) from error
    except BadRequest as error:
        raise NameRefused(error.message if error.param == "name" else f"'lora_path': {error.message}") from error


async def _unload(service: Service, name: str) -> None:
    if not name:
        raise NameRefused("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await service.names.take(name)
    except Conflict as error:
        raise NameRefused(error.message) from error
    except AdapterError as error:
        if error.http_status != 404:
            raise
        raise NameRefused(
            f"The lora adapter '{shown(name)}' cannot be found.", status=404, kind=ERROR_TYPES[404]
        ) from error


async def _read(service: Service, request: Request, schema: type[Body]) -> Body:
    """The body of a change of names. Raises Forbidden, NameRefused, BadRequest."""
    check_may_change(service, request)
    try:
        body = await read_object(request, service.state.limits.max_body_bytes, service.state.door)
        return schema.model_validate({key: value for key, value in body.items() if value is not None})
    except ClientDisconnect:
        raise NameRefused("The client is gone.", status=499) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise NameRefused(f"'{shown(field)}': {first['msg']}") from None


def check_may_change(service: Service, request: Request) -> None:
    """Raises Forbidden if names can't be changed at run time, or not by who asks.

    That is another site's page in this machine's browser, where only loopback guards names.
    """
    if not service.state.may_load_adapters:
        raise Forbidden("Loading and unloading at run time is off: start the server with --allow-runtime-loading.")
    if not service.state.guards_loading:
        return
    header = foreign_header(request.headers, service.state.limits.allowed_origins)
    if header is not None:
        given = shown(", ".join(request.headers.getlist(header)))
        raise Forbidden(
            f"Loading and unloading is on here because the server is bound to loopback, so only programs and pages of "
            f"this machine may ask for it; the {header} header is '{given}'. Ask for localhost or 127.0.0.1, name the "
            "page's origin in --allowed-origins, or start the server with --allow-runtime-loading."
        )
