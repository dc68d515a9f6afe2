"""Stop strings over streamed text: found across any borders, matched text cut, nothing shown too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feeds text through all stop strings of one request.

        fed so far   ...could this be the en|d of it
        shown        ...could this be the|
        held                              [ en]   longest tail that may still become a stop string

    The stop string that completes first ends the text (of two that complete together, the longer one), so the
    result never depends on how the text was cut into deltas. Each string is matched by its failure table
    (Knuth-Morris-Pratt): constant work per character and string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings; with none, everything passes through."""
        self._stops = [(stop, _failure_table(stop)) for stop in sorted(set(stops), key=len, reverse=True)]
        self._matched = [0] * len(self._stops)  # characters of each string matched by the end of the text
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a match, nothing more comes."""
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        buffer = self._held + text
        start = len(self._held)
        for offset, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                self.matched = stop
                self._held = ""
                return buffer[: start + offset + 1 - len(stop)]
        num_held = max(self._matched)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def flush(self) -> str:
        """The held text, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for index, (stop, table) in enumerate(self._stops):
            count = self._matched[index]
            while count and stop[count] != char:
                count = table[count - 1]
            if stop[count] == char:
                count += 1
            if count == len(stop):
                return stop  # longest first, so this is the longest that ends here
            self._matched[index] = count
        return found


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is again a prefix."""
    table = [0] * len(pattern)
    count = 0
    for index in range(1, len(pattern)):
        while count and pattern[index] != pattern[count]:
            count = table[count - 1]
        if pattern[index] == pattern[count]:
            count += 1
        table[index] = count
    return table
