"""One request's output: token ids in, deltas of text out, ended by its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.text.detokenizer import Detokenizer
from server.text.stop import StopMatcher


@dataclass(slots=True, frozen=True)
class Delta:
    """What one engine event adds to the answer. `finish_reason` is set on the last one."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string, or the client's stop id, that ended it


class OutputText:
    """The text of one answer. An eos or stop id is counted but has no text; a stop string is cut off."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int = 0) -> None:
        """Stop strings are not looked for in what the first `min_tokens` tokens say."""
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops) if stops else None
        self._num_unchecked = min_tokens

    def feed(self, token_ids: list[int], finish_reason: str | None = None, stop_token_id: int | None = None) -> Delta:
        """The delta of one engine event. After a stop string, the rest of the event is dropped."""
        shown = token_ids[:-1] if finish_reason == "stop" else token_ids
        if self._stops is None:
            text = self._detokenizer.feed(shown)
            if finish_reason is not None:
                text += self._detokenizer.flush()
            return Delta(text, token_ids, finish_reason, stop_token_id)
        return self._feed_checked(self._stops, token_ids, len(shown), finish_reason, stop_token_id)

    def _feed_checked(
        self,
        stops: StopMatcher,
        token_ids: list[int],
        num_shown: int,
        finish_reason: str | None,
        stop_token_id: int | None,
    ) -> Delta:
        text = ""
        for index in range(num_shown):
            piece = self._detokenizer.feed(token_ids[index : index + 1])
            if self._num_unchecked > 0:
                self._num_unchecked -= 1
                text += piece
                continue
            text += stops.feed(piece)
            if stops.matched is not None:
                return Delta(text, token_ids[: index + 1], "stop", stops.matched)
        if finish_reason is None:
            return Delta(text, token_ids)
        text += stops.feed(self._detokenizer.flush())
        if stops.matched is not None:
            return Delta(text, token_ids, "stop", stops.matched)
        return Delta(text + stops.flush(), token_ids, finish_reason, stop_token_id)
