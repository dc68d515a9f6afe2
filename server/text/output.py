"""One request's output: token ids in, deltas of text out, ended by its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from server.text.bytelevel import ByteLevelDetokenizer
from server.text.detokenizer import Detokenizer
from server.text.stop import StopMatcher

AnyDetokenizer = Detokenizer | ByteLevelDetokenizer


class Delta(msgspec.Struct, frozen=True):  # one is made for each event: a dataclass costs ten times as much
    """What one engine event adds to the answer. `finish_reason` is set on the last one."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string, or the client's stop id, that ended it
    offsets: list[int] = []  # if asked for: characters of the output before each token


@dataclass(slots=True, frozen=True, kw_only=True)
class TextOptions:
    """How an output becomes text."""

    stops: Sequence[str] = ()
    min_tokens: int = 0  # stop strings are not looked for in what so many tokens say
    keeps_stop: bool = False  # the stop string, or the text of a stop id, stays in the output
    has_offsets: bool = False


class OutputText:
    """The text of one answer. An eos or stop id is counted but has no text; a stop string is cut off."""

    def __init__(self, detokenizer: AnyDetokenizer, options: TextOptions) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(options.stops)
        self._num_unchecked = options.min_tokens
        self._keeps_stop = options.keeps_stop
        self._is_stepwise = options.has_offsets or bool(options.stops)
        self._num_chars = 0  # of all tokens so far, also of what is held back or cut

    @property
    def plain_feed(self) -> Callable[[Sequence[int]], str] | None:
        """As feed() of an event that does not end the answer, the text alone; None where that takes more."""
        return None if self._is_stepwise else self._detokenizer.feed

    def feed(self, token_ids: list[int], finish_reason: str | None = None, stop_token_id: int | None = None) -> Delta:
        """The delta of one engine event. After a stop string, the rest of the event is dropped."""
        shown = token_ids[:-1] if finish_reason == "stop" and not self._keeps_stop else token_ids
        if self._is_stepwise:
            return self._feed_stepwise(token_ids, len(shown), finish_reason, stop_token_id)
        text = self._detokenizer.feed(shown)
        if finish_reason is not None:
            text += self._detokenizer.flush()
        return Delta(text, token_ids, finish_reason, stop_token_id)

    def _feed_stepwise(
        self, token_ids: list[int], num_shown: int, finish_reason: str | None, stop_token_id: int | None
    ) -> Delta:
        text = ""
        offsets: list[int] = []
        for index, token_id in enumerate(token_ids):
            offsets.append(self._num_chars)
            if index == num_shown:
                break
            piece = self._detokenizer.feed([token_id])
            self._num_chars += len(piece)
            if self._num_unchecked > 0:
                self._num_unchecked -= 1
                text += piece
                continue
            text += self._stops.feed(piece)
            if self._stops.matched is not None:
                return self._matched(text, token_ids[: index + 1], offsets)
        if finish_reason is None:
            return Delta(text, token_ids, offsets=offsets)
        text += self._stops.feed(self._detokenizer.flush())
        if self._stops.matched is not None:
            return self._matched(text, token_ids, offsets)
        return Delta(text + self._stops.flush(), token_ids, finish_reason, stop_token_id, offsets)

    def _matched(self, text: str, token_ids: list[int], offsets: list[int]) -> Delta:
        stop = self._stops.matched or ""
        return Delta(text + stop if self._keeps_stop else text, token_ids, "stop", stop, offsets)
