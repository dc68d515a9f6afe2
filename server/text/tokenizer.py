"""The base's tokenizer over `tokenizers` alone: what transformers' AutoTokenizer gives, without torch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from adapters_store.chat_template import template_of_config
from adapters_store.sources.folder import TEMPLATE_FILE
from server.config import available_cpus, default_cache_dir
from server.errors import BadRequest, ConfigError
from server.text.convert import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, ensure_tokenizer, read_json_object
from server.text.detokenizer import Detokenizer
from server.text.pieces import Pieces
from server.text.templates import OWN_VARIABLES, ChatTemplate, ChatTemplateError, Message

MAX_INLINE_CHARS = 1024  # longer texts encode in a thread; so many take about a millisecond
MAX_TEMPLATES = 64  # adapters' own, kept compiled
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
        self.special_tokens = _add_tokens(self._tokenizer, config)  # e.g. {"bos_token": "<s>"}, for templates
        self.num_tokens: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        self._run_ids = _run_ids(self._tokenizer)
        self.pieces = Pieces(self._tokenizer)
        try:
            source = _template_source(folder, config)
            self.chat_template = None if source is None else ChatTemplate(source, self.special_tokens)
        except (ChatTemplateError, ValueError) as error:
            raise ConfigError(f"{folder}: {error}") from error
        self._threads = ThreadPoolExecutor(available_cpus(), thread_name_prefix="tokenizer")
        self._adapter_templates: OrderedDict[str, ChatTemplate] = OrderedDict()  # by source, most recently used last

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
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat. Raises BadRequest in the template's words when it refuses the messages.

        template: the source of an adapter's own template, in place of the base's; rendered off the event
        loop. kwargs: extra variables of the template (chat_template_kwargs).
        """
        if taken := sorted(OWN_VARIABLES.intersection(kwargs or ())):
            raise BadRequest(f"'chat_template_kwargs' may not set {taken[0]!r}", param="chat_template_kwargs")
        if continue_final_message and add_generation_prompt:
            raise BadRequest(
                "'continue_final_message' goes with 'add_generation_prompt' false: the final message is not over",
                param="continue_final_message",
            )
        chosen = self.chat_template if template is None else await self._adapter_template(template)
        if chosen is None:
            raise BadRequest("The base model has no chat template: use /v1/completions", param="messages")

        def render() -> str:
            return chosen.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=kwargs,
            )

        try:
            text = render() if template is None else await asyncio.to_thread(render)
        except ChatTemplateError as error:
            raise BadRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        return await self.encode_async(text, add_special_tokens=add_special_tokens)

    async def _adapter_template(self, source: str) -> ChatTemplate:
        """An adapter's template, compiled once. Raises BadRequest when it does not compile."""
        compiled = self._adapter_templates.get(source)
        if compiled is None:
            try:
                compiled = await asyncio.to_thread(ChatTemplate, source, self.special_tokens)
            except ChatTemplateError as error:
                raise BadRequest(
                    f"The adapter's own template (chat_template.jinja or tokenizer_config.json): {error}", param="model"
                ) from error
            self._adapter_templates[source] = compiled
            while len(self._adapter_templates) > MAX_TEMPLATES:
                self._adapter_templates.popitem(last=False)
        self._adapter_templates.move_to_end(source)
        return compiled

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder; `context` are the prompt's ids where the output continues its text."""
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
    named, extra = _named_tokens(config)
    special = [_special(value, known) for value in [*named.values(), *extra]]
    tokenizer.add_special_tokens(special)
    return {name: _content(value) for name, value in named.items()}


def _declared(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    decoder = config.get("added_tokens_decoder") or {}
    return list(decoder.items())


def _named_tokens(config: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The tokens with a name that templates see (bos_token, ..., and a model's own *_token), and the nameless."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {name: config[name] for name in _NAMED_TOKENS if config.get(name) is not None}
    own = {
        name: value
        for name, value in config.items()
        if name.endswith("_token") and name not in named and isinstance(value, str | dict)
    }
    if isinstance(extra, dict):
        return {**named, **own, **extra}, []
    return {**named, **own}, list(extra)


def _special(value: str | dict[str, Any], known: dict[str, AddedToken]) -> AddedToken:
    content = _content(value)
    if content in known:
        return known[content]
    return _added_token(value) if isinstance(value, dict) else AddedToken(value, special=True, normalized=False)


def _content(value: str | dict[str, Any]) -> str:
    return str(value["content"]) if isinstance(value, dict) else value


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


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the config's (of several named ones, "default"); None without any."""
    path = folder / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else template_of_config(config)
