"""Token ids to text, as they come: joined, the pieces are the decode of the whole, and no character is split."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

NUM_CONTEXT_TOKENS = 6  # enough for a decoder to know that the text goes on


class Detokenizer:
    """The output text of one request; special tokens are skipped unless `skip_special_tokens` is false.

    Two things are held back until the next token (or the end) decides them: bytes that are not yet a whole
    character, and a run of byte-fallback tokens. The decoder judges such a run as one: an invalid byte
    turns all of it into U+FFFD, also what looked like a character before. `run_ids` are the ids that can
    be in such a run: the byte tokens, and tokens without text, over which a run goes on.

    `context` are the prompt's ids where the text continues the prompt's (a completion): its first word keeps
    the space that a decoder of the SentencePiece kind takes from the start of a text. A context that ends
    within a character is not used: the output's own bytes would be joined to it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        run_ids: frozenset[int],
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._run_ids = run_ids
        self._ids = list(context[-NUM_CONTEXT_TOKENS:])
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or (self._ids and self._ids[-1] in run_ids):
            self._ids, text = [], ""
        self._stream = DecodeStream(ids=list(self._ids), skip_special_tokens=skip_special_tokens)
        self._num_chars = len(text)  # characters of the context and of what was given out
        self._num_stepped = len(self._ids)  # ids that the stream has seen
        self._is_pending = False  # the stream holds ids whose text is not given out

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` make certain; may be empty."""
        self._ids.extend(token_ids)
        end = len(self._ids)
        while end > self._num_stepped and self._ids[end - 1] in self._run_ids:
            end -= 1
        if end == self._num_stepped:
            return ""
        text: str | None = self._stream.step(self._tokenizer, self._ids[self._num_stepped : end])
        self._num_stepped = end
        self._is_pending = text is None
        self._num_chars += len(text or "")
        return text or ""

    def flush(self) -> str:
        """The rest, when no more tokens will come: an unfinished character shows as U+FFFD, as in a full decode."""
        if not self._is_pending and self._num_stepped == len(self._ids):
            return ""
        text = self._decode(self._ids)[self._num_chars :]
        self._num_stepped, self._is_pending = len(self._ids), False
        self._num_chars += len(text)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips_special)
