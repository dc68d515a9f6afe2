"""Stop strings: found wherever the text is cut, cut off, and never shown in part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stop import StopMatcher


def first_end(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: the text up to the stop string that completes first (the longest, of those), by brute force."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def fed(stops: list[str], pieces: list[str]) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    shown.append(matcher.flush())
    return "".join(shown), matcher.matched, shown


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "matched"),
    [
        (["END"], ["abc E", "N", "D more"], "abc ", "END"),
        (["END"], ["abc EN", "d"], "abc ENd", None),
        (["aab"], ["aa", "a", "b"], "a", "aab"),  # the failure table: the first a is not part of the match
        (["abc", "b"], ["abc"], "a", "b"),  # what completes first, however the text is cut
        (["abc", "b"], ["a", "b", "c"], "a", "b"),
        (["ab", "b"], ["xab"], "x", "ab"),  # both complete at once: the longer one
        (["\n\n"], ["line\n", "\nmore"], "line", "\n\n"),
        (["🙂"], ["ok 🙂 ja"], "ok ", "🙂"),
        (["stop"], ["st", "st", "sto", "pping"], "ststo"[:4], "stop"),
    ],
)
def test_examples(stops, pieces, shown, matched):
    assert fed(stops, pieces)[:2] == (shown, matched)


letters = st.text(alphabet="ab", max_size=12)


@given(
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    pieces=st.lists(letters, max_size=8),
)
def test_any_cut_of_the_text_gives_the_same(stops, pieces):
    text = "".join(pieces)
    shown, matched, steps = fed(stops, pieces)
    assert (shown, matched) == first_end(text, stops)
    # at no time was a part of the stop string shown, and no more was held than a prefix of one
    so_far = ""
    for index, step in enumerate(steps[:-1]):
        so_far += step
        assert shown.startswith(so_far)
        if matched is None:
            held = "".join(pieces[: index + 1])[len(so_far) :]
            assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_a_match():
    matcher = StopMatcher(["x"])
    assert matcher.feed("axb") == "a"
    assert matcher.feed("more x") == ""
    assert matcher.flush() == ""
    assert matcher.matched == "x"
