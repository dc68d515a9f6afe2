"""The schemas of answers, as the OpenAPI document has them. Those of bodies come from `schemas`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

ANY: Schema = {}
STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def object_of(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object; fields that are not named may come with later versions."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": properties}


def list_of(items: Schema) -> Schema:
    """OpenAI's list object."""
    return object_of({"object": {"const": "list"}, "data": _array(items)})


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    """`schema`, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


ERROR = object_of(
    {
        "error": object_of(
            {"message": STRING, "type": STRING, "param": nullable(STRING), "code": {"type": ["string", "integer"]}}
        )
    }
)
_USAGE = object_of(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": object_of({"cached_tokens": _COUNT}),
    },
    {"multilora": object_of({"phases": {"type": "object", "additionalProperties": {"type": "number"}}})},
)
_FINISH: Schema = {"enum": ["stop", "length"]}
_STOP: dict[str, Schema] = {"stop_reason": {"type": ["string", "integer", "null"]}}

_CHAT_TOKEN = {"token": STRING, "logprob": {"type": "number"}, "bytes": _array({"type": "integer"})}
_CHAT_LOGPROBS = object_of(
    {
        "content": _array(object_of({**_CHAT_TOKEN, "top_logprobs": _array(object_of(_CHAT_TOKEN))})),
        "refusal": {"type": "null"},
    }
)
_TEXT_LOGPROBS = object_of(
    {
        "tokens": _array(STRING),
        "token_logprobs": _array({"type": ["number", "null"]}),
        "top_logprobs": _array({"type": ["object", "null"], "additionalProperties": {"type": "number"}}),
        "text_offset": _array(_COUNT),
    }
)
_RANKED = object_of({"logprob": {"type": "number"}, "rank": _COUNT, "decoded_token": STRING})
_PROMPT_LOGPROBS = {"prompt_logprobs": _array({"type": ["object", "null"], "additionalProperties": _RANKED})}
_TOKEN_IDS = {"token_ids": _array(_COUNT)}  # this and the next: if asked for
_PROMPT_IDS = {"prompt_token_ids": _array(_COUNT)}


def _envelope(kind: str) -> dict[str, Schema]:
    return {"id": STRING, "object": {"const": kind}, "created": _COUNT, "model": STRING}


def _whole(
    kind: str, said: Mapping[str, Schema], of_choice: Mapping[str, Schema], more: Mapping[str, Schema]
) -> Schema:
    """A whole answer; `of_choice` and `more` may be in its choices and in itself."""
    choice = object_of({"index": _COUNT, **said, "finish_reason": _FINISH, **_STOP}, {**_TOKEN_IDS, **of_choice})
    return object_of({**_envelope(kind), "choices": _array(choice), "usage": _USAGE}, more)


def _chunk(
    kind: str, said: Mapping[str, Schema], of_choice: Mapping[str, Schema], more: Mapping[str, Schema]
) -> Schema:
    """An event of a stream: of one choice, or of none with the usage at the end."""
    optional = {**_STOP, **_TOKEN_IDS, **of_choice}
    choice = object_of({"index": _COUNT, **said, "finish_reason": nullable(_FINISH)}, optional)
    choices = {**_array(choice), "maxItems": 1}
    return object_of({**_envelope(kind), "choices": choices}, {"usage": nullable(_USAGE), **more})


_TEXT = {"text": STRING, "logprobs": nullable(_TEXT_LOGPROBS)}
_MESSAGE = object_of({"role": {"const": "assistant"}, "content": STRING, "refusal": {"type": "null"}})
_DELTA = object_of({}, {"role": {"const": "assistant"}, "content": STRING})
_SCORED = {"logprobs": nullable(_CHAT_LOGPROBS)}

COMPLETION = _whole("text_completion", _TEXT, {**_PROMPT_IDS, **_PROMPT_LOGPROBS}, {})
CHAT = _whole("chat.completion", {"message": _MESSAGE, **_SCORED}, {}, {**_PROMPT_IDS, **_PROMPT_LOGPROBS})
CHUNKS = {  # the events' data, by the components' names
    "CompletionChunk": _chunk("text_completion", _TEXT, _PROMPT_IDS, {}),
    "ChatChunk": _chunk("chat.completion.chunk", {"delta": _DELTA, **_SCORED}, {}, _PROMPT_IDS),
}

MODEL = object_of({"id": STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": STRING})
ADAPTER = object_of({"name": STRING, "version": nullable(STRING), "disk": object_of({"state": STRING}), "uses": _COUNT})
ADAPTER_REPORT = object_of(
    {"object": {"const": "adapter.report"}, "is_served": {"const": True}, "bytes": object_of({"device": _COUNT})}
)
TOKENS = object_of(
    {"count": _COUNT, "max_model_len": _COUNT, "tokens": _array(_COUNT), "token_strs": nullable(_array(STRING))}
)
