"""The bodies of successful answers: whole ones here, streamed ones through sse.Frames."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from server.api.choices import Choice, Generation, Part, Scored, off_loop_if
from server.api.logprobs import LogprobsFormat, prompt_logprobs
from server.api.params import num_logprobs
from server.api.protocol import Line
from server.api.schemas import GenerationRequest
from server.api.sse import DONE, Frames
from server.engine.messages import TokenLogprobs
from server.text.pieces import Pieces

IDENTITY_HEADERS = ("x-multilora-adapter-version", "x-multilora-adapter-digest", "x-multilora-image-key")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What differs between the two endpoints' answers."""

    is_chat: bool
    id_prefix: str
    whole: str  # the object's name
    chunk: str  # the same of a stream's chunk


COMPLETIONS = Endpoint(False, "cmpl-", "text_completion", "text_completion")
CHAT = Endpoint(True, "chatcmpl-", "chat.completion", "chat.completion.chunk")


class Answer:
    """One request's answer in the making: what the client asked for, and the generation that gives it."""

    def __init__(
        self, endpoint: Endpoint, asked: GenerationRequest, generation: Generation, pieces: Pieces, *, has_phases: bool
    ) -> None:
        self.generation = generation
        self._endpoint = endpoint
        self._asked = asked
        self._pieces = pieces
        self._has_phases = has_phases
        self._encoded_rows: dict[int, msgspec.Raw] = {}  # prompt_logprobs, by the id of the list they are made from
        num_top = num_logprobs(asked)
        self._logprobs = None if num_top is None else self._format(num_top)

    def headers(self) -> dict[str, str]:
        """Which version and image answered; nothing for the base. Known from the first part on."""
        ref = self.generation.ref
        return {} if ref is None else dict(zip(IDENTITY_HEADERS, (ref.version, ref.digest, ref.image_key), strict=True))

    async def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        choices = self.generation.choices
        parts: list[list[Part]] = [[] for _ in choices]
        async with aclosing(self.generation.parts()) as stream:
            async for part in stream:
                parts[part.index].append(part)
        num_scored = sum(len(part.scored or ()) for own in parts for part in own)
        num_scored += sum(len(choice.told.prompt_logprobs or ()) for choice in choices)
        return await off_loop_if(num_scored, lambda: self._whole(parts))

    def _whole(self, parts: list[list[Part]]) -> bytes:
        """The body, of each choice's parts."""
        choices = self.generation.choices
        body = {
            **self._envelope(self._endpoint.whole),
            "choices": [self._choice(choice, own) for choice, own in zip(choices, parts, strict=True)],
            "usage": self._usage(),
        }
        if self._endpoint.is_chat:
            body |= self._of_prompt(choices[0])
        return msgspec.json.encode(body)

    async def frames(
        self, first: Part, rest: AsyncGenerator[Part, None], line: Line | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The frames of a streamed answer whose first part has come. One yield per engine event.

        But most frames of a single choice go straight to `line`, once the first one has been sent.
        """
        choices = self.generation.choices
        frames = Frames(
            self._envelope(self._endpoint.chunk),
            is_chat=self._endpoint.is_chat,
            has_usage=self._asked.includes_usage,
            has_token_ids=self._asked.return_token_ids,
            logprobs=self._logprobs,
        )
        async with aclosing(rest):
            start = b"".join(frames.start(choice.job.index, choice.job.prompt_ids) for choice in choices)
            num_open = len(choices) - (first.delta.finish_reason is not None)
            yield start + await self._scored(frames, first) + (b"" if num_open else self._end(frames))
            if line is not None and len(choices) == 1:
                choices[0].divert(_writer(frames, line), line.is_free)
            async for part in rest:
                num_open -= part.delta.finish_reason is not None
                told = frames.part(part) if part.scored is None else await self._scored(frames, part)
                yield told + (b"" if num_open else self._end(frames))

    async def _scored(self, frames: Frames, part: Part) -> bytes:
        return await off_loop_if(len(part.scored or ()), lambda: frames.part(part))

    def _end(self, frames: Frames) -> bytes:
        return (frames.usage(self._usage()) if self._asked.includes_usage else b"") + DONE

    def _usage(self) -> dict[str, object]:
        return self.generation.usage(has_phases=self._has_phases)

    def _format(self, num_top: int) -> LogprobsFormat:
        return LogprobsFormat(
            self._pieces,
            is_chat=self._endpoint.is_chat,
            num_top=num_top,
            as_ids=self._asked.return_tokens_as_token_ids,
        )

    def _envelope(self, kind: str) -> dict[str, object]:
        return {
            "id": f"{self._endpoint.id_prefix}{self.generation.request_id}",
            "object": kind,
            "created": int(self.generation.arrival_s),
            "model": self.generation.target.name,
        }

    def _choice(self, choice: Choice, parts: list[Part]) -> dict[str, object]:
        text = "".join(part.delta.text for part in parts)
        said: dict[str, object] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._endpoint.is_chat
            else {"text": text}
        )
        scored: list[Scored] = [token for part in parts for token in part.scored or ()]
        last = parts[-1].delta
        body: dict[str, object] = {
            "index": choice.job.index,
            **said,
            "logprobs": None if self._logprobs is None else self._logprobs.write(scored),
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if self._asked.return_token_ids:
            body["token_ids"] = [token_id for part in parts for token_id in part.delta.token_ids]
        return body if self._endpoint.is_chat else body | self._of_prompt(choice)

    def _of_prompt(self, choice: Choice) -> dict[str, object]:
        """What is told of a prompt: in a completion by each of its choices, in a chat by the answer."""
        body: dict[str, object] = {}
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = choice.job.prompt_ids
        if self._asked.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs(choice.told.prompt_logprobs or [])
        return body

    def _prompt_logprobs(self, rows: list[TokenLogprobs]) -> msgspec.Raw:
        """Encoded once for all choices of a prompt, which share its rows."""
        known = self._encoded_rows.get(id(rows))
        if known is None:
            num_top = self._asked.prompt_logprobs or 0
            known = self._encoded_rows[id(rows)] = prompt_logprobs(rows, num_top, self._pieces)
        return known


def _writer(frames: Frames, line: Line) -> Callable[[str, list[int]], None]:
    def write(text: str, token_ids: list[int]) -> None:
        frame = frames.plain(0, text, token_ids)
        if frame:
            line.write(frame)

    return write
