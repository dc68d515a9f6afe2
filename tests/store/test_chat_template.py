"""What is read of an adapter's own chat template and special tokens: as transformers would, and with bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from adapters_store import catalog as catalog_module
from adapters_store.catalog import Catalog
from adapters_store.chat_template import (
    MAX_COLONS,
    MAX_FIELD_BYTES,
    AdapterTemplate,
    named_tokens,
    read_chat_template,
    template_of_config,
    token_text,
)
from adapters_store.errors import AdapterInvalid, AdapterTooLarge
from adapters_store.sources.local import LocalSource
from server.text.templates import ChatTemplate

TEMPLATE = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ messages[0].content }}"
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    return add(tmp_path, "fr")


def add(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 8)
    return folder


def configure(folder: Path, **fields: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def read(folder: Path) -> AdapterTemplate | None:
    version = LocalSource(folder.parent).resolve(folder.name)
    assert version is not None
    return read_chat_template(version)


@pytest.mark.parametrize(
    "tokens",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        {"eos_token": {"__type": "AddedToken", "content": "<e>", "lstrip": False, "normalized": False}},
        {"eos_token": "<e>", "image_token": "[img]", "add_bos_token": True},
        {"eos_token": "<e>", "extra_special_tokens": {"image_token": "[img]"}},
        {"eos_token": "<e>", "extra_special_tokens": ["<a>", "<b>"]},
        {"eos_token": "<e>", "additional_special_tokens": ["<a>"]},
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_the_template_sees_what_the_folders_own_tokenizer_would_give_it(folder, tokens, in_file):
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    configure(
        folder, tokenizer_class="PreTrainedTokenizerFast", **tokens, **({} if in_file else {"chat_template": TEMPLATE})
    )
    if in_file:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    found = read(folder)
    theirs = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(CHAT, tokenize=False)
    assert ChatTemplate(found.source, found.special_tokens).render(CHAT) == theirs
    assert found.where == f"{'chat_template.jinja' if in_file else 'tokenizer_config.json'} of adapter fr"


def test_no_tokens_and_no_template(folder):
    assert read(folder) is None
    configure(folder, eos_token="<e>")
    assert read(folder) is None
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("x")
    assert read(folder) == AdapterTemplate("fr", "chat_template.jinja", "x", {})


@pytest.mark.parametrize(
    "fields",
    [
        {"bos_token": 7},
        {"eos_token": {"content": 7}},
        {"eos_token": {}},
        {"extra_special_tokens": {"x_token": [1]}},
    ],
)
def test_a_token_that_is_no_text_is_named(folder, fields):
    configure(folder, **fields)
    (folder / "chat_template.jinja").write_text("x")
    with pytest.raises(AdapterInvalid, match=r"^tokenizer_config\.json of adapter fr: a special token"):
        read(folder)


def test_a_large_vocabulary_is_skipped_over(folder):
    decoder = {str(index): {"content": f"<extra_{index}>", "special": True} for index in range(50_000)}
    names = [f"<extra_{index}>" for index in range(50_000)]
    configure(folder, chat_template="x", eos_token="<e>", added_tokens_decoder=decoder, extra_special_tokens=names)
    assert (folder / "tokenizer_config.json").stat().st_size > 2 * MAX_FIELD_BYTES
    found = read(folder)
    assert (found.source, found.special_tokens) == ("x", {"eos_token": "<e>"})


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"x": dict.fromkeys(map(str, range(MAX_COLONS + 1)), 0)}, MAX_COLONS),
        ({"chat_template": "x", "a_token": "y" * MAX_FIELD_BYTES}, MAX_FIELD_BYTES),
        ({"chat_template": [{"name": str(i), "template": "x" * 999} for i in range(1100)]}, MAX_FIELD_BYTES),
        ({"extra_special_tokens": {f"t{i}_token": "y" * 999 for i in range(1100)}}, MAX_FIELD_BYTES),
    ],
)
def test_what_is_decoded_is_bounded(folder, fields, limit):
    configure(folder, **fields)
    with pytest.raises(AdapterTooLarge, match=rf"^tokenizer_config\.json of adapter fr.*the limit is {limit}$"):
        read(folder)


def test_the_same_fields_of_a_whole_config():
    """As the base's config is read: decoded at once."""
    config = {"bos_token": "<s>", "my_token": {"content": "m"}, "extra_special_tokens": ["a", "b"], "add_bos_token": 1}
    named, nameless = named_tokens(config)
    assert {name: token_text(value) for name, value in named.items()} == {"bos_token": "<s>", "my_token": "m"}
    assert nameless == ["a", "b"]
    assert template_of_config({"chat_template": {"default": "d"}}) == "d"


async def test_the_catalog_remembers_a_bounded_number_of_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "MAX_TEMPLATE_CHARS", 25)
    for name in ("a", "b", "c"):
        (add(tmp_path, name) / "chat_template.jinja").write_text(name * 10)
    catalog = Catalog([LocalSource(tmp_path)], [])
    for name in ("a", "b", "c", "a", "b", "b"):
        found = await catalog.chat_template(await catalog.resolve(name))
        assert found.source == name * 10
        remembered = [template.source for template in catalog._templates.values()]
        assert sum(map(len, remembered)) == catalog._template_chars <= 25
    assert remembered == ["a" * 10, "b" * 10]
