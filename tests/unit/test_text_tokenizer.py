"""The torch-free tokenizer gives what AutoTokenizer gives, for each way a base can declare its tokens."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from server.demo import ensure_demo_base
from server.errors import BadRequest, ConfigError
from server.text import convert
from server.text.tokenizer import MAX_INLINE_CHARS, BaseTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "Wörterbuch 日本語 🙂", "def f(x): return x + 1"]
TEXTS = [
    "the quick brown fox",
    " leading and trailing ",
    "<s>special</s> <|im_start|>in text<|im_end|>",
    "Ünïcode 日本語 🙂 \t tabs\n\nand lines",
    "<tool>x</tool> <extra_0> <added> [img]",
    "a",
    "",
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox <|im_end|>"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(*, bos: bool = False, fallback: bool = False) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if fallback else None, byte_fallback=fallback))
    alphabet: list[str] = []
    if fallback:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def plain(**config) -> dict:
    return {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, **config}


def declared(content: str, **fields) -> dict:
    defaults = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    return {"content": content, **defaults, **fields}


# name: (tokenizer, tokenizer_config.json, other files)
BASES = {
    "plain": (trained(), plain(), {}),
    "bos-in-post-processor": (trained(bos=True), plain(), {}),
    # beside a tokenizer.json, transformers takes the post-processor's word, not the config's
    "bos-in-config": (trained(), plain(add_bos_token=True, add_eos_token=True), {}),
    "no-bos-in-config": (trained(bos=True), plain(add_bos_token=False), {}),
    "special-not-in-file": (trained(), plain(eos_token="<end-of-text>", pad_token="<pad>"), {}),
    "added-tokens-decoder": (
        trained(),
        plain(
            added_tokens_decoder={
                "9000": declared("<added>"),
                "9001": declared("<tool>", special=True, lstrip=True, rstrip=True),
                "3": declared("<|im_start|>", special=True),
            }
        ),
        {},
    ),
    "extra-special-list": (trained(), plain(extra_special_tokens=["<extra_0>", "<tool>"]), {}),
    "additional-special-list": (trained(), plain(additional_special_tokens=["<extra_0>"]), {}),
    "extra-special-names": (trained(), plain(extra_special_tokens={"image_token": "[img]"}), {}),
    "own-named-token": (trained(), plain(image_token="[img]"), {}),
    "special-tokens-map": (
        trained(),
        {"chat_template": TEMPLATE},
        {"special_tokens_map.json": {"bos_token": declared("<s>"), "eos_token": "<|im_end|>"}},
    ),
    "token-as-object": (
        trained(),
        plain(bos_token={"__type": "AddedToken", **declared("<tool>", lstrip=True)}),
        {},
    ),
    "byte-fallback": (trained(fallback=True, bos=True), plain(unk_token="<unk>"), {}),
    "template-in-list": (
        trained(),
        plain(chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]),
        {},
    ),
}


def write_base(
    folder: Path,
    name: str,
    tokenizer_class: str | None = "PreTrainedTokenizerFast",
    model_type: str = "llama",
) -> Path:
    tokenizer, config, files = BASES[name]
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for file_name, content in files.items():
        (folder / file_name).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with_class = {**config, "tokenizer_class": tokenizer_class} if tokenizer_class else config
    (folder / "tokenizer_config.json").write_text(json.dumps(with_class))
    return folder


@pytest.fixture(params=BASES)
def pair(request, tmp_path):
    folder = write_base(tmp_path / "base", request.param)
    return BaseTokenizer(folder), AutoTokenizer.from_pretrained(str(folder))


def test_parity_of_encoding(pair):
    ours, theirs = pair
    assert ours.num_tokens == len(theirs)
    for text in TEXTS:
        for add_special_tokens in (True, False):
            expected = theirs(text, add_special_tokens=add_special_tokens)["input_ids"]
            assert ours.encode(text, add_special_tokens=add_special_tokens) == expected, text


def test_parity_of_decoding(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        expected = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == expected
        detokenizer = ours.detokenizer()
        assert "".join(detokenizer.feed([token_id]) for token_id in ids) + detokenizer.flush() == expected


def test_parity_of_special_tokens_and_chats(pair):
    ours, theirs = pair
    assert ours.special_tokens == theirs.special_tokens_map
    for add_generation_prompt in (True, False):
        expected = theirs.apply_chat_template(
            CHAT, add_generation_prompt=add_generation_prompt, return_dict=False, tokenize=True
        )
        got = asyncio.run(ours.encode_chat(CHAT, add_generation_prompt=add_generation_prompt, add_special_tokens=False))
        assert got == expected


def test_the_demo_base():
    folder = ensure_demo_base()
    ours, theirs = BaseTokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "Hi 🙂"}, {"role": "assistant", "content": "x"}, CHAT[1]]
    for messages in (CHAT, chat):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        got = asyncio.run(ours.encode_chat(messages, add_generation_prompt=True, add_special_tokens=False))
        assert got == expected


@pytest.mark.parametrize(
    ("base", "tokenizer_class", "model_type"),
    [
        ("byte-fallback", "LlamaTokenizer", "llama"),
        ("byte-fallback", "GemmaTokenizer", "gemma3_text"),
        ("plain", "Qwen2Tokenizer", "qwen3"),
        ("plain", "PreTrainedTokenizerFast", "qwen2"),
        ("plain", None, "llama"),
    ],
)
def test_parity_of_classes_that_transformers_builds_itself(tmp_path, monkeypatch, base, tokenizer_class, model_type):
    """Read as it is, such a file gives other ids for some texts; so it goes through transformers once."""
    folder = write_base(tmp_path / "base", base, tokenizer_class=tokenizer_class, model_type=model_type)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    # in this process, which has transformers anyway; the child is tested below
    monkeypatch.setattr(convert, "_convert_in_child", lambda source, target: convert.main(str(source), str(target)))
    ours = BaseTokenizer(folder, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tokenizers"]
    for text in TEXTS:
        for add_special_tokens in (True, False):
            expected = theirs(text, add_special_tokens=add_special_tokens)["input_ids"]
            assert ours.encode(text, add_special_tokens=add_special_tokens) == expected, text
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map


def test_a_file_that_transformers_cannot_load_is_used_as_it_is(tmp_path, monkeypatch, caplog):
    def fail(source: Path, target: Path) -> None:
        raise convert._ConversionFailed("needs remote code")

    monkeypatch.setattr(convert, "_convert_in_child", fail)
    folder = write_base(tmp_path / "base", "plain", tokenizer_class="CustomTokenizer")
    assert BaseTokenizer(folder, tmp_path / "cache").encode("the", add_special_tokens=False)
    assert "needs remote code" in caplog.text


def test_a_template_file_wins(tmp_path):
    folder = write_base(tmp_path, "plain")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert AutoTokenizer.from_pretrained(str(folder)).chat_template == "{{ messages[0].content }}"
    assert BaseTokenizer(folder).chat_template.render(CHAT) == "Be brief."


def test_no_template(tmp_path):
    folder = write_base(tmp_path, "plain")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    ours = BaseTokenizer(folder)
    assert ours.chat_template is None
    with pytest.raises(BadRequest, match="no chat template") as caught:
        asyncio.run(ours.encode_chat(CHAT, add_generation_prompt=True, add_special_tokens=False))
    assert caught.value.param == "messages"


def test_a_template_that_refuses(tmp_path):
    folder = write_base(tmp_path, "plain")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(BadRequest, match="no system role"):
        asyncio.run(BaseTokenizer(folder).encode_chat(CHAT, add_generation_prompt=True, add_special_tokens=False))


def test_truncation_and_padding_in_the_file_are_not_ours(tmp_path):
    folder = write_base(tmp_path, "plain")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = BaseTokenizer(folder).encode(CORPUS[0], add_special_tokens=False)
    assert BaseTokenizer(folder).decode(ids) == CORPUS[0]


async def test_a_long_text_encodes_off_the_loop(tmp_path):
    ours = BaseTokenizer(write_base(tmp_path, "plain"))
    text = CORPUS[0] * 3000
    assert len(text) > MAX_INLINE_CHARS
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    ids = await ours.encode_async(text, add_special_tokens=False)
    ticker.cancel()
    assert ids == ours.encode(text, add_special_tokens=False)
    assert ticks > 5  # the loop went on meanwhile


def test_a_base_without_tokenizer_json_is_converted_once(tmp_path, monkeypatch):
    """vocab.json and merges.txt, as of GPT-2."""
    folder, cache = tmp_path / "base", tmp_path / "cache"
    folder.mkdir()
    trained().model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "chat_template": TEMPLATE})
    )
    ours = BaseTokenizer(folder, cache)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
    assert ours.chat_template is not None
    monkeypatch.setattr(convert, "_convert_in_child", lambda *_: pytest.fail("converted again"))
    BaseTokenizer(folder, cache)
    assert not (folder / "tokenizer.json").exists()  # the base's folder is never written to


def test_nothing_to_convert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no vocabulary to make one from"):
        BaseTokenizer(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("file_name", "content", "words"),
    [
        ("tokenizer.json", "{", "can't be read"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "TokenizersBackend", "chat_template": "{% for %}"}',
            "not compile",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend", "bos_token": {"content": 7}}', "a text"),
        ("chat_template.jinja", "{% for %}", "does not compile"),
        ("chat_template.jinja", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "does not compile"),
    ],
)
def test_broken_files(tmp_path, file_name, content, words):
    folder = write_base(tmp_path, "plain")
    (folder / file_name).write_text(content)
    with pytest.raises(ConfigError, match=words) as raised:
        BaseTokenizer(folder)
    assert str(raised.value).startswith(f"{folder / file_name}")


def test_the_oracle_reads_what_we_wrote(tmp_path):
    """A guard for the parity tests: they would prove nothing if the added tokens never came into play."""
    folder = write_base(tmp_path, "added-tokens-decoder")
    with_added = BaseTokenizer(folder).encode("<added>", add_special_tokens=False)
    shutil.rmtree(folder)
    without = BaseTokenizer(write_base(tmp_path, "plain")).encode("<added>", add_special_tokens=False)
    assert len(with_added) == 1 < len(without)
    assert AddedToken("<added>") is not None
