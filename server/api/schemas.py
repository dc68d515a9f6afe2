"""The requests' schemas. Strict: nothing is coerced, guessed or ignored; every error names its field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from server.api.errors import shown
from server.api.fields import (
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGES,
    Refused,
    served_part,
)
from server.errors import BadRequest, ServerError, UnsupportedField

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_SALT_CHARS = 128
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**63 - 1

Content = str | list[dict[str, str]]  # plain text, or parts {"type": "text", "text": ...}


def _error(kind: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{reason}", {"reason": message})


def _text(value: object, what: str) -> str:
    """A non-empty string that is Unicode text: JSON can hold lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        raise _error("text_type", f"{what} must be a string")
    if not value:
        raise _error("empty", f"{what} must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _error("text_unicode", f"{what} has a lone surrogate, which is no character") from None
    return value


def _token_ids(value: list[object], info: ValidationInfo, what: str) -> list[int]:
    vocab_size = info.context["vocab_size"] if info.context else 0
    for token_id in value:
        if type(token_id) is not int:
            raise _error("token_type", f"{what} must hold token ids (integers) only")
        if not 0 <= token_id < vocab_size:
            raise _error("token_range", f"token id {_shown(token_id)} is outside the vocabulary: 0 to {vocab_size - 1}")
    return value  # type: ignore[return-value]  # each element was just checked


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**20 else "(too large to show)"


def _prompt(value: object, info: ValidationInfo) -> str | list[int]:
    """A text, a list of one text, token ids, or a list of one list of token ids."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise _error("unsupported", "one prompt per request is supported; send several requests")
        value = value[0]
    if isinstance(value, list):
        if not value:
            raise _error("empty", "the prompt must not be empty")
        return _token_ids(value, info, "the prompt")
    if not isinstance(value, str):
        raise _error("prompt_type", "the prompt must be a string or a list of token ids")
    return _text(value, "the prompt")


def _stop(value: object) -> list[str]:
    given = value if isinstance(value, list) else [value]
    if len(given) > MAX_STOP_STRINGS:
        raise _error("too_many", f"at most {MAX_STOP_STRINGS} stop strings are allowed, not {len(given)}")
    stops = [_text(stop, "a stop string") for stop in given]
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise _error("too_long", f"a stop string has at most {MAX_STOP_CHARS} characters")
    return stops


def _stop_token_ids(value: object, info: ValidationInfo) -> list[int]:
    if not isinstance(value, list):
        raise _error("token_type", "must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise _error("too_many", f"at most {MAX_STOP_TOKEN_IDS} stop token ids are allowed, not {len(value)}")
    return _token_ids(value, info, "the list")


def _content(value: object) -> Content:
    if isinstance(value, str):
        return _text(value, "the content") if value else value
    if not isinstance(value, list):
        raise _error("content_type", "the content must be a string or a list of text parts")
    if not value:
        raise _error("empty", "the content must not be an empty list")
    return [_part(part) for part in value]


def _part(part: object) -> dict[str, str]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _error("part_type", "a content part must be an object with a type")
    if part["type"] != "text":
        raise _error("unsupported", f"content parts of type {part['type'][:64]!r} are not supported, only text")
    if part.keys() != {"type", "text"}:
        raise _error("part_fields", "a text part has the fields type and text, and no other")
    return {"type": "text", "text": _text(part["text"], "a text part") if part["text"] != "" else ""}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Message(_Strict):
    """One message of a chat, text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, BeforeValidator(_content)]
    name: str | None = None


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationRequest(_Strict):
    """What both endpoints take."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-_MAX_SEED - 1, le=_MAX_SEED)] | None = None
    stop: Annotated[Any, BeforeValidator(_stop)] = ()
    stop_token_ids: Annotated[Any, BeforeValidator(_stop_token_ids)] = ()
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] = ""
    # Accepted and inert:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool = False

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _error("stream_options", "'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompt)]
    add_special_tokens: bool = True


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # the template writes them itself
    # Accepted and inert:
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


RequestT = TypeVar("RequestT", bound=GenerationRequest)
_REFUSED: dict[type[GenerationRequest], Refused] = {
    CompletionRequest: REFUSED_IN_COMPLETIONS,
    ChatRequest: REFUSED_IN_CHAT,
}


def parse_request(schema: type[RequestT], body: Mapping[str, object], *, vocab_size: int) -> RequestT:
    """The typed request in `body`. Raises BadRequest (or UnsupportedField) that names the first field at fault."""
    served = served_part(body, frozenset(schema.model_fields), _REFUSED[schema])
    if isinstance(messages := served.get("messages"), list):
        served["messages"] = [_served_message(message, index) for index, message in enumerate(messages)]
    try:
        return schema.model_validate(served, context={"vocab_size": vocab_size})
    except ValidationError as error:
        raise _first_error(error.errors(include_url=False, include_input=False)[0]) from None


def _served_message(message: object, index: int) -> object:
    """`message` with its served fields only; what is no object is left to the schema."""
    if not isinstance(message, dict):
        return message
    where = f"messages[{index}]."
    if message.get("role") in ("tool", "function"):
        raise UnsupportedField(f"Messages of role '{message['role']}' are not supported.", param=f"{where}role")
    return served_part(message, frozenset(Message.model_fields), REFUSED_IN_MESSAGES, where)


def _first_error(error: ErrorDetails) -> ServerError:
    kind, param = error["type"], _path(error["loc"]) or None
    if kind == "missing":
        return BadRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "stream_options":
        return BadRequest(error["msg"], param="stream_options")
    message = f"Invalid '{param}': {error['msg']}."
    if kind == "unsupported":
        return UnsupportedField(message, param=param)
    if kind in ("unknown_parameter", "extra_forbidden"):
        return BadRequest(message, param=param, code="unknown_parameter")
    return BadRequest(message, param=param, code="invalid_type" if kind.endswith("_type") else None)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") as messages[0].content."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{shown(part)}" if path else shown(part)
    return path
