"""Whether the engine's requests get on, by a clock that the test sets."""

from __future__ import annotations

import pytest

from server.engine.messages import RequestOutput, StepOutputs, StepStats
from server.engine.progress import Progress


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def said(*, running: int, rows: int, outputs: int = 0) -> StepOutputs:
    stats = StepStats(num_running=running, rows_total=rows)
    return StepOutputs(outputs=[RequestOutput(request_id=str(i)) for i in range(outputs)], stats=stats)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock) -> Progress:
    return Progress(clock)


def test_heartbeats_without_a_step_are_no_progress(clock, progress):
    progress.take(said(running=2, rows=10))
    for _ in range(90):
        clock.now_s += 1
        progress.take(said(running=2, rows=10))
    assert progress.stuck_s == 90


@pytest.mark.parametrize("message", [said(running=2, rows=11), said(running=2, rows=10, outputs=1)])
def test_a_step_or_an_output_is_progress(clock, progress, message):
    progress.take(said(running=2, rows=10))
    clock.now_s += 90
    progress.take(message)
    assert progress.stuck_s == 0
    clock.now_s += 5
    assert progress.stuck_s == 5


def test_nothing_to_run_is_never_stuck(clock, progress):
    clock.now_s += 1000
    assert progress.stuck_s == 0
    progress.take(said(running=2, rows=10))
    clock.now_s += 90
    progress.take(said(running=0, rows=10))
    clock.now_s += 1000
    assert progress.stuck_s == 0
    progress.take(said(running=1, rows=10))  # the time without work does not count for who comes after it
    clock.now_s += 3
    assert progress.stuck_s == 3


def test_silence_while_requests_run_counts(clock, progress):
    progress.take(said(running=1, rows=10))
    clock.now_s += 70
    assert progress.stuck_s == 70
