"""Counters by adapter, for those with the most tokens of late; of all others together as `other`."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, sub

from server.exposition import Labels, head, number, start_of

OTHER = "other"  # an adapter of that name has no series of its own
MAX_TOP = 1000  # places; far fewer than MAX_KNOWN
MAX_KNOWN = 4096  # adapters whose tokens of late are remembered; the least recently used go first
HALF_LIFE_S = 300.0  # what "of late" means
RANK_S = 60.0  # how often the places are given anew: longer than between two scrapes
MARGIN = 2.0  # who takes another's place has so many times its tokens of late

_FAMILIES = (
    ("requests_total", "counter", "Requests that ended (each choice is one).", "requests"),
    ("errors_total", "counter", "Those that ended with an error.", "errors"),
    ("prompt_tokens_total", "counter", "Prompt tokens of requests that started.", "prompt_tokens"),
    ("output_tokens_total", "counter", "Tokens generated.", "output_tokens"),
    ("loads_total", "counter", "Loads into device memory.", "loads"),
)
_COUNTS = (*(family[3] for family in _FAMILIES), "ttft_us", "num_started")
_counts_of: Callable[[Tally], tuple[int, ...]] = attrgetter(*_COUNTS)


class Tally:
    """One adapter's counters since it is known; and all adapters' in one, to which each also counts."""

    __slots__ = ("_all", "recent", "seen_tokens", *_COUNTS)

    def __init__(self, everyone: Tally | None = None) -> None:
        self._all = everyone
        self.requests = self.errors = self.prompt_tokens = self.output_tokens = self.loads = 0
        self.ttft_us = self.num_started = 0  # whole microseconds: their sums are exact in any order
        self.recent = 0.0  # tokens, each worth half after HALF_LIFE_S; as of the last ranking
        self.seen_tokens = 0  # how many are in `recent`

    def started(self, num_prompt: int, ttft_s: float) -> None:
        """A request's first output came."""
        self.prompt_tokens += num_prompt
        self.ttft_us += max(0, round(ttft_s * 1e6))
        self.num_started += 1
        if self._all is not None:
            self._all.started(num_prompt, ttft_s)

    def generated(self, count: int) -> None:
        """An output of so many tokens came."""
        self.output_tokens += count
        if self._all is not None:
            self._all.output_tokens += count

    def ended(self, *, is_error: bool) -> None:
        """A request ended."""
        self.requests += 1
        self.errors += is_error
        if self._all is not None:
            self._all.ended(is_error=is_error)

    def loaded(self) -> None:
        """Its image came to the device."""
        self.loads += 1
        if self._all is not None:
            self._all.loaded()


class _Place:
    """One adapter's series: what it counted since it has the place."""

    __slots__ = ("before", "lines", "tally")

    def __init__(self, tally: Tally, lines: Sequence[str]) -> None:
        self.tally = tally
        self.before = _counts_of(tally)  # this much of it is in `other`
        self.lines = lines

    def counts(self) -> tuple[int, ...]:
        return tuple(map(sub, _counts_of(self.tally), self.before))


class AdapterMetrics:
    """`top` places, given to adapters as they come and later, once a minute, to those that are used most.

    Whoever loses its place leaves what it counted to `other`, and begins at 0 if it gets one again. So all series
    together always are what all adapters counted, none ever goes back, and there are at most `top` + 1 at a time.
    """

    def __init__(self, top: int, labels: Labels, clock: Callable[[], float] = time.monotonic) -> None:
        self._top = top
        self._labels = labels
        self._clock = clock
        self._all = Tally()
        self._known: OrderedDict[str, Tally] = OrderedDict()  # by use
        self._places: dict[str, _Place] = {}
        self._other_lines = self._lines(OTHER)
        self._ranked_at = clock()

    def of(self, name: str) -> Tally:
        """Where to count for the adapter of this name; good for one request."""
        tally = self._known.get(name)
        if tally is None:
            tally = self._known[name] = Tally(self._all)
            if len(self._places) < self._top:
                self._show(name)
            if len(self._known) > MAX_KNOWN:
                del self._known[next(known for known in self._known if known not in self._places)]
        self._known.move_to_end(name)
        return tally

    def text(self) -> Iterator[str]:
        """Their part of the exposition."""
        if self._clock() - self._ranked_at >= RANK_S:
            self._rank()
        rows = [(place.lines, place.counts()) for place in self._places.values()]
        shown = [sum(column) for column in zip(*(counts for _, counts in rows), strict=True)] or [0] * len(_COUNTS)
        rows.append((self._other_lines, tuple(map(sub, _counts_of(self._all), shown))))
        for index, (name, kind, about, _) in enumerate(_FAMILIES):
            yield head(f"multilora_by_adapter_{name}", kind, about)
            yield "".join([f"{lines[index]}{counts[index]}\n" for lines, counts in rows])
        yield head("multilora_by_adapter_ttft_seconds", "summary", "From arrival to the first token.")
        yield "".join([f"{lines[-2]}{number(counts[-2] / 1e6)}\n{lines[-1]}{counts[-1]}\n" for lines, counts in rows])

    def _rank(self) -> None:
        """Give the places of those used least of late to others that are used far more."""
        now = self._clock()
        kept = 0.5 ** ((now - self._ranked_at) / HALF_LIFE_S)
        self._ranked_at = now
        for tally in self._known.values():
            num_tokens = tally.prompt_tokens + tally.output_tokens
            tally.recent = tally.recent * kept + num_tokens - tally.seen_tokens
            tally.seen_tokens = num_tokens
        waiting = [name for name in self._known if name not in self._places and name != OTHER]
        best = heapq.nlargest(self._top, waiting, key=self._recent)
        for newcomer, holder in zip(best, sorted(self._places, key=self._recent), strict=False):
            if self._recent(newcomer) <= MARGIN * self._recent(holder):
                break
            del self._places[holder]
            self._show(newcomer)

    def _recent(self, name: str) -> float:
        return self._known[name].recent

    def _show(self, name: str) -> None:
        if name != OTHER:
            self._places[name] = _Place(self._known[name], self._lines(name))

    def _lines(self, name: str) -> list[str]:
        labels = {**self._labels, "adapter": name}
        names = [*(family[0] for family in _FAMILIES), "ttft_seconds_sum", "ttft_seconds_count"]
        return [start_of(f"multilora_by_adapter_{counter}", labels) for counter in names]
