"""Incremental decoding equals the decode of the whole, for byte-level and for byte-fallback vocabularies."""

from __future__ import annotations

import copy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from server.text.bytelevel import ByteLevelDetokenizer, byte_tables
from server.text.detokenizer import NUM_CONTEXT_TOKENS, Detokenizer
from server.text.output import OutputText, TextOptions

WORDS = ["▁hello", "▁world", "he", "llo", "▁", "好", "x"]
BYTE = 3  # id of <0x00> in the byte-fallback vocabulary
YOU = [BYTE + byte for byte in "你".encode()]


def byte_fallback() -> Tokenizer:
    """As of Llama 2: SentencePiece words, single bytes for the rest."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": BYTE + byte for byte in range(256)}
    vocab |= {word: BYTE + 256 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def byte_level() -> Tokenizer:
    """As of GPT-2, Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world 你好 日本語のテスト 🙂🙃 Wörterbuch" * 3], trainer)
    return tokenizer


FALLBACK, LEVEL = byte_fallback(), byte_level()
RUN_IDS = frozenset(range(BYTE + 256))


def incremental(tokenizer, run_ids, ids, context=(), per_event=1) -> list[str]:
    detokenizer = Detokenizer(tokenizer, run_ids, context)
    pieces = [detokenizer.feed(ids[start : start + per_event]) for start in range(0, len(ids), per_event)]
    return [*pieces, detokenizer.flush()]


fallback_ids = st.lists(st.one_of(st.sampled_from(YOU), st.integers(0, FALLBACK.get_vocab_size() - 1)), max_size=16)
level_ids = st.lists(st.integers(0, LEVEL.get_vocab_size() - 1), max_size=16)


@given(fallback_ids, st.integers(1, 4))
@example([*YOU, BYTE + 0xFF], 1)  # an invalid byte takes back the character before it
@example([BYTE + 0x68, 1, BYTE + 0xFF], 1)  # also across a special token
def test_byte_fallback(ids, per_event):
    got = "".join(incremental(FALLBACK, RUN_IDS, ids, per_event=per_event))
    assert got == FALLBACK.decode(ids, skip_special_tokens=True)


@given(level_ids, st.integers(1, 4))
def test_byte_level(ids, per_event):
    got = "".join(incremental(LEVEL, frozenset(), ids, per_event=per_event))
    assert got == LEVEL.decode(ids, skip_special_tokens=True)


@settings(max_examples=50)
@given(st.text(max_size=12))
def test_real_text_is_never_shown_broken(text):
    ids = LEVEL.encode(text).ids
    pieces = incremental(LEVEL, frozenset(), ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(level_ids, level_ids)
def test_a_context_changes_nothing_for_byte_level(context, ids):
    expected = LEVEL.decode(ids, skip_special_tokens=True)
    assert "".join(incremental(LEVEL, frozenset(), ids, context)) == expected


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ([], "hello world"),  # SentencePiece's decoder takes the first space of a text
        ([BYTE + 256 + 6], " hello world"),  # but this is no first word
        ([1, BYTE + 256 + 6] * NUM_CONTEXT_TOKENS, " hello world"),
        (YOU[:2], "hello world"),  # a context that ends within a character is not used
    ],
)
def test_a_completion_keeps_its_first_space(context, expected):
    ids = [BYTE + 256, BYTE + 256 + 1]
    assert "".join(incremental(FALLBACK, RUN_IDS, ids, context)) == expected


def test_ids_beyond_the_tokenizer_have_no_text():
    """A model's head may be padded beyond the vocabulary."""
    ids = LEVEL.encode("hello").ids
    assert "".join(incremental(LEVEL, frozenset(), [ids[0], 100_000, *ids[1:]])) == "hello"


def output(stops=(), min_tokens=0) -> OutputText:
    return OutputText(Detokenizer(LEVEL, frozenset()), TextOptions(stops=stops, min_tokens=min_tokens))


def test_an_eos_has_no_text_even_if_it_is_an_ordinary_token():
    ids = LEVEL.encode("hello world").ids
    delta = output().feed(ids, "stop", ids[-1])
    assert delta.text == LEVEL.decode(ids[:-1])
    assert delta.token_ids == ids
    assert (delta.finish_reason, delta.stop_reason) == ("stop", ids[-1])


def test_a_length_end_keeps_the_last_token_and_shows_an_unfinished_character():
    ids = LEVEL.encode("🙂").ids
    assert len(ids) > 1 or "\ufffd" in LEVEL.decode(LEVEL.encode("🙈").ids[:1])
    ids = LEVEL.encode("🙈").ids
    delta = output().feed(ids[:-1], "length")
    assert delta.text == LEVEL.decode(ids[:-1])


def test_a_stop_string_drops_the_rest_of_the_event():
    ids = LEVEL.encode("one. two. three.").ids
    delta = output([". t"]).feed(ids)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("one", "stop", ". t")
    assert LEVEL.decode(delta.token_ids).startswith("one. t")
    assert len(delta.token_ids) < len(ids)


def test_a_stop_string_completed_by_what_was_held_back():
    """The last character comes with the flush: bytes that no later token completed."""
    ids = LEVEL.encode("x🙈").ids[:-1]
    text = output(["\ufffd"])
    delta = text.feed(ids, "length")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("x", "stop", "\ufffd")


def test_min_tokens_come_before_stop_strings():
    ids = LEVEL.encode("a. b. c. d").ids
    num_first = next(n for n in range(1, len(ids)) if "." in LEVEL.decode(ids[:n]))
    early = output(["."], min_tokens=0).feed(ids, "length")
    late = output(["."], min_tokens=num_first).feed(ids, "length")
    assert early.text == "a"
    assert late.text == "a. b"


def test_held_text_comes_with_the_end():
    delta = output(["world!"]).feed(LEVEL.encode("hello world").ids, "length")
    assert (delta.text, delta.finish_reason) == ("hello world", "length")


def odd_byte_level() -> Tokenizer:
    """With tokens that no training makes: characters that stand for no byte, added ones, special ones."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>", "é", "日本", "a b", "\u0120x"])
    tokenizer.add_special_tokens(["<s>", "<é>"])
    return tokenizer


ODD = odd_byte_level()
ODD_TABLES = byte_tables(ODD)
odd_ids = st.lists(
    st.one_of(st.integers(0, ODD.get_vocab_size() + 3), st.integers(LEVEL.get_vocab_size(), ODD.get_vocab_size())),
    max_size=24,
)


@settings(max_examples=400)
@given(odd_ids, st.lists(st.integers(1, 4), min_size=24, max_size=24), st.booleans())
def test_the_table_decodes_as_the_tokenizer_does_at_every_length(ids, sizes, skips_special):
    """For every prefix: what was given out, and the flush, are the decode of the whole."""
    detokenizer = ByteLevelDetokenizer(ODD_TABLES[skips_special])
    given_out, start = "", 0
    for size in sizes:
        given_out += detokenizer.feed(ids[start : start + size])
        start += size
        flushed = copy.copy(detokenizer).flush()
        assert given_out + flushed == ODD.decode(ids[:start], skip_special_tokens=skips_special)
    assert given_out + detokenizer.flush() == ODD.decode(ids, skip_special_tokens=skips_special)
    assert detokenizer.flush() == ""


@settings(max_examples=200)
@given(st.text(max_size=12))
def test_the_table_never_shows_real_text_broken(text):
    detokenizer = ByteLevelDetokenizer(ODD_TABLES[True])
    pieces = [detokenizer.feed([token_id]) for token_id in LEVEL.encode(text).ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


def test_only_a_plain_byte_level_decoder_has_tables():
    assert not byte_tables(FALLBACK)
    assert set(ODD_TABLES) == {True, False}
