"""How a request is put to a server, by dialect.

    openai         POST /v1/completions       the adapter is the `model`
    openai-chat    POST /v1/chat/completions  the adapter is the `model`; prompts are text
    llamacpp       POST /v1/completions       the adapter is `lora: [{id, scale}]`, ids in the order of the names;
                                              the base asks for every adapter at scale 0, since by default all are on

`ignore_eos` and `return_token_ids` are vLLM's additions, which ours has too; with `strict` only OpenAI's own fields go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.workload import Request, WorkloadSpec

DIALECTS = ("openai", "openai-chat", "llamacpp")
_PATHS = {"openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Dialect:
    """One way of asking."""

    kind: str
    base: str  # the base's name
    adapters: Sequence[str]

    @property
    def path(self) -> str:
        """Where requests go."""
        return _PATHS.get(self.kind, "/v1/completions")

    def body(self, request: Request, spec: WorkloadSpec) -> bytes:
        """JSON. Errors: ValueError for a prompt that the dialect can't carry."""
        fields: dict[str, object] = {
            **self._named(request),
            **self._prompt(request),
            "max_tokens": request.max_tokens,
            "temperature": spec.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not spec.strict:
            fields |= {"ignore_eos": True} if spec.ignore_eos else {}
            fields |= {"timings_per_token": True} if self.kind == "llamacpp" else {"return_token_ids": True}
        return json.dumps({**fields, **spec.extra_body}, separators=(",", ":")).encode()

    def _named(self, request: Request) -> dict[str, object]:
        if self.kind != "llamacpp":
            return {"model": self.base if request.adapter is None else self.adapters[request.adapter]}
        if request.adapter is not None:
            return {"model": self.base, "lora": [{"id": request.adapter, "scale": 1.0}]}
        zeros = [{"id": number, "scale": 0.0} for number in range(len(self.adapters))]
        return {"model": self.base, "lora": zeros} if zeros else {"model": self.base}

    def _prompt(self, request: Request) -> dict[str, object]:
        if self.kind != "openai-chat":
            return {"prompt": request.prompt}
        if not isinstance(request.prompt, str):
            raise ValueError("a chat's prompt is text: use --prompt-kind text")
        return {"messages": [{"role": "user", "content": request.prompt}]}
