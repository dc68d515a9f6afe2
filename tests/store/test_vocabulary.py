"""The vocabulary digest against the tokenizers library, for both shapes of a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from adapters_store.errors import AdapterCorrupt
from adapters_store.vocabulary import read_vocabulary, vocabulary_digest

MODELS = {
    "bpe": lambda: BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    "word": lambda: WordLevel({"a": 0, "ü": 1, "<unk>": 2}, unk_token="<unk>"),
    "unigram": lambda: Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0),
}


def saved(path: Path, kind: str, added: tuple[str, ...] = ()) -> Path:
    tokenizer = Tokenizer(MODELS[kind]())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_reads_what_tokenizers_has(kind, tmp_path):
    path = saved(tmp_path / "t.json", kind, ("<s>", "<tool>"))
    assert dict(read_vocabulary(path.read_bytes())) == Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_vocabulary_matters(kind, tmp_path):
    path = saved(tmp_path / "t.json", kind, ("<s>",))
    digest = vocabulary_digest(path)
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    if isinstance(content["model"]["vocab"], dict):
        content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    path.write_text(json.dumps(content))
    assert vocabulary_digest(path) == digest
    assert vocabulary_digest(saved(tmp_path / "u.json", kind, ("<t>",))) != digest
    assert vocabulary_digest(saved(tmp_path / "v.json", kind)) != digest


def test_ids_matter(tmp_path):
    path = saved(tmp_path / "t.json", "bpe")
    digest = vocabulary_digest(path)
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {"a": 1, "b": 0, "ab": 2}
    path.write_text(json.dumps(content))
    assert vocabulary_digest(path) != digest


@pytest.mark.parametrize("text", ["", "{}", '{"model": {}}', '{"model": {"vocab": {"a": "x"}}}', "[" * 50_000])
def test_what_is_no_tokenizer(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(AdapterCorrupt, match=r"tokenizer\.json"):
        vocabulary_digest(tmp_path / "tokenizer.json")
