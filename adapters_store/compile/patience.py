"""A bound on the time that an adapter's own regular expressions may take."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from adapters_store.errors import AdapterInvalid
from adapters_store.sources.folder import CONFIG_FILE

PATTERN_CPU_S = 2.0
"""for all patterns of one adapter over all modules of the base; honest ones take milliseconds"""


@contextmanager
def bounded_matching(seconds: float = PATTERN_CPU_S) -> Iterator[None]:
    """AdapterInvalid when the block takes longer, in CPU seconds; the main thread only.

    Some patterns backtrack for ever, and any tenant may bring one. `re` looks for signals while it
    matches, so a timer ends what no check of the pattern's text could foresee.
    """

    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise AdapterInvalid(
            f"{CONFIG_FILE}: its regular expressions (rank_pattern, alpha_pattern, target_modules, exclude_modules) "
            f"take longer than {seconds:g} s to match with the base's modules"
        )

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
