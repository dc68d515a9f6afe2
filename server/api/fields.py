"""Request fields that are known but not served: refused by name unless they ask for nothing.

A field's tuple holds the values, beside null, that change nothing; any other value is refused with 400.
Fields that are served stand in schemas.py; a field in neither place is unknown, and refused as such.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.api.errors import shown
from server.errors import BadRequest, UnsupportedField

Refused = Mapping[str, tuple[object, ...]]

_TEXT = {"type": "text"}

REFUSED_ANYWHERE: Refused = {
    # OpenAI
    "best_of": (1,),
    # vLLM
    "ec_transfer_params": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "request_id": (),
    "return_prompt_text": (False,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "response_format": (_TEXT,),
}
REFUSED_IN_COMPLETIONS: Refused = {
    **REFUSED_ANYWHERE,
    "suffix": (),
}
REFUSED_IN_CHAT: Refused = {
    **REFUSED_ANYWHERE,
    # OpenAI
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": (_TEXT,),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "thinking_token_budget": (),
}
REFUSED_IN_MESSAGES: Refused = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


REFUSED_IN_TOKENIZE: Refused = {"chat_template": (), "mm_processor_kwargs": ({},), "tools": ([],)}
REFUSED_IN_DETOKENIZE: Refused = {}

INERT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "store", "user"})
"""Served fields that change nothing: validated, and otherwise unread."""

RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tools",
        "truncation",
    }
)
"""What chat_template_kwargs may not hold: arguments of the renderer, which a client must not reach."""


def served_part(
    body: Mapping[str, object], served: frozenset[str], refused: Refused, where: str = ""
) -> dict[str, object]:
    """The served fields of `body` that are not null (null means absent, as at OpenAI).

    Raises UnsupportedField or BadRequest for the first field that would have to be ignored; `where` is the
    path of `body` in the request.
    """
    for name, value in body.items():
        if name in served:
            continue
        param = f"{where}{shown(name)}"
        if name not in refused:
            raise BadRequest(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        if value is not None and not any(_is_same(value, inert) for inert in refused[name]):
            raise UnsupportedField(f"'{param}' is not supported by this server.", param=param)
    return {name: value for name, value in body.items() if name in served and value is not None}


def _is_same(value: object, inert: object) -> bool:
    # True == 1 in Python, but `"n": true` is a mistake.
    return type(value) is type(inert) and value == inert
