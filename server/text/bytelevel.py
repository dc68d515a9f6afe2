"""Token ids to text, as they come, for byte-level vocabularies (GPT-2's kind): a table and a UTF-8 decoder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from server.text.pieces import byte_of_char


class ByteTable(dict[int, bytes]):
    """Each token id's bytes, as the tokenizer's decoder takes them; none for ids that it leaves out. Filled on use."""

    def __init__(self, tokenizer: Tokenizer, *, skips_special: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._bytes = byte_of_char()
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = frozenset(index for index, token in added.items() if skips_special and token.special)

    def __missing__(self, token_id: int) -> bytes:
        entry = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        try:
            data = b"".join(self._bytes[char] for char in entry or "")
        except KeyError:  # one character that stands for no byte, and the decoder takes the entry as it is written
            data = (entry or "").encode()
        self[token_id] = data
        return data


def byte_tables(tokenizer: Tokenizer) -> dict[bool, ByteTable]:
    """The table by whether special tokens are skipped. Empty unless the decoder joins bytes and does nothing else."""
    if tokenizer.decoder is None or json.loads(tokenizer.decoder.__getstate__())["type"] != "ByteLevel":
        return {}
    return {skips: ByteTable(tokenizer, skips_special=skips) for skips in (True, False)}


class ByteLevelDetokenizer:
    """The output text of one request, as text.detokenizer.Detokenizer gives it, at a fraction of the cost.

    Only bytes that are not yet a whole character are held back. A prompt before the output changes nothing.
    """

    __slots__ = ("_pending", "_table")

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._pending = b""  # the beginning of a character

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` make certain; may be empty."""
        table = self._table
        data = self._pending + (
            table[token_ids[0]] if len(token_ids) == 1 else b"".join([table[token_id] for token_id in token_ids])
        )
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return text

    def flush(self) -> str:
        """The rest, when no more tokens will come: an unfinished character shows as U+FFFD, as in a full decode."""
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text
