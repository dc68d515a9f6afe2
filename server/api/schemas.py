"""The requests' schemas. Strict: nothing is coerced, guessed or ignored; every error names its field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from server.api.errors import shown
from server.api.fields import (
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_DETOKENIZE,
    REFUSED_IN_MESSAGES,
    REFUSED_IN_TOKENIZE,
    RESERVED_TEMPLATE_KWARGS,
    Refused,
    served_part,
)
from server.engine.messages import EngineReady
from server.errors import BadRequest, ContextLengthExceeded, ServerError, UnsupportedField

MAX_PROMPT_IDS = 1_000_000  # also of one that will be cut to the context; below what a body may hold
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_SALT_CHARS = 128
MAX_CHOICES = 128  # of one request: prompts times n
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_BIAS = 100.0
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_TEMPLATE_KWARGS = 64
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**63 - 1

Content = str | list[dict[str, str]]  # plain text, or parts {"type": "text", "text": ...}
PromptInput = str | list[int]

_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}


def _error(kind: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{reason}", {"reason": message})


def _error_at(param: str, message: str) -> PydanticCustomError:
    """For a check over several fields: `param` is the one to name, `message` the whole message."""
    return PydanticCustomError("several_fields", "{reason}", {"reason": message, "param": param})


def _text(value: object, what: str) -> str:
    """A non-empty string that is Unicode text: JSON can hold lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        raise _error("text_type", f"{what} must be a string")
    if not value:
        raise _error("empty", f"{what} must not be empty")
    return _unicode(value, what)


def _unicode(value: str, what: str = "it") -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _error("text_unicode", f"{what} has a lone surrogate, which is no character") from None
    return value


def _token_ids(value: list[object], info: ValidationInfo, what: str) -> list[int]:
    vocab_size = info.context["vocab_size"] if info.context else 0
    if set(map(type, value)) - {int}:  # in C: a body holds millions of ids, and the event loop waits
        raise _error("token_type", f"{what} must hold token ids (integers) only")
    ids: list[int] = value  # type: ignore[assignment]  # each element was just checked
    for token_id in (min(ids), max(ids)) if ids else ():
        if not 0 <= token_id < vocab_size:
            raise _error("token_range", f"token id {_shown(token_id)} is outside the vocabulary: 0 to {vocab_size - 1}")
    return ids


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**20 else "(too large to show)"


def _prompts(value: object, info: ValidationInfo) -> list[PromptInput]:
    """A text, token ids, or a list of one kind of them: always as a list of prompts."""
    is_list = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    prompts: list[object] = value if is_list and isinstance(value, list) else [value]
    if len(prompts) > MAX_CHOICES:
        raise _error("too_many", f"at most {MAX_CHOICES} prompts are allowed, not {len(prompts)}")
    if any(type(prompt) is not type(prompts[0]) for prompt in prompts):
        raise _error("prompt_type", "the prompts must be all strings or all lists of token ids")
    return [_prompt(prompt, info) for prompt in prompts]


def _prompt(value: object, info: ValidationInfo) -> PromptInput:
    if isinstance(value, list):
        if not value:
            raise _error("empty", "the prompt must not be empty")
        max_tokens = info.context["max_model_len"] if info.context else 0
        if len(value) > max(max_tokens, MAX_PROMPT_IDS):  # looking at each takes long, and the event loop waits
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_tokens} tokens. However, the prompt has {len(value)}. "
                "Please reduce the length of the prompt.",
                param="prompt",
            )
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


def _allowed_token_ids(value: object, info: ValidationInfo) -> list[int]:
    if not isinstance(value, list):
        raise _error("token_type", "must be a list of token ids")
    if not value:
        raise _error("empty", "an empty list would allow no token at all")
    return list(dict.fromkeys(_token_ids(value, info, "the list")))


def _logit_bias(value: object, info: ValidationInfo) -> dict[int, float]:
    """{"<token id>": bias} with ids as decimal strings, as JSON has no other keys."""
    if not isinstance(value, dict):
        raise _error("bias_type", "must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIASES:
        raise _error("too_many", f"at most {MAX_LOGIT_BIASES} biases are allowed, not {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 20):
            raise _error("token_type", f"the key {shown(key)!r} is not a token id")
        (token_id,) = _token_ids([int(key)], info, "the keys")
        if type(bias) not in (int, float):
            raise _error("bias_type", f"the bias of token {key} must be a number")
        if not -MAX_BIAS <= bias <= MAX_BIAS:  # also refuses NaN
            raise _error("bias_range", f"the bias of token {key} must be from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        biases[token_id] = float(bias)
    return biases


def _bad_words(value: object) -> list[str]:
    if not isinstance(value, list):
        raise _error("words_type", "must be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise _error("too_many", f"at most {MAX_BAD_WORDS} bad words are allowed, not {len(value)}")
    words = [_text(word, "a bad word") for word in value]
    if any(not word.strip() for word in words):
        raise _error("empty", "a bad word must have more than spaces")
    if any(len(word) > MAX_BAD_WORD_CHARS for word in words):
        raise _error("too_long", f"a bad word has at most {MAX_BAD_WORD_CHARS} characters")
    return words


def _template_kwargs(value: object) -> dict[str, Any]:
    """Variables of the chat template; those that the server sets itself can't be replaced."""
    if not isinstance(value, dict):
        raise _error("kwargs_type", "must be an object")
    if len(value) > MAX_TEMPLATE_KWARGS:
        raise _error("too_many", f"at most {MAX_TEMPLATE_KWARGS} template variables are allowed, not {len(value)}")
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & value.keys())
    if reserved:
        raise _error("reserved", f"'{reserved[0]}' is set by the server and can't be given here")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise _error("too_deep", "the variables are nested too deeply") from None
    except UnicodeEncodeError:
        raise _error("text_unicode", "a key or string has a lone surrogate, which is no character") from None
    except ValueError:
        raise _error("not_finite", "a number is too large") from None
    return value


def _metadata(value: object) -> dict[str, str]:
    """OpenAI's bounds; a pair without a value is none."""
    if not isinstance(value, dict):
        raise _error("metadata_type", "must be an object of strings")
    if len(value) > MAX_METADATA_PAIRS:
        raise _error("too_many", f"at most {MAX_METADATA_PAIRS} pairs are allowed, not {len(value)}")
    pairs = {key: text for key, text in value.items() if text is not None}
    for key in value:
        if len(_unicode(key, "a key")) > MAX_METADATA_KEY_CHARS:
            raise _error("too_long", f"a key has at most {MAX_METADATA_KEY_CHARS} characters, not {len(key)}")
    for key, text in pairs.items():
        if not isinstance(text, str):
            raise _error("metadata_type", f"the value of {shown(key)!r} must be a string")
        if len(_unicode(text, "a value")) > MAX_METADATA_VALUE_CHARS:
            raise _error("too_long", f"a value has at most {MAX_METADATA_VALUE_CHARS} characters, not {len(text)}")
    return pairs


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


def _tokenized(value: object) -> str:
    return "" if value == "" else _text(value, "the prompt")


def _detokenized(value: object, info: ValidationInfo) -> list[int]:
    if not isinstance(value, list):
        raise _error("token_type", "must be a list of token ids")
    return _token_ids(value, info, "the list")


_PART_SCHEMA = {
    "type": "object",
    "required": ["type", "text"],
    "additionalProperties": False,
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART_SCHEMA}]}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": _TEXT_SCHEMA},
        {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": _IDS_SCHEMA},
    ]
}
_STOP_TEXT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = {
    "anyOf": [_STOP_TEXT_SCHEMA, {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": _STOP_TEXT_SCHEMA}]
}
_STOP_IDS_SCHEMA = {"type": "array", "maxItems": MAX_STOP_TOKEN_IDS, "items": {"type": "integer", "minimum": 0}}
_BIAS_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_LOGIT_BIASES,
    "propertyNames": {"pattern": "^[0-9]{1,20}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}
_BAD_WORDS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_BAD_WORDS,
    "items": {"type": "string", "pattern": r"\S", "maxLength": MAX_BAD_WORD_CHARS},
}
_KWARGS_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_TEMPLATE_KWARGS,
    "propertyNames": {"not": {"enum": sorted(RESERVED_TEMPLATE_KWARGS)}},
}
_METADATA_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_METADATA_PAIRS,
    "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS},
    "additionalProperties": {"type": ["string", "null"], "maxLength": MAX_METADATA_VALUE_CHARS},
}

Text = Annotated[str, AfterValidator(_unicode)]
TemplateKwargs = Annotated[Any, BeforeValidator(_template_kwargs), WithJsonSchema(_KWARGS_SCHEMA)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class Strict(BaseModel):
    """A body in which everything means what it says: no conversions, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def _given(name: str, kind: str) -> dict[str, Any]:
    """In a JSON schema: the field is there and not null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


def _needs(name: str, kind: str, other: str) -> dict[str, Any]:
    """In a JSON schema: the field goes only with `other` true."""
    return {"if": _given(name, kind), "then": {"required": [other], "properties": {other: {"const": True}}}}


def _excludes(name: str, kind: str, other: str) -> dict[str, Any]:
    """In a JSON schema: the field does not go with `other` true."""
    return {"if": _given(name, kind), "then": {"properties": {other: {"not": {"const": True}}}}}


class Message(Strict):
    """One message of a chat, text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
    name: Text | None = None

    @property
    def num_chars(self) -> int:
        """Characters of its text."""
        parts = [self.content] if isinstance(self.content, str) else [part["text"] for part in self.content]
        return sum(map(len, parts))


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationRequest(Strict):
    """What both endpoints take."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [_needs("stream_options", "object", "stream"), _excludes("prompt_logprobs", "integer", "stream")]
        }
    )

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] = 0
    # None: the base's generation_config.json says (see params.py)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-_MAX_SEED - 1, le=_MAX_SEED)] | None = None
    stop: Annotated[Any, BeforeValidator(_stop), WithJsonSchema(_STOP_SCHEMA)] = ()
    stop_token_ids: Annotated[Any, BeforeValidator(_stop_token_ids), WithJsonSchema(_STOP_IDS_SCHEMA)] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Annotated[Any, BeforeValidator(_logit_bias), WithJsonSchema(_BIAS_SCHEMA)] = Field(default_factory=dict)
    allowed_token_ids: Annotated[Any, BeforeValidator(_allowed_token_ids), WithJsonSchema(_IDS_SCHEMA)] = ()
    bad_words: Annotated[Any, BeforeValidator(_bad_words), WithJsonSchema(_BAD_WORDS_SCHEMA)] = ()
    prompt_logprobs: LogprobCount | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_MAX_INT)] | None = None
    skip_special_tokens: bool = True
    priority: Annotated[int, Field(ge=-_MAX_INT, le=_MAX_INT)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] = ""
    # Accepted and inert:
    user: Text | None = None
    metadata: Annotated[Any, BeforeValidator(_metadata), WithJsonSchema(_METADATA_SCHEMA)] = None
    store: bool = False

    @model_validator(mode="after")
    def _check_fields_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _error_at("stream_options", "'stream_options' is only allowed when 'stream' is true")
        if self.prompt_logprobs is not None and self.stream:
            raise _error_at("prompt_logprobs", "'prompt_logprobs' is not available when 'stream' is true")
        if self.truncate_prompt_tokens == 0:
            raise _error_at("truncate_prompt_tokens", "Invalid 'truncate_prompt_tokens': 0 would leave no prompt.")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool = False
    logprobs: LogprobCount | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise _error_at("max_tokens", "Invalid 'max_tokens': 0 is allowed only with 'echo'.")
        if self.n * len(self.prompt) > MAX_CHOICES:
            raise _error_at(
                "n",
                f"'n' is {self.n} for {len(self.prompt)} prompts: a request has at most {MAX_CHOICES} choices in all",
            )
        return self


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    logprobs: bool = False
    top_logprobs: LogprobCount = 0
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    add_special_tokens: bool = False  # the template writes them itself
    # Accepted and inert:
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise _error_at("max_tokens", "Invalid 'max_tokens': must be at least 1.")
        if self.top_logprobs and not self.logprobs:
            raise _error_at("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true")
        _check_continues(self.add_generation_prompt, self.continue_final_message)
        return self


def _check_continues(add_generation_prompt: bool | None, continue_final_message: bool) -> None:
    if add_generation_prompt and continue_final_message:
        raise _error_at(
            "continue_final_message", "'continue_final_message' and 'add_generation_prompt' can't both be true"
        )


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt or messages, as the generating endpoints would see them."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("prompt", "string"), _given("messages", "array")]})

    model: Annotated[str, Field(min_length=1)] | None = None
    prompt: Annotated[Any, BeforeValidator(_tokenized), WithJsonSchema({"type": "string"})] = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # None: true for a prompt, false for messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _error_at("prompt", "Send either 'prompt' or 'messages'")
        _check_continues(self.add_generation_prompt, self.continue_final_message)
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(min_length=1)] | None = None
    tokens: Annotated[Any, BeforeValidator(_detokenized), WithJsonSchema({**_IDS_SCHEMA, "minItems": 0})]


RequestT = TypeVar("RequestT", bound=Strict)
REFUSED_BY_SCHEMA: dict[type[BaseModel], Refused] = {
    CompletionRequest: REFUSED_IN_COMPLETIONS,
    ChatRequest: REFUSED_IN_CHAT,
    TokenizeRequest: REFUSED_IN_TOKENIZE,
    DetokenizeRequest: REFUSED_IN_DETOKENIZE,
}


def parse_request(schema: type[RequestT], body: Mapping[str, object], ready: EngineReady) -> RequestT:
    """The typed request in `body`. Raises BadRequest (or UnsupportedField) that names the first field at fault."""
    served = served_part(body, frozenset(schema.model_fields), REFUSED_BY_SCHEMA[schema])
    if isinstance(messages := served.get("messages"), list):
        if len(messages) > ready.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {ready.max_model_len} tokens. However, you sent "
                f"{len(messages)} messages, of which each takes one token or more. Please reduce their number.",
                param="messages",
            )
        served["messages"] = [_served_message(message, index) for index, message in enumerate(messages)]
    if isinstance(options := served.get("stream_options"), dict):
        served["stream_options"] = served_part(options, frozenset(StreamOptions.model_fields), {}, "stream_options.")
    try:
        return schema.model_validate(
            served, context={"vocab_size": ready.vocab_size, "max_model_len": ready.max_model_len}
        )
    except ValidationError as error:
        raise first_error(error.errors(include_url=False, include_input=False)[0]) from None


def _served_message(message: object, index: int) -> object:
    """`message` with its served fields only; what is no object is left to the schema."""
    if not isinstance(message, dict):
        return message
    where = f"messages[{index}]."
    if message.get("role") in ("tool", "function"):
        raise UnsupportedField(f"Messages of role '{message['role']}' are not supported.", param=f"{where}role")
    return served_part(message, frozenset(Message.model_fields), REFUSED_IN_MESSAGES, where)


def first_error(error: ErrorDetails) -> ServerError:
    """What the API answers to the first of pydantic's errors."""
    kind, param = error["type"], _path(error["loc"]) or None
    if kind == "missing":
        return BadRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "several_fields":
        return BadRequest(error["msg"], param=error["ctx"]["param"])
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
