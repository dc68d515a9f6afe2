"""Adapters at run time: GET /v1/adapters, and vLLM's two routes that give and take names."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from adapters_store.catalog import Listing
from adapters_store.errors import AdapterError, AdapterNotFound
from adapters_store.ref import AdapterRef, SourceVersion, is_adapter_name
from adapters_store.sources.named import PathRefused
from server.api.body import read_object
from server.api.errors import ERROR_TYPES, NameRefused, dual_error, json_response, shown
from server.api.local_pages import foreign_header
from server.api.models import root_of
from server.api.service import Service
from server.errors import EngineDead, ServerError

MAX_PATH_CHARS = 4096
LISTED_AT_ONCE = 100  # adapters described between two turns of the event loop

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)


class LoadLoraAdapterRequest(BaseModel):
    """vLLM's body, and the base_model_name that older controllers send. As at vLLM other keys mean nothing."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str = Field("", max_length=1024)
    lora_path: str = Field("", max_length=MAX_PATH_CHARS, description="Below a folder of --adapters.")
    load_inplace: bool = Field(False, description="Replace the adapter that has this name.")
    base_model_name: str | None = Field(None, description="Means nothing; a name that is not the base's is logged.")
    is_3d_lora_weight: Literal[False] = False


class UnloadLoraAdapterRequest(BaseModel):
    """vLLM's body; lora_int_id and other keys mean nothing here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str = Field("", max_length=1024)
    lora_int_id: int | None = None


def adapter_routes(service: Service) -> APIRouter:
    """GET /v1/adapters, POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter."""
    router = APIRouter()
    names = AdapterNames(service)

    @router.get("/v1/adapters", response_class=Response)
    async def adapters() -> Response:
        """Every adapter of the catalog and where it is: source, fetched files, disk, host memory, device."""
        described = []
        for index, listing in enumerate(await service.state.catalog.list(), start=1):
            described.append(_describe(service, listing))
            if index % LISTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return json_response(msgspec.json.encode({"object": "list", "data": described}))

    @router.post("/v1/load_lora_adapter", response_class=Response)
    async def load(request: Request) -> Response:
        """Give a name an adapter; answers when it is compiled, or says why it can't be."""
        try:
            asked = await _read(service, request, LoadLoraAdapterRequest)
            await names.load(asked)
        except (ServerError, AdapterError) as error:
            return dual_error(error)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=Response)
    async def unload(request: Request) -> Response:
        """Take a name away; requests that run under it go on."""
        try:
            asked = await _read(service, request, UnloadLoraAdapterRequest)
            await names.unload(asked.lora_name)
        except (ServerError, AdapterError) as error:
            return dual_error(error)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


class AdapterNames:
    """Gives and takes names. One change per name at a time; requests always see the old or the new."""

    def __init__(self, service: Service) -> None:
        self._state = service.state
        self._supply = service.supply
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self, asked: LoadLoraAdapterRequest) -> None:
        """Compile what is at the path, then give it the name. Raises NameRefused, AdapterError, EngineDead.

        Nothing changes before the adapter is compiled, so a failed replacement leaves the old one serving.
        """
        name = asked.lora_name
        if not name or not asked.lora_path:
            raise NameRefused("Both 'lora_name' and 'lora_path' must be provided.")
        self._check_name(name)
        if asked.base_model_name not in (None, *self._state.base_names):
            given = shown(asked.base_model_name or "")
            logger.warning(
                "load of %r: base_model_name is %r, but the base is %r", name, given, self._state.base_names[0]
            )
        if not self._state.engine.is_alive:
            raise EngineDead("The engine has stopped; the server is going down.")
        async with self._lock(name):
            version = await self._look(name, asked.lora_path)
            if not asked.load_inplace and await self._is_taken(version):
                raise NameRefused(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                    "set 'load_inplace' to True."
                )
            ref = await self._supply.compile(version)
            self._state.catalog.assign(version)
            self._supply.pins.follow(ref)

    async def unload(self, name: str) -> None:
        """Take the name away, wherever the adapter came from. Raises NameRefused."""
        if not name:
            raise NameRefused("'lora_name' needs to be provided to unload a LoRA adapter.")
        catalog = self._state.catalog
        async with self._lock(name):
            version = await self._find(name)
            if version is None and name not in catalog.named:
                raise NameRefused(
                    f"The lora adapter '{shown(name)}' cannot be found.", status=404, kind=ERROR_TYPES[404]
                )
            catalog.remove(name)
            pins = self._supply.pins
            pins.remove(name)
            ref = None if version is None else self._state.store.peek(version.key)
            if ref is not None and not pins.holds(ref.image_key):
                self._state.engine.drop_adapter(ref.image_key)

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _check_name(self, name: str) -> None:
        if name in self._state.base_names:
            raise NameRefused(f"The name '{name}' is the base model's.")
        if not is_adapter_name(name):
            raise NameRefused(
                f"'{shown(name)}' can't be an adapter's name: parts of letters, digits, '.', '_' and '-' joined by "
                "'/', at most 128 bytes."
            )

    async def _look(self, name: str, path: str) -> SourceVersion:
        try:
            return await asyncio.to_thread(self._state.catalog.named.look, name, path)
        except PathRefused as error:
            raise NameRefused(f"'lora_path': {error}") from error

    async def _find(self, name: str) -> SourceVersion | None:
        try:
            return await self._state.catalog.resolve(name)
        except AdapterNotFound:
            return None

    async def _is_taken(self, version: SourceVersion) -> bool:
        """Whether the name was given before, or a source has another adapter under it."""
        if version.name in self._state.catalog.named:
            return True
        found = await self._find(version.name)
        return found is not None and found.files != version.files


async def _read(service: Service, request: Request, schema: type[Body]) -> Body:
    """The body of a change of names. Raises NameRefused, BadRequest."""
    if not service.state.may_load_adapters:
        raise NameRefused(
            "Loading and unloading at run time is off: start the server with --allow-runtime-loading.",
            status=403,
            kind=ERROR_TYPES[403],
        )
    _check_page(service, request)
    try:
        body = await read_object(request, service.state.limits.max_body_bytes, service.state.door)
        return schema.model_validate({key: value for key, value in body.items() if value is not None})
    except ClientDisconnect:
        raise NameRefused("The client is gone.", status=499) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise NameRefused(f"'{shown(field)}': {first['msg']}") from None


def _check_page(service: Service, request: Request) -> None:
    """Raises NameRefused if another site's page in this machine's browser asks, where only loopback guards names."""
    if not service.state.guards_loading:
        return
    header = foreign_header(request.headers, service.state.limits.allowed_origins)
    if header is not None:
        given = shown(", ".join(request.headers.getlist(header)))
        raise NameRefused(
            f"Loading and unloading is on here because the server is bound to loopback, so only programs and pages of "
            f"this machine may ask for it; the {header} header is '{given}'. Ask for localhost or 127.0.0.1, name the "
            "page's origin in --allowed-origins, or start the server with --allow-runtime-loading.",
            status=403,
            kind=ERROR_TYPES[403],
        )


def _describe(service: Service, listing: Listing) -> dict[str, object]:
    """One adapter. Bytes are of files at the source, of the image elsewhere; times are Unix seconds."""
    state, supply = service.state, service.supply
    key = listing.version.key
    ref = state.store.peek(key)
    usage = supply.usage.of(listing.name)
    error, error_s = usage.last_error, usage.last_error_s
    if ref is not None and (failure := state.engine.residents.failure(ref.image_key)) is not None:
        error, error_s = failure, 0.0
    is_compiling = ref is None and state.store.is_compiling(key)
    return {
        "name": listing.name,
        "root": root_of(listing.version),
        "version": key,
        "image_key": ref.image_key if ref else None,
        "rank": ref.max_rank if ref else None,
        "bytes": ref.data_bytes if ref else None,
        "source": {"bytes": sum(file.size for file in listing.version.files) if listing.version.files else None},
        "raw": {"state": _raw_state(service, key)},
        "disk": {"state": "compiled" if ref else "compiling" if is_compiling else "absent"},
        "host": {"state": "held" if ref is not None and state.engine.residents.is_hosted(ref.image_key) else "absent"},
        "device": _on_device(service, listing.name, ref),
        "uses": usage.num_uses,
        "last_used": usage.last_used_s or None,
        "last_error": {"message": error, "time": error_s or None} if error is not None else None,
        "warnings": list(ref.warnings) if ref else [],
    }


def _raw_state(service: Service, version_key: str) -> str:
    """Of a remote adapter's files on disk; those of a folder of this machine are never copied."""
    remote = service.state.catalog.remote
    if remote is None:
        return "absent"
    return "held" if remote.raw.peek(version_key) else "fetching" if remote.is_fetching(version_key) else "absent"


def _on_device(service: Service, name: str, ref: AdapterRef | None) -> dict[str, object]:
    is_resident = ref is not None and ref.image_key in service.state.engine.residents
    return {"state": "resident" if is_resident else "absent", "pinned": name in service.supply.pins}
