"""Logprobs as the clients read them: OpenAI's two forms, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from server.api.choices import Scored
from server.engine.messages import TokenLogprobs
from server.text.pieces import Pieces

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's number for "very unlikely"
SLICE = 128  # tokens encoded at once: the encoder holds up all threads, whichever it runs in


class LogprobsFormat:
    """Writes the logprobs of one request; `num_top` bounds the alternatives of each token."""

    def __init__(self, pieces: Pieces, *, is_chat: bool, num_top: int, as_ids: bool) -> None:
        """`as_ids`: tokens are written as "token_id:<id>", since several ids may have one text."""
        self._pieces = pieces
        self._is_chat = is_chat
        self._num_top = num_top
        self._as_ids = as_ids

    def write(self, scored: Sequence[Scored]) -> dict[str, object]:
        """The `logprobs` of a choice, or of a chunk of one; long lists are encoded already."""
        if len(scored) <= SLICE:
            return self._write(scored)
        lists: dict[str, list[bytes]] = {}
        others: dict[str, object] = {}
        for start in range(0, len(scored), SLICE):
            for name, value in self._write(scored[start : start + SLICE]).items():
                if isinstance(value, list):
                    lists.setdefault(name, []).append(_items(value))
                else:
                    others[name] = value
        return {name: _array(items) for name, items in lists.items()} | others

    def _write(self, scored: Sequence[Scored]) -> dict[str, object]:
        if self._is_chat:
            return {"content": [self._chat_token(token) for token in scored], "refusal": None}
        return {
            "tokens": [self._text(token.token_id) for token in scored],
            "token_logprobs": [None if token.logprobs is None else _finite(token.logprobs.logprob) for token in scored],
            "top_logprobs": [None if token.logprobs is None else self._top_by_text(token.logprobs) for token in scored],
            "text_offset": [token.offset for token in scored],
        }

    def _chat_token(self, token: Scored) -> dict[str, object]:
        assert token.logprobs is not None, "chats echo no prompt"
        return {
            **self._entry(token.token_id, token.logprobs.logprob),
            "top_logprobs": [self._entry(*top) for top in token.logprobs.top[: self._num_top]],
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._pieces.bytes_of(token_id)),
        }

    def _top_by_text(self, row: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the chosen one; of two with the same text, the likelier."""
        by_text: dict[str, float] = {}
        for token_id, logprob in [*row.top[: self._num_top], (row.token_id, row.logprob)]:
            text = self._text(token_id)
            by_text[text] = max(by_text.get(text, MIN_LOGPROB), _finite(logprob))
        return by_text

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._pieces.text_of(token_id)


def prompt_logprobs(rows: Sequence[TokenLogprobs], num_top: int, pieces: Pieces) -> msgspec.Raw:
    """vLLM's `prompt_logprobs`: null for the first token, then {id: {logprob, rank, decoded_token}} for each."""

    def slices() -> Iterator[bytes]:
        for start in range(0, len(rows), SLICE):
            yield _items([_ranked(row, num_top, pieces) for row in rows[start : start + SLICE]])

    return _array([b"null", *slices()])


def _ranked(row: TokenLogprobs, num_top: int, pieces: Pieces) -> dict[str, object]:
    ranks = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(row.top[:num_top], 1)}
    return {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": pieces.text_of(token_id)}
        for token_id, (logprob, rank) in ({row.token_id: (row.logprob, row.rank)} | ranks).items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _items(values: list[object]) -> bytes:
    """`values` as in a JSON array, without its brackets."""
    return msgspec.json.encode(values)[1:-1]


def _array(items: list[bytes]) -> msgspec.Raw:
    """The JSON array of what _items() gave."""
    return msgspec.Raw(b"[" + b",".join(items) + b"]")
