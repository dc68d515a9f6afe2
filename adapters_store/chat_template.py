"""The chat template that an adapter brings along, read with bounds and from exactly the files of its version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources.folder import TEMPLATE_FILE, TEMPLATE_FILES, TOKENIZER_CONFIG_FILE, FileChanged
from adapters_store.sources.local import LocalSource

MAX_BYTES = {TEMPLATE_FILE: 1 << 20, TOKENIZER_CONFIG_FILE: 16 << 20}  # a config may declare very many tokens


def read_chat_template(version: SourceVersion) -> str | None:
    """The template in chat_template.jinja, else in tokenizer_config.json; None without any. Blocking.

    Raises AdapterInvalid and AdapterTooLarge, which name the file, and AdapterUnavailable when the file is
    no longer the version's.
    """
    files = {file.name: file for file in version.files}
    for name in TEMPLATE_FILES:
        if name in files and (template := _template_of(version, files[name])) is not None:
            return template
    return None


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


def _template_of(version: SourceVersion, file: FileVersion) -> str | None:
    where = f"{file.name} of adapter {version.name}"
    if file.size > MAX_BYTES[file.name]:
        raise AdapterTooLarge(f"{where} has {file.size} bytes; the limit is {MAX_BYTES[file.name]}")
    try:
        content = LocalSource(Path(version.source)).read(version, file)
        if file.name == TEMPLATE_FILE:
            return str(content, "utf-8")
        template = template_of_config(msgspec.json.decode(content, type=dict[str, Any]))
    except FileChanged:
        raise AdapterUnavailable(f"{where} is being replaced; try again") from None
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise AdapterInvalid(f"{where}: {error}") from error
    if template is not None and len(template) > MAX_BYTES[TEMPLATE_FILE]:
        raise AdapterTooLarge(f"{where}: its chat template is longer than {MAX_BYTES[TEMPLATE_FILE]} characters")
    return template
