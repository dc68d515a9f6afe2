"""What one token id says, on its own: its exact bytes, which may be a part of a character."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARK = "\u2581"  # SentencePiece's space


class Pieces:
    """Token ids to the bytes they add to a text, the space before a word included.

    Joined, the bytes of a text's tokens are the text in UTF-8, but for a space that a decoder of the
    SentencePiece kind takes from its start. The decoder says how a vocabulary entry is written:
    ByteLevel (one character for each byte), a byte token `<0xNN>`, or a mark for the space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else None
        steps = _steps(decoder)
        self._byte_of = byte_of_char() if "ByteLevel" in steps else {}
        self._has_mark = bool(steps & {"Metaspace", "Replace", "ByteFallback"})
        self._is_plain = decoder is None
        added = tokenizer.get_added_tokens_decoder()
        self._added = {index: str(token.content) for index, token in added.items()}
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of `token_id`; none for an id that the vocabulary lacks (padding of the embedding)."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._bytes(token_id)
        return known

    def text_of(self, token_id: int) -> str:
        """The same as text; bytes that are no whole character show as U+FFFD."""
        return self.bytes_of(token_id).decode(errors="replace")

    def raw(self, token_id: int) -> str:
        """The vocabulary's own entry; empty for an id that it lacks."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        entry = self.raw(token_id)
        if self._byte_of:
            # a character that stands for no byte: an entry put there by hand, taken as it is
            return b"".join(self._byte_of.get(char) or char.encode() for char in entry)
        if self._has_mark:
            byte = _BYTE_TOKEN.fullmatch(entry)
            return bytes([int(byte[1], 16)]) if byte else entry.replace(_MARK, " ").encode()
        if self._is_plain:
            return entry.encode()
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()


def _steps(decoder: dict[str, Any] | None) -> set[str]:
    """The kinds of decoder in a decoder's JSON."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_steps(part) for part in decoder.get("decoders", ())))


def byte_of_char() -> dict[str, bytes]:
    """ByteLevel's alphabet (GPT-2's): a printable byte is its own character, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    chars = {chr(byte): bytes([byte]) for byte in printable}
    return chars | {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}
