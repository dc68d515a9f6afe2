"""The bodies of successful answers: whole ones here, streamed ones through sse.Frames."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from server.api.schemas import GenerationRequest
from server.api.service import Generation
from server.api.sse import Frames
from server.text.output import Delta


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What differs between the two endpoints' answers."""

    is_chat: bool
    id_prefix: str
    whole: str  # the object's name
    chunk: str  # the same of a stream's chunk


COMPLETIONS = Endpoint(False, "cmpl-", "text_completion", "text_completion")
CHAT = Endpoint(True, "chatcmpl-", "chat.completion", "chat.completion.chunk")


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer in the making: what the client asked for, and the generation that gives it."""

    endpoint: Endpoint
    asked: GenerationRequest
    generation: Generation
    has_phases: bool = False

    def headers(self) -> dict[str, str]:
        """Which image answered; nothing for the base. Known from the first delta on."""
        image_key = self.generation.image_key
        return {"x-multilora-image-key": image_key} if image_key else {}

    async def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        async with aclosing(self.generation.deltas()) as deltas:
            parts = [delta async for delta in deltas]
        body = {
            **self._envelope(self.endpoint.whole),
            "choices": [self._choice(parts)],
            "usage": self.generation.usage(has_phases=self.has_phases),
        }
        if self.asked.return_token_ids and self.endpoint.is_chat:
            body["prompt_token_ids"] = self.generation.job.prompt_ids
        return msgspec.json.encode(body)

    async def frames(self, first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The frames of a streamed answer whose first delta has come. One yield per engine event."""
        frames = Frames(
            self._envelope(self.endpoint.chunk),
            is_chat=self.endpoint.is_chat,
            has_usage=self.asked.includes_usage,
            has_token_ids=self.asked.return_token_ids,
        )
        async with aclosing(rest):
            yield (frames.start(self.generation.job.prompt_ids) + frames.delta(first) + self._end(frames, first))
            async for delta in rest:
                yield frames.delta(delta) + self._end(frames, delta)

    def _end(self, frames: Frames, delta: Delta) -> bytes:
        if delta.finish_reason is None:
            return b""
        usage = self.generation.usage(has_phases=self.has_phases) if self.asked.includes_usage else None
        return frames.end(delta, usage)

    def _envelope(self, kind: str) -> dict[str, object]:
        job = self.generation.job
        return {
            "id": f"{self.endpoint.id_prefix}{job.request_id}",
            "object": kind,
            "created": int(job.arrival_s),
            "model": job.target.name,
        }

    def _choice(self, parts: list[Delta]) -> Mapping[str, object]:
        text = "".join(delta.text for delta in parts)
        said: dict[str, object] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.endpoint.is_chat
            else {"text": text}
        )
        choice: dict[str, object] = {
            "index": 0,
            **said,
            "logprobs": None,
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }
        if self.asked.return_token_ids:
            choice["token_ids"] = [token_id for delta in parts for token_id in delta.token_ids]
            if not self.endpoint.is_chat:
                choice["prompt_token_ids"] = self.generation.job.prompt_ids
        return choice
