"""The routes that generate text. Each reads, validates, starts, and waits for the engine's first event."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.answers import CHAT, COMPLETIONS, Answer, Endpoint
from server.api.body import read_object
from server.api.disconnect import ClientGone, until_gone
from server.api.errors import json_response
from server.api.protocol import Line, line_of
from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest, parse_request
from server.api.service import Service
from server.api.sse import SseResponse, guarded

CLIENT_CLOSED_REQUEST = 499  # never seen by the client; for logs


def generation_routes(service: Service) -> APIRouter:
    """POST /v1/completions and /v1/chat/completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_class=Response)
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        return await _generate(service, request, CompletionRequest, COMPLETIONS)

    @router.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        return await _generate(service, request, ChatRequest, CHAT)

    return router


async def _generate(
    service: Service, request: Request, schema: type[GenerationRequest], endpoint: Endpoint
) -> Response:
    try:
        body = await read_object(request, service.state.limits.max_body_bytes, service.state.door)
        asked = parse_request(schema, body, service.state.engine.ready)
        has_phases = request.headers.get("x-multilora-phases") == "1"
        return await until_gone(request.receive, _answer(service, asked, endpoint, has_phases, line_of(request.scope)))
    except (ClientGone, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _answer(
    service: Service, asked: GenerationRequest, endpoint: Endpoint, has_phases: bool, line: Line | None
) -> Response:
    """The response, not before the engine's first event: until then an error is a status code, also on a stream."""
    pieces = service.state.tokenizer.pieces
    generation = await service.prepare(asked)
    answer = Answer(endpoint, asked, generation, pieces, has_phases=has_phases)
    if not asked.stream:
        body = await service.stall.answer(answer.whole(), lambda: generation.has_begun)
        return json_response(body, headers=answer.headers())
    parts = generation.parts()
    try:
        first = await service.stall.answer(anext(parts), lambda: generation.has_begun)
    except BaseException:
        await parts.aclose()
        raise
    return SseResponse(guarded(answer.frames(first, parts, line)), answer.headers())
