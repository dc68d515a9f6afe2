"""The chat template that an adapter brings along, read with bounds and from exactly the files of its version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters_store.raw import RawFolder
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources.folder import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, FileChanged
from adapters_store.sources.local import LocalSource

MAX_BYTES = {TEMPLATE_FILE: 1 << 20, TOKENIZER_CONFIG_FILE: 16 << 20}  # a config may declare very many tokens
MAX_FIELD_BYTES = 1 << 20  # of a config's fields that are read here, together
MAX_COLONS = 1 << 19  # at least as many as a config has fields: bounds what decoding it costs
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True, slots=True)
class AdapterTemplate:
    """An adapter's own chat template."""

    adapter: str
    file: str
    """the file that it stands in"""
    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """those that the adapter's tokenizer_config.json names, e.g. {"eos_token": "<|im_end|>"}; empty: the base's hold"""

    @property
    def where(self) -> str:
        """Its place, as errors name it."""
        return f"{self.file} of adapter {self.adapter}"


def check_template_sizes(version: SourceVersion) -> None:
    """AdapterTooLarge when a file that may hold a template is too large to be read."""
    for file in version.files:
        limit = MAX_BYTES.get(file.name)
        if limit is not None and file.size > limit:
            raise AdapterTooLarge(f"{file.name} of adapter {version.name} has {file.size} bytes; the limit is {limit}")


def read_chat_template(version: SourceVersion, fetched: RawFolder | None = None) -> AdapterTemplate | None:
    """The template in chat_template.jinja, else in tokenizer_config.json; None without any. Blocking.

    `fetched` is where a remote version's files are. Raises AdapterInvalid and AdapterTooLarge, which name the
    file, and AdapterUnavailable when the file is no longer the version's, of which RawDamaged when it is not as
    it was fetched.
    """
    check_template_sizes(version)
    files = {file.name: file for file in version.files}
    own = _read(version, files[TEMPLATE_FILE], fetched) if TEMPLATE_FILE in files else None
    config = _read(version, files[TOKENIZER_CONFIG_FILE], fetched) if TOKENIZER_CONFIG_FILE in files else None
    where = f"{TOKENIZER_CONFIG_FILE} of adapter {version.name}"
    try:
        fields = _fields(config, where) if config is not None else {}
        source = template_of_config(fields) if own is None else None
        tokens = {name: token_text(value) for name, value in named_tokens(fields)[0].items()}
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise AdapterInvalid(f"{where}: {error}") from error
    if own is not None:
        return AdapterTemplate(version.name, TEMPLATE_FILE, _text(version, own), tokens)
    return None if source is None else AdapterTemplate(version.name, TOKENIZER_CONFIG_FILE, source, tokens)


def template_of_config(config: Mapping[str, Any]) -> str | None:
    """A tokenizer_config.json's template; of several named ones, "default". ValueError for another form."""
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise ValueError("a list of chat templates needs a name and a template in each entry") from None
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template is no text")
    return template


def named_tokens(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The tokens of a tokenizer_config.json with a name that templates see, and the nameless special ones.

    Names are bos_token and the like, a model's own *_token, and those of extra_special_tokens.
    """
    extra: Any = next((config[name] for name in _EXTRA_TOKENS if config.get(name)), [])
    named = {name: config[name] for name in NAMED_TOKENS if config.get(name) is not None}
    own = {
        name: value
        for name, value in config.items()
        if name.endswith("_token") and name not in named and isinstance(value, str | dict)
    }
    if isinstance(extra, dict):
        return {**named, **own, **extra}, []
    return {**named, **own}, list(extra)


def token_text(value: object) -> str:
    """The text of a token declared as text or as an object with "content". ValueError for another form."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError("a special token must be a text, or an object whose content is one")
    return text


def _read(version: SourceVersion, file: FileVersion, fetched: RawFolder | None) -> memoryview:
    if fetched is not None:
        content = fetched.read(version, file)
        fetched.check(version, {file.name: hashlib.sha256(content).hexdigest()})
        return content
    try:
        return LocalSource(Path(version.source)).read(version, file)
    except FileChanged:
        raise AdapterUnavailable(f"{file.name} of adapter {version.name} is being replaced; try again") from None


def _text(version: SourceVersion, content: memoryview) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        raise AdapterInvalid(f"{TEMPLATE_FILE} of adapter {version.name}: {error}") from error


def _fields(content: memoryview, where: str) -> dict[str, Any]:
    """The fields that matter here. All others, which may be huge, are only skipped over."""
    if (num_colons := bytes(content).count(b":")) > MAX_COLONS:
        raise AdapterTooLarge(f"{where} has {num_colons} colons, so about as many fields; the limit is {MAX_COLONS}")
    raw = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    wanted = {name: value for name, value in raw.items() if name == "chat_template" or _names_tokens(name, value)}
    num_bytes = sum(len(value) for value in wanted.values())
    if num_bytes > MAX_FIELD_BYTES:
        raise AdapterTooLarge(
            f"{where}: its chat template and special tokens have {num_bytes} bytes; the limit is {MAX_FIELD_BYTES}"
        )
    return {name: msgspec.json.decode(value) for name, value in wanted.items()}


def _names_tokens(name: str, value: msgspec.Raw) -> bool:
    """Whether the field gives tokens names; a list of nameless ones does not, and may be long."""
    return name.endswith("_token") or (name in _EXTRA_TOKENS and bytes(value).startswith(b"{"))
