"""The routes that manage adapters: give and take names, pin, reload, prefetch, and say what an adapter would be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adapters_store.errors import AdapterError, AdapterNotFound
from adapters_store.inspect import AdapterReport
from adapters_store.ref import SourceVersion
from server.api.adapter_bodies import InspectRequest, NewAdapter, PrefetchRequest
from server.api.adapters import check_may_change
from server.api.body import read_object
from server.api.describe import describe
from server.api.errors import body_of, error_response, error_type, json_response, shown
from server.api.fields import served_part
from server.api.local_pages import has_foreign_origin
from server.api.naming import message_of
from server.api.prefetch import bring, until_resident
from server.api.schemas import Strict, first_error
from server.api.service import Service
from server.errors import BadRequest, Conflict, Forbidden

CLIENT_CLOSED_REQUEST = 499  # never seen by the client; for logs

Body = TypeVar("Body", bound=Strict)
Handler = Callable[[Request], Awaitable[Response]]


def manage_routes(service: Service) -> APIRouter:
    """POST, GET and DELETE below /v1/adapters. A name may have slashes; the last part of a POST says what to do."""
    router = APIRouter()

    def name_of(request: Request) -> str:
        name: str = request.path_params["name"]
        return name

    def described(name: str, version: SourceVersion | None, status: int = 200) -> Response:
        return json_response(msgspec.json.encode(describe(service, name, version)), status)

    async def described_now(name: str, status: int = 200) -> Response:
        return described(name, await service.state.catalog.resolve(name), status)

    def told(handler: Handler) -> Handler:
        """The handler, with errors of adapters told of the field "name", and asked for by who may."""

        async def answer(request: Request) -> Response:
            try:
                if request.method != "GET":
                    _check_asker(service, request)
                return await handler(request)
            except AdapterError as error:
                return error_response(error, "name")
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED_REQUEST)

        return answer

    async def add(request: Request) -> Response:
        """Give a name an adapter: 201 when it is compiled, or with ?wait=false 202 when it was found."""
        waits = _waits(request)
        asked = await _read(service, request, NewAdapter)
        given = "path" if asked.path is not None else "source" if asked.source is not None else None
        try:
            if not waits:
                await _give_later(service, asked)
                return described(asked.name, await _find(service, asked.name), 202)
            version = await service.names.give(asked, replaces=asked.replace, compiles=asked.preload)
        except AdapterError as error:
            return error_response(error, given or "name")
        return described(asked.name, version, 201 if given else 200)

    async def show(request: Request) -> Response:
        """One adapter, also one that is only on its way."""
        name = name_of(request)
        version = await _find(service, name)
        if version is None and not service.names.is_changing(name) and name not in service.names.failed:
            raise AdapterNotFound(f"The model '{shown(name)}' does not exist.")
        return described(name, version)

    async def take(request: Request) -> Response:
        """Take a name away; requests that run under it go on."""
        name = name_of(request)
        await service.names.take(name)
        return json_response(msgspec.json.encode({"name": name, "object": "adapter", "deleted": True}))

    async def pin(request: Request) -> Response:
        """Keep an adapter on the device: 200 when it is there, 202 while it waits for room."""
        name = name_of(request)
        ref = await service.names.pin(name)
        is_there = await until_resident(service, ref, "device")
        return await described_now(name, 200 if is_there else 202)

    async def unpin(request: Request) -> Response:
        """An adapter is evicted as any other again."""
        name = name_of(request)
        await service.names.unpin(name)
        return await described_now(name)

    async def reload(request: Request) -> Response:
        """Ask the source now: answers when what it has is compiled and new requests get it."""
        name = name_of(request)
        await service.names.reload(name)
        return await described_now(name)

    async def prefetch(request: Request) -> Response:
        """Bring an adapter to a tier without a request: 200 when it is there, 202 where others would make way."""
        name = name_of(request)
        asked = await _read(service, request, PrefetchRequest, is_optional=True)
        is_there = await bring(service, await service.names.compile(name), asked.tier)
        return await described_now(name, 200 if is_there else 202)

    async def inspect(request: Request) -> Response:
        """What an adapter is and how it would be served; 422 with every problem where it would not be."""
        asked = await _read(service, request, InspectRequest)
        if (asked.name is None) == (asked.path is None):
            raise BadRequest("Send either 'name' or 'path'", param="name")
        field, label = ("name", asked.name or "") if asked.path is None else ("path", asked.path)
        try:
            if asked.path is not None:
                version = await service.names.look_below(shown(asked.path), asked.path)
            else:
                version = await service.state.catalog.resolve(label)
            return _report(label, field, await service.state.store.inspect(version))
        except AdapterError as error:
            return error_response(error, field)

    for method, path, handler in (
        ("POST", "/v1/adapters", add),
        ("POST", "/v1/adapters/inspect", inspect),
        ("GET", "/v1/adapters/{name:path}", show),
        ("DELETE", "/v1/adapters/{name:path}", take),
        ("POST", "/v1/adapters/{name:path}/pin", pin),
        ("POST", "/v1/adapters/{name:path}/unpin", unpin),
        ("POST", "/v1/adapters/{name:path}/reload", reload),
        ("POST", "/v1/adapters/{name:path}/prefetch", prefetch),
    ):
        router.add_api_route(path, told(handler), methods=[method], response_class=Response, name=handler.__name__)
    return router


async def _give_later(service: Service, asked: NewAdapter) -> None:
    """Begin to give a name; returns when the adapter was found, raises what stands against it by then."""
    names, found = service.names, asyncio.Event()
    if names.is_changing(asked.name):
        raise Conflict(f"Another change of '{shown(asked.name)}' is under way; try again.", param="name")

    async def give() -> None:
        try:
            await names.give(asked, replaces=asked.replace, compiles=asked.preload, on_looked=found.set)
        except Exception as error:
            if found.is_set():  # else it is the answer
                names.note_failure(asked.name, message_of(error))
            raise

    task = service.tasks.start(give(), f"give {asked.name}")
    looking = asyncio.create_task(found.wait())
    await asyncio.wait({task, looking}, return_when=asyncio.FIRST_COMPLETED)
    looking.cancel()
    if not found.is_set():
        await task


async def _find(service: Service, name: str) -> SourceVersion | None:
    try:
        return await service.state.catalog.resolve(name)
    except AdapterNotFound:
        return None


def _check_asker(service: Service, request: Request) -> None:
    """Raises Forbidden. A page can't send JSON or DELETE to another site unasked, but an empty POST it can."""
    check_may_change(service, request)
    if has_foreign_origin(request.headers, service.state.limits.allowed_origins):
        given = shown(", ".join(request.headers.getlist("origin")))
        raise Forbidden(f"A page of '{given}' asks: name it in --allowed-origins if it may change adapters.")


async def _read(service: Service, request: Request, schema: type[Body], *, is_optional: bool = False) -> Body:
    """The body. Raises BadRequest, which names the first field at fault."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    content = {}
    if has_body or not is_optional:
        content = await read_object(request, service.state.limits.max_body_bytes, service.state.door)
    try:
        return schema.model_validate(served_part(content, frozenset(schema.model_fields), {}))
    except ValidationError as error:
        raise first_error(error.errors(include_url=False, include_input=False)[0]) from None


def _waits(request: Request) -> bool:
    values = request.query_params.getlist("wait")
    if len(values) > 1 or (values and values[0] not in ("true", "false")):
        raise BadRequest("Invalid 'wait': true or false, once.", param="wait")
    return values != ["false"]


def _report(label: str, field: str, result: AdapterReport) -> Response:
    report: dict[str, object] = {
        "object": "adapter.report",
        "adapter": label,
        "is_served": result.is_served,
        "base": result.base,
        "family": result.family,
        "digest": result.digest or None,
        "targets": result.targets,
        "ranks": {str(rank): count for rank, count in sorted(result.ranks.items())},
        "options": result.options,
        "bytes": dict.fromkeys(("disk", "host", "device"), result.image_bytes) | {"source": result.file_bytes},
        "warnings": result.warnings,
        "dropped": result.dropped,
        "problems": [{"code": code, "message": message} for code, message in result.problems],
    }
    if result.is_served:
        return json_response(msgspec.json.encode(report))
    code, message = result.problems[0]
    if len(result.problems) > 1:
        lines = (f"{number}. {text}" for number, (_, text) in enumerate(result.problems, start=1))
        message = f"{len(result.problems)} problems: {' '.join(lines)}"
    error = msgspec.json.decode(body_of(message, error_type(422), field, code))
    return json_response(msgspec.json.encode({**error, "report": report}), 422)
