"""What came of a request: its tokens with a stamp each, or an error. Read from the wire's bytes after the run."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from loadtest.wire import Exchange

_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_MAX_MESSAGE = 200
_Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(slots=True)
class Outcome:
    """Times by `time.perf_counter`. An outcome with an `error` has no part in any latency."""

    index: int  # of the request
    adapter: int | None
    max_tokens: int
    due: float
    begun: float  # when connecting began: later than due where the generator or its bound was
    ended: float
    connect_s: float = 0.0
    status: int = 0  # 0: there was no answer
    error: str = ""
    stamps: list[float] = field(default_factory=list)  # one a token, when the client had it
    num_events: int = 0  # those with tokens
    prompt_tokens: int | None = None  # as the server counts them
    output_tokens: int = 0  # as the server counts them, where it does
    text: str = ""

    @property
    def ttft_s(self) -> float | None:
        """From when the request was due to its first token."""
        return self.stamps[0] - self.due if self.stamps else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first."""
        if len(self.stamps) < 2 or self.output_tokens < 2:
            return None
        return (self.stamps[-1] - self.stamps[0]) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Gaps between tokens; those that came in one event have gaps of 0, as the client saw it."""
        return [after - before for before, after in itertools.pairwise(self.stamps)]

    @property
    def e2el_s(self) -> float:
        """From when the request was due to the last byte."""
        return self.ended - self.due


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class _Timings(msgspec.Struct):
    predicted_n: _Count | None = None  # llama.cpp: tokens so far


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: object = None


_decode_event = msgspec.json.Decoder(_Event).decode


def read_outcome(done: Exchange, outcome: Outcome) -> Outcome:
    """Fill `outcome` from what arrived. Never raises for what a server sent: `error` says it."""
    body = _Body(done)
    outcome.status = body.status
    if body.status == 200:
        _read_events(body, outcome)
    elif body.status:
        outcome.error = _message(body.data)
    if done.failure:
        outcome.error = done.failure
    elif not body.status:
        outcome.error = "the connection ended without an answer"
    return outcome


def _read_events(body: _Body, outcome: Outcome) -> None:
    texts: list[str] = []
    total, is_whole = None, False
    for stamp, kind, data in body.events():
        if data == b"[DONE]":
            is_whole = True
            continue
        try:
            event = _decode_event(data)
        except msgspec.DecodeError as error:
            outcome.error = f"an event is not what it should be: {error}"[:_MAX_MESSAGE]
            return
        if event.error is not None or kind == b"error":
            outcome.error = _message(data)
            return
        text = "".join(_text(choice) for choice in event.choices)
        texts.append(text)
        num_tokens = _num_tokens(event, bool(text), len(outcome.stamps))
        outcome.stamps += [stamp] * num_tokens
        outcome.num_events += num_tokens > 0
        if event.usage is not None:
            total = event.usage.completion_tokens
            outcome.prompt_tokens = event.usage.prompt_tokens
        is_whole |= any(choice.finish_reason for choice in event.choices)
    outcome.text = "".join(texts)
    outcome.output_tokens = len(outcome.stamps) if total is None else total
    if not is_whole:
        outcome.error = _message(body.data) if _is_error(body.data) else "the stream ended before its end"
    elif outcome.max_tokens and not outcome.output_tokens:
        outcome.error = "the stream ended without a token"


def _num_tokens(event: _Event, has_text: bool, so_far: int) -> int:
    """By the best that the event says: a running count, the ids, and failing that one for a piece of text."""
    if event.timings is not None and event.timings.predicted_n is not None:
        return max(0, event.timings.predicted_n - so_far)
    ids = [choice.token_ids for choice in event.choices if choice.token_ids is not None]
    if ids:
        return sum(map(len, ids))
    if event.usage is not None and event.usage.completion_tokens is not None and has_text:
        return max(0, event.usage.completion_tokens - so_far)
    return int(has_text)


def _text(choice: _Choice) -> str:
    if choice.delta is not None:
        return (choice.delta.reasoning_content or "") + (choice.delta.content or "")
    return choice.text or ""


def _is_error(data: bytes) -> bool:
    """An error's body, without any stream, under status 200."""
    try:
        return _decode_event(data).error is not None
    except msgspec.DecodeError:
        return False


def _message(data: bytes) -> str:
    """The message of an error's body, in any of its common forms; else the body's beginning."""
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return data[:_MAX_MESSAGE].decode("utf-8", "replace").strip() or "an empty body"
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:_MAX_MESSAGE]


class _Body:
    """An answer taken apart: status, body without its chunking, and when each of its bytes arrived."""

    def __init__(self, done: Exchange) -> None:
        raw = b"".join(data for _, data in done.parts)
        self._stamps = [stamp for stamp, _ in done.parts]
        self._part_ends: list[int] = []  # offsets in `raw`
        for _, data in done.parts:
            self._part_ends.append(len(data) + (self._part_ends[-1] if self._part_ends else 0))
        head, _, body = raw.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        self.status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        self._starts: list[tuple[int, int]] = [(0, len(raw) - len(body))]  # (offset in `data`, offset in `raw`)
        self.data = body
        if b"\ntransfer-encoding: chunked" in head.lower():
            self.data = self._unchunk(raw, len(raw) - len(body))

    def events(self) -> Iterator[tuple[float, bytes, bytes]]:
        """(when its last byte arrived, field, value) of each server-sent event."""
        position = 0
        for end in _BLANK_LINE.finditer(self.data):
            lines = self.data[position : end.start()].splitlines()
            position = end.end()
            for kind in (b"data", b"error"):
                values = [line[len(kind) + 1 :].strip() for line in lines if line.startswith(kind + b":")]
                if values:
                    yield self._arrival(end.end() - 1), kind, b"\n".join(values)

    def _arrival(self, offset: int) -> float:
        start, raw_start = self._starts[bisect.bisect_right(self._starts, (offset, 1 << 62)) - 1]
        return self._stamps[bisect.bisect_right(self._part_ends, raw_start + offset - start)]

    def _unchunk(self, raw: bytes, position: int) -> bytes:
        pieces: list[bytes] = []
        self._starts, length = [], 0
        while (line_end := raw.find(b"\r\n", position)) >= 0:
            try:
                size = int(raw[position:line_end].partition(b";")[0], 16)
            except ValueError:
                break
            if size == 0:
                break
            begin = line_end + 2
            pieces.append(raw[begin : begin + size])
            self._starts.append((length, begin))
            length += len(pieces[-1])
            position = begin + size + 2
        self._starts = self._starts or [(0, position)]
        return b"".join(pieces)
