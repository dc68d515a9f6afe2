"""A request's JSON body, read with bounds; whatever is not a JSON object is a BadRequest."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import Request

from server.api.door import Door
from server.api.errors import BodyTimeout, BodyTooLarge
from server.errors import BadRequest

MAX_JSON_VALUES = 1 << 20  # parsing makes an object of each, and the event loop waits

BODY_TIMEOUT_S = 30.0  # without a byte of it


async def read_object(request: Request, max_bytes: int, door: Door) -> dict[str, Any]:
    """The JSON object in the body.

    Raises BadRequest, BodyTooLarge, BodyTimeout, Overloaded when `door` closes first, starlette's ClientDisconnect.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(
            f"The body must be JSON: send the header Content-Type: application/json (got {kind[:64]!r})",
            code="invalid_content_type",
        )
    content = _parse(await _read(request, max_bytes, door))
    if not isinstance(content, dict):
        raise BadRequest("The body must be a JSON object", code="invalid_body")
    return content


async def _read(request: Request, max_bytes: int, door: Door) -> bytes:
    """The body, given up as soon as it is known to be too large, when it stops coming, and when the door closes."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    chunks, num_bytes = [], 0
    try:
        async with door.bound(BODY_TIMEOUT_S) as renew:
            async for chunk in request.stream():
                chunks.append(chunk)
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                renew()
    except TimeoutError:
        raise BodyTimeout(f"The body stopped coming: nothing of it for {BODY_TIMEOUT_S:g} s") from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {max_bytes} bytes")


def _parse(body: bytes) -> Any:
    # Every value but the first of a list or object follows one of these. Those in strings count too.
    num_values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if num_values > MAX_JSON_VALUES:
        raise BadRequest(
            f"The body has about {num_values} JSON values (counted by ',', '[' and '{{'); at most {MAX_JSON_VALUES} "
            "are allowed",
            code="invalid_body",
        )
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    # ValueError: bad syntax, bad UTF-8, a number of 5,000 digits
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise BadRequest(f"The body is not valid JSON: {reason}", code="invalid_json") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
