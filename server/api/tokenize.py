"""The routes that only know text and tokens: /tokenize and /detokenize with vLLM's bodies, and /version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.body import read_object
from server.api.errors import json_response
from server.api.routes import CLIENT_CLOSED_REQUEST
from server.api.schemas import DetokenizeRequest, TokenizeRequest, parse_request
from server.api.service import Service


def server_version() -> str:
    """The installed package's version; "unknown" in a checkout that is not installed."""
    try:
        return version("multilora")
    except PackageNotFoundError:
        return "unknown"


def tokenize_routes(service: Service) -> APIRouter:
    """POST /tokenize, POST /detokenize, GET /version."""
    router = APIRouter()
    tokenizer = service.state.tokenizer

    @router.post("/tokenize", response_class=Response)
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of messages as the model's chat template renders them."""
        try:
            body = await read_object(request, service.state.limits.max_body_bytes, service.state.door)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        ready = service.state.engine.ready
        asked = parse_request(TokenizeRequest, body, ready)
        target = await service.supply.resolve(asked.model or service.state.base_names[0])
        ids = await service.encode(asked, asked.prompt, target)
        strings = [tokenizer.pieces.raw(token_id) for token_id in ids] if asked.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": ready.max_model_len, "tokens": ids, "token_strs": strings}
        return json_response(msgspec.json.encode(answer))

    @router.post("/detokenize", response_class=Response)
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        try:
            body = await read_object(request, service.state.limits.max_body_bytes, service.state.door)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        asked = parse_request(DetokenizeRequest, body, service.state.engine.ready)
        if asked.model is not None:
            await service.supply.resolve(asked.model)
        text = tokenizer.decode(asked.tokens, skip_special_tokens=False)
        return json_response(msgspec.json.encode({"prompt": text}))

    @router.get("/version", response_class=Response)
    async def show_version() -> Response:
        """The server's version."""
        return json_response(msgspec.json.encode({"version": server_version()}))

    return router
