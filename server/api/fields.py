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
    "n": (1,),
    "logit_bias": ({},),
    # vLLM
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
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
    "echo": (False,),
    "logprobs": (),
    "suffix": (),
}
REFUSED_IN_CHAT: Refused = {
    **REFUSED_ANYWHERE,
    # OpenAI
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
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
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
    # vLLM
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
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
