"""Chat templates: sandboxed jinja2 that renders what transformers' apply_chat_template renders, without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

# What a template written for other inputs raises while it renders ours; TemplateError covers
# raise_exception(), undefined names and the sandbox's refusals.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
_COMPILE_ERRORS = (*_RENDER_ERRORS, SyntaxError)  # of the Python that jinja2 makes: blocks nested too deeply
_MAX_WORDS = 1000  # characters of a template's own words
_PROBE = "probe-of-content-forms"
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where the final message ends in the rendering; cut off there
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # one thing under three names

OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What a rendering sets itself: extra variables may have any other name."""


class ChatTemplateError(Exception):
    """The template refuses these messages (or is itself broken); the message is the template's own."""


class ChatTemplate:
    """One template, compiled once; rendering is thread-safe.

    `takes_parts` says whether it reads content given as a list of {"type": "text", "text": ...} parts, and
    `takes_text` whether it reads plain strings; both are found by rendering a probe, since a template that
    doesn't know a form drops the text silently.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ChatTemplateError when `source` doesn't compile."""
        self._special_tokens = dict(special_tokens)
        self._reads_content = "content" in source
        try:
            self._template = _environment().from_string(source)
        except _COMPILE_ERRORS as error:
            raise ChatTemplateError(f"the chat template does not compile: {_words_of(error)}") from error
        text = self._probe(_PROBE)
        parts = self._probe([{"type": "text", "text": _PROBE}])
        self.takes_text = _PROBE in text
        self.takes_parts = _PROBE in parts and (parts == text or "'type'" not in parts)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of `messages`. Raises ChatTemplateError with the template's own words.

        continue_final_message: the text ends where the last message's content does. variables: what the
        template sees beside OWN_VARIABLES and the special tokens, which they replace.
        """
        prepared = [self._prepare(message) for message in messages]
        final = self._mark_end(prepared) if continue_final_message else None
        own = {"messages": prepared, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            # one dict, not keywords: a variable may have any name, `self` too
            text = self._template.render({**self._special_tokens, **(variables or {}), **own})
        except _RENDER_ERRORS as error:
            raise ChatTemplateError(_words_of(error)) from error
        if not text.isascii():
            _check_unicode(text)
        return text if final is None else _cut_at_end(text, final)

    def _mark_end(self, prepared: list[dict[str, Any]]) -> str:
        """Put the end tag behind the last message's text, which is returned."""
        content = prepared[-1].get("content") if prepared else None
        if not self._reads_content:
            raise ChatTemplateError("it reads no message's content, so there is no final message to continue")
        if isinstance(content, str):
            prepared[-1]["content"] = content + _END_TAG
            return content
        parts = [dict(part) for part in content or ()]
        last = next((part for part in reversed(parts) if "text" in part), None)
        if last is None:
            raise ChatTemplateError("the final message has no text to continue")
        prepared[-1]["content"] = parts
        text = str(last["text"])
        last["text"] = text + _END_TAG
        return text

    def _prepare(self, message: Message) -> dict[str, Any]:
        """`message` without null keys (as transformers has it), its content in a form that the template reads."""
        prepared = {key: value for key, value in message.items() if value is not None}
        reasoning = next((prepared[key] for key in _REASONING_KEYS if key in prepared), None)
        if reasoning is not None:
            prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
        content = prepared.get("content")
        if isinstance(content, list) and not self.takes_parts:
            prepared["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self.takes_parts and not self.takes_text:
            prepared["content"] = [{"type": "text", "text": content}]
        return prepared

    def _probe(self, content: str | list[dict[str, str]]) -> str:
        try:
            return self._template.render(
                messages=[{"role": "user", "content": content}],
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **self._special_tokens,
            )
        except _RENDER_ERRORS:
            return ""


def _words_of(error: Exception) -> str:
    return str(error)[:_MAX_WORDS] or type(error).__name__


def _check_unicode(text: str) -> None:
    """A template can write a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatTemplateError(f"it renders text that is not Unicode: {error.reason}") from None


def _cut_at_end(text: str, final: str) -> str:
    """`text` up to the end tag; where the template trimmed what stood before it, so is the text."""
    tag = _END_TAG.strip()
    if final.strip() not in text or tag not in text:
        raise ChatTemplateError("it drops the end of the final message, which can't be continued then")
    end = text.rindex(tag)
    is_kept = text.startswith(_END_TAG, end)
    return text[:end] if is_kept else text[:end].rstrip()


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's text for training; here only the text counts.

    A call block, as in transformers, so that what is set inside stays inside.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(lineno)
        return block

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _DictFactory:
    """The global `dict` of a template: makes dicts, and gives no way to the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore attributes, a known way out of the sandbox."""

    # The odd signature is jinja2's own: `namespace(self=...)` must work.
    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r} on a namespace")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _DictFactory()
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
