"""A request's JSON body, read with bounds; whatever is not a JSON object is a BadRequest."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import Request

from server.api.errors import BodyTooLarge
from server.errors import BadRequest


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body. Raises BadRequest, BodyTooLarge, starlette's ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(
            f"The body must be JSON: send the header Content-Type: application/json (got {kind[:64]!r})",
            code="invalid_content_type",
        )
    content = _parse(await _read(request, max_bytes))
    if not isinstance(content, dict):
        raise BadRequest("The body must be a JSON object", code="invalid_body")
    return content


async def _read(request: Request, max_bytes: int) -> bytes:
    """The body, given up as soon as it is known to be too large."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {max_bytes} bytes")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    # ValueError: bad syntax, bad UTF-8, a number of 5,000 digits
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise BadRequest(f"The body is not valid JSON: {reason}", code="invalid_json") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
