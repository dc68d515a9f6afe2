"""From a request's fields to the engine's sampling parameters; what the client leaves open, the base's defaults say."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, fields
from pathlib import Path

from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from server.engine.messages import SamplingParams
from server.errors import BadRequest, ContextLengthExceeded
from server.text.convert import read_json_object
from server.text.tokenizer import BaseTokenizer

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
SEED_MASK = 2**63 - 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """How a request is sampled that says nothing about it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_sampling_defaults(model_dir: Path) -> SamplingDefaults:
    """Those of the base's generation_config.json, as vLLM's `--generation-config auto` takes them.

    A value that a request could not send either is left out, with a warning. Raises ConfigError for a file
    that is no JSON object.
    """
    path = model_dir / "generation_config.json"
    config = read_json_object(path)
    given = {field.name: config[field.name] for field in fields(SamplingDefaults) if config.get(field.name) is not None}
    taken = {name: value for name, value in given.items() if _is_valid(name, value)}
    for name in given.keys() - taken.keys():
        logger.warning("%s: %s is %r, which no request may have; it is left out", path, name, given[name])
    return SamplingDefaults(**taken)


def _is_valid(name: str, value: object) -> bool:
    field = {"model": "-", "prompt": "-", name: value}
    try:
        CompletionRequest.model_validate(field)
    except ValueError:
        return False
    return True


def num_logprobs(asked: GenerationRequest) -> int | None:
    """How many of the most likely tokens to tell beside the chosen one; None = no logprobs."""
    if isinstance(asked, ChatRequest):
        return asked.top_logprobs if asked.logprobs else None
    assert isinstance(asked, CompletionRequest)
    return asked.logprobs


def is_echoed(asked: GenerationRequest) -> bool:
    """Whether the answer begins with the prompt."""
    return isinstance(asked, CompletionRequest) and asked.echo


def sampling_params(
    asked: GenerationRequest,
    num_prompt: int,
    max_model_len: int,
    defaults: SamplingDefaults,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """The parameters of all choices of one prompt, but for their seeds. Raises BadRequest, ContextLengthExceeded."""
    max_tokens = _max_tokens(asked, num_prompt, max_model_len)
    if asked.min_tokens > max_tokens:
        raise BadRequest(
            f"'min_tokens' is {asked.min_tokens}, above the {max_tokens} of max_tokens", param="min_tokens"
        )
    top_k = _chosen(asked.top_k, defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        temperature=_chosen(asked.temperature, defaults.temperature),
        top_p=_chosen(asked.top_p, defaults.top_p),
        top_k=max(int(top_k), 0),  # -1 and 0 both mean all
        min_p=_chosen(asked.min_p, defaults.min_p),
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=_chosen(asked.repetition_penalty, defaults.repetition_penalty),
        stop_token_ids=tuple(dict.fromkeys(asked.stop_token_ids)),
        ignore_eos=asked.ignore_eos,
        logit_bias=tuple(asked.logit_bias.items()),
        allowed_token_ids=tuple(asked.allowed_token_ids),
        bad_words=bad_words,
        logprobs=num_logprobs(asked),
        prompt_logprobs=_num_prompt_logprobs(asked),
    )


def seed_of(asked: GenerationRequest, index: int) -> int:
    """The seed of a prompt's choice `index`: the client's plus the index, else a drawn one."""
    return secrets.randbits(63) if asked.seed is None else (asked.seed + index) & SEED_MASK


def bad_word_ids(tokenizer: BaseTokenizer, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that say one of `words`, at the start of a text and after a space."""
    texts = [prefix + word.strip() for word in words for prefix in ("", " ")]
    encoded = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tuple(dict.fromkeys(ids for ids in encoded if ids))


def truncated(prompt_ids: list[int], asked: GenerationRequest, max_model_len: int) -> list[int]:
    """The last `truncate_prompt_tokens` of the prompt; -1 keeps what the context holds beside the output."""
    keep = asked.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep == -1:
        keep = max(max_model_len - _num_wanted(asked), 1)
    return prompt_ids[-keep:]


def _chosen(given: float | None, default: float) -> float:
    return default if given is None else given


def _num_prompt_logprobs(asked: GenerationRequest) -> int | None:
    """What `prompt_logprobs` asks for, and what an echo needs for its `logprobs`."""
    echoed = num_logprobs(asked) if is_echoed(asked) else None
    return max((count for count in (asked.prompt_logprobs, echoed) if count is not None), default=None)


def _wanted_tokens(asked: GenerationRequest) -> tuple[str, int | None]:
    """The field that bounds the output, and its value."""
    if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
        if asked.max_tokens not in (None, asked.max_completion_tokens):
            raise BadRequest("'max_tokens' and 'max_completion_tokens' differ; send one", param="max_tokens")
        return "max_completion_tokens", asked.max_completion_tokens
    return "max_tokens", asked.max_tokens


def _num_wanted(asked: GenerationRequest) -> int:
    """Tokens of output that the context must have room for; 0 for an echo alone."""
    wanted = _wanted_tokens(asked)[1]
    return 1 if wanted is None else wanted


def _max_tokens(asked: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    """The bound that the client set, else the endpoint's default; what doesn't fit the context is refused."""
    room, num_output = max_model_len - num_prompt, _num_wanted(asked)
    prompt_name = "messages" if isinstance(asked, ChatRequest) else "prompt"
    name, wanted = _wanted_tokens(asked)
    if num_output > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt + num_output} tokens ({num_prompt} in the {prompt_name}, {num_output} in the completion). "
            f"Please reduce the length of the {prompt_name} or completion.",
            param=prompt_name if room < min(num_output, 1) else name,
        )
    if wanted is not None:
        return wanted
    return room if isinstance(asked, ChatRequest) else min(DEFAULT_COMPLETION_TOKENS, room)
