"""Whether the engine's requests get on: an engine that speaks may still be stuck."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.engine.messages import StepOutputs


class Progress:
    """Told of every message of the engine; counts a step that had rows, an output, and nothing to run as progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_running = False
        self._rows_total: float = 0
        self._progress_s = clock()

    def take(self, message: StepOutputs) -> None:
        """What the engine said now."""
        stats = message.stats
        was_running, self._is_running = self._is_running, stats.num_running > 0
        if message.outputs or stats.rows_total != self._rows_total or not (was_running and self._is_running):
            self._rows_total = stats.rows_total
            self._progress_s = self._clock()

    @property
    def stuck_s(self) -> float:
        """Seconds that requests have been running without a step that ended; 0 when none runs."""
        return self._clock() - self._progress_s if self._is_running else 0.0
