"""The vocabulary of a tokenizer.json as a digest: two tokenizers are compared without loading either."""

from __future__ import annotations

import hashlib
from operator import itemgetter
from pathlib import Path

import msgspec

from adapters_store.errors import AdapterCorrupt, AdapterError, AdapterMismatch
from adapters_store.manifest import BaseManifest
from adapters_store.tensorfile import shown

TOKENIZER_FILE = "tokenizer.json"
ADDED_TOKENS_FILE = "added_tokens.json"


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] | None = None


def read_vocabulary(content: bytes | memoryview, file: str = TOKENIZER_FILE) -> set[tuple[str, int]]:
    """All (token, id) of a tokenizer.json, added tokens too. In a Unigram vocabulary ids are positions."""
    try:
        tokenizer = msgspec.json.decode(content, type=_Tokenizer)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        raise AdapterCorrupt(f"{file} is not a tokenizer: {error}") from error
    vocab = tokenizer.model.vocab
    if isinstance(vocab, dict):
        tokens = set(vocab.items())
    else:
        tokens = {(token, position) for position, (token, _) in enumerate(vocab)}
    return tokens | {(added.content, added.id) for added in tokenizer.added_tokens or ()}


def digest_vocabulary(tokens: set[tuple[str, int]]) -> str:
    """sha256 over the (token, id) pairs as JSON, by id and token."""
    return hashlib.sha256(msgspec.json.encode(sorted(tokens, key=itemgetter(1, 0)))).hexdigest()


def vocabulary_digest(tokenizer_json: Path) -> str:
    """The digest of a tokenizer.json's vocabulary; `BaseManifest.tokenizer_digest` holds the base's."""
    return digest_vocabulary(read_vocabulary(tokenizer_json.read_bytes(), tokenizer_json.name))


def check_vocabulary(
    files: dict[str, memoryview], manifest: BaseManifest, problems: list[AdapterError], warnings: list[str]
) -> None:
    """Compare the vocabulary an adapter brings with the base's. Adapters without a tokenizer pass."""
    try:
        tokens = read_vocabulary(files[TOKENIZER_FILE]) if TOKENIZER_FILE in files else None
        added = _read_added(files[ADDED_TOKENS_FILE]) if ADDED_TOKENS_FILE in files else {}
    except AdapterError as error:
        problems.append(error)
        return
    for token, number in added.items():
        if number >= manifest.vocab_size or (tokens is not None and (token, number) not in tokens):
            problems.append(
                AdapterMismatch(
                    f"{ADDED_TOKENS_FILE} adds token {shown(token)} as id {number}, "
                    f"which the base's vocabulary of {manifest.vocab_size} ids does not have"
                )
            )
            return
    if tokens is not None and manifest.tokenizer_digest == "":
        warnings.append(f"{TOKENIZER_FILE} was not compared: the base has no {TOKENIZER_FILE} of its own")
    elif tokens is not None and digest_vocabulary(tokens) != manifest.tokenizer_digest:
        problems.append(
            AdapterMismatch(
                f"{TOKENIZER_FILE} has another vocabulary ({len(tokens)} tokens) than the base "
                f"{manifest.name_or_path}: the adapter was trained on other token ids"
            )
        )


def _read_added(content: memoryview) -> dict[str, int]:
    try:
        return msgspec.json.decode(content, type=dict[str, int])
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        raise AdapterCorrupt(f"{ADDED_TOKENS_FILE} is not a map of token to id: {error}") from error
