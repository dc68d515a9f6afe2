"""The base's tokenizer over `tokenizers` alone: what transformers' AutoTokenizer gives, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from adapters_store.chat_template import AdapterTemplate, named_tokens, template_of_config, token_text
from adapters_store.cpus import available_cpus
from adapters_store.sources.folder import TEMPLATE_FILE
from server.config import default_cache_dir
from server.errors import BadRequest, ConfigError, ContextLengthExceeded
from server.text.bytelevel import ByteLevelDetokenizer, byte_tables
from server.text.convert import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, ensure_tokenizer, read_json_object
from server.text.detokenizer import Detokenizer
from server.text.output import AnyDetokenizer
from server.text.pieces import Pieces
from server.text.render_worker import RenderJob
from server.text.renderer import TemplateRenderer, TextTooLong
from server.text.templates import OWN_VARIABLES, ChatTemplate, ChatTemplateError, Message

MAX_INLINE_CHARS = 1024  # longer texts encode in a thread; so many take about a millisecond
MAX_INLINE_CHAT_CHARS = 1 << 16  # longer chats render in a thread
MESSAGE_CHARS = 128  # what a message costs beside its text, in characters
MAX_RENDERED_CHARS = 8 << 20


class BaseTokenizer:
    """Encodes prompts, decodes outputs, renders chats. Any thread may use it; encode_chat is one event loop's.

    Read from a tokenizer.json (see convert.py for which): its post-processor says what `add_special_tokens`
    adds, as in transformers, which ignores add_bos_token of the config beside such a file. The
    tokenizer_config.json adds tokens that the file lacks, names the special ones, and may hold the template.
    """

    def __init__(self, model_dir: Path, cache_dir: Path | None = None) -> None:
        """Load from the base's folder, or from a converted copy under `cache_dir`, made once where it is needed.

        Raises ConfigError when the folder has no usable tokenizer or chat template.
        """
        folder = ensure_tokenizer(model_dir, cache_dir or default_cache_dir())
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # the only class that tokenizers raises here
            raise ConfigError(f"{folder / TOKENIZER_FILE} can't be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_config(folder)
        try:
            self.special_tokens = _add_tokens(self._tokenizer, config)  # e.g. {"bos_token": "<s>"}, for templates
        except ValueError as error:
            raise ConfigError(f"{folder / TOKENIZER_CONFIG_FILE}: {error}") from error
        self.num_tokens: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        self._run_ids = _run_ids(self._tokenizer)
        self._byte_tables = byte_tables(self._tokenizer)
        self.pieces = Pieces(self._tokenizer)
        self.chat_template = _base_template(folder, config, self.special_tokens)
        self._threads = ThreadPoolExecutor(available_cpus(), thread_name_prefix="tokenizer")
        self._renderer = TemplateRenderer()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens written in the text become their ids."""
        # The batch call lets go of the GIL and skips offsets, which nobody reads; encode() does neither.
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded[0].ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """`encode`, off the event loop when `text` is long; no more at a time than there are processors."""
        if len(text) <= MAX_INLINE_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        encode = partial(self.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        continue_final_message: bool = False,
        template: AdapterTemplate | None = None,
        kwargs: Mapping[str, Any] | None = None,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> list[int]:
        """Token ids of a chat. Raises BadRequest in the template's words when it refuses the messages.

        template: an adapter's own, in place of the base's; rendered in a process of its own, see renderer.py
        for the errors. kwargs: extra variables of the template (chat_template_kwargs). max_chars: of the
        rendered text, which is refused with ContextLengthExceeded when it is longer.
        """
        if taken := sorted(OWN_VARIABLES.intersection(kwargs or ())):
            raise BadRequest(f"'chat_template_kwargs' may not set {taken[0]!r}", param="chat_template_kwargs")
        if continue_final_message and add_generation_prompt:
            raise BadRequest(
                "'continue_final_message' goes with 'add_generation_prompt' false: the final message is not over",
                param="continue_final_message",
            )
        job = RenderJob(
            source="" if template is None else template.source,
            special_tokens=self._tokens_of(template),
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=dict(kwargs or {}),
            max_chars=min(max_chars, MAX_RENDERED_CHARS),
        )
        try:
            if template is None:
                text = await self._render_base(job)
            else:
                text = await self._renderer.render(template.adapter, template.where, job)
        except ChatTemplateError as error:
            raise BadRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        except TextTooLong as error:
            raise ContextLengthExceeded(
                f"The chat template makes {error.num_chars} characters of these messages, above the "
                f"{job.max_chars} that this server tokenizes. Please reduce the length of the messages.",
                param="messages",
            ) from None
        return await self.encode_async(text, add_special_tokens=add_special_tokens)

    async def _render_base(self, job: RenderJob) -> str:
        """The base's own template, the operator's, needs no process; a long chat renders off the event loop."""
        if self.chat_template is None:
            raise BadRequest("The base model has no chat template: use /v1/completions", param="messages")
        render = partial(
            self.chat_template.render,
            job.messages,
            add_generation_prompt=job.add_generation_prompt,
            continue_final_message=job.continue_final_message,
            variables=job.variables,
        )
        if _num_chars(job.messages) <= MAX_INLINE_CHAT_CHARS:
            text = render()
        else:
            text = await asyncio.get_running_loop().run_in_executor(self._threads, render)
        if len(text) > job.max_chars:
            raise TextTooLong(len(text))
        return text

    def _tokens_of(self, template: AdapterTemplate | None) -> dict[str, str]:
        """What the template sees: an adapter whose tokenizer_config.json names tokens has only those."""
        return dict(template.special_tokens) if template and template.special_tokens else self.special_tokens

    async def close(self) -> None:
        """End the process that renders adapters' templates."""
        await self._renderer.close()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> AnyDetokenizer:
        """A fresh incremental decoder; `context` are the prompt's ids where the output continues its text."""
        if self._byte_tables:
            return ByteLevelDetokenizer(self._byte_tables[skip_special_tokens])
        return Detokenizer(self._tokenizer, self._run_ids, context, skip_special_tokens=skip_special_tokens)


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json laid over it where old files need that."""
    config = read_json_object(folder / TOKENIZER_CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config.update(read_json_object(folder / "special_tokens_map.json"))
    return config


def _add_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """Add what the config declares and the file lacks, in transformers' order. Returns the named special tokens.

    A token that the config gives by its text alone takes the properties it was declared with elsewhere.
    """
    declared = sorted((int(index), _added_token(token)) for index, token in _declared(config))
    known = {str(token.content): token for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for _, token in declared if repr(token) != repr(known.get(token.content))])
    known.update({token.content: token for _, token in declared})
    named, extra = named_tokens(config)
    special = [_special(value, known) for value in [*named.values(), *extra]]
    tokenizer.add_special_tokens(special)
    return {name: token_text(value) for name, value in named.items()}


def _declared(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    decoder = config.get("added_tokens_decoder") or {}
    return list(decoder.items())


def _special(value: str | dict[str, Any], known: dict[str, AddedToken]) -> AddedToken:
    content = token_text(value)
    if content in known:
        return known[content]
    return _added_token(value) if isinstance(value, dict) else AddedToken(value, special=True, normalized=False)


def _added_token(fields: dict[str, Any]) -> AddedToken:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: fields[name] for name in names if name in fields})


def _run_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that can stand in a run of byte-fallback tokens: the bytes, and ids without text. Empty if there are none."""
    if tokenizer.decoder is None or b"ByteFallback" not in tokenizer.decoder.__getstate__():
        return frozenset()
    texts = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    byte_ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    run_ids = {index for index in byte_ids if index is not None}
    run_ids |= {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return frozenset(run_ids | {index for index in range(max(texts, default=0)) if index not in texts})


def _base_template(folder: Path, config: dict[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """From chat_template.jinja, else the config (of several named ones, "default"); None without any.

    Raises ConfigError, which names the file.
    """
    path = folder / TEMPLATE_FILE
    try:
        if path.is_file():
            source: str | None = path.read_text(encoding="utf-8")
        else:
            path = folder / TOKENIZER_CONFIG_FILE
            source = template_of_config(config)
        return None if source is None else ChatTemplate(source, special_tokens)
    except (ChatTemplateError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _num_chars(messages: Sequence[Message]) -> int:
    """About what rendering costs, in characters of text."""
    contents = (message.get("content") or "" for message in messages)
    texts = (content if isinstance(content, str) else "".join(part["text"] for part in content) for content in contents)
    return sum(MESSAGE_CHARS + len(text) for text in texts)
