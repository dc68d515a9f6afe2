"""Log lines to a pipe that may be slow: who logs never waits for who reads."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading
import time

import msgspec

MAX_QUEUED_LINES = 8192  # about 4 MiB; further ones are dropped, and counted
MAX_LINES_AT_ONCE = 128  # of one write
CLOSE_S = 1.0  # how long the end of the process waits for a reader


class LineWriter(logging.Handler):
    """Writes each record's message as a line to a file descriptor, on a thread of its own.

    When lines were dropped because nobody read, one line of JSON says how many, as soon as somebody does. A
    pipe that is closed by its reader ends the writing for good.
    """

    def __init__(self, descriptor: int, max_lines: int = MAX_QUEUED_LINES) -> None:
        super().__init__()
        self.num_dropped = 0  # since the last line that said so
        self._descriptor = descriptor  # not a buffered stream: its lock, held in a write, would abort the exit
        self._is_closed = False  # the end was taken from the queue
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(f"{record.getMessage()}\n")
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most CLOSE_S."""
        deadline_s = time.monotonic() + CLOSE_S
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_S)
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
        super().close()

    def _run(self) -> None:
        """Thread: write until close(), or until nobody reads any more."""
        with contextlib.suppress(OSError):  # the reader has gone
            while (lines := self._take()) is not None:
                self._write(f"{lines}{self._dropped()}".encode())

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # whoever made the pipe set it so
                waiter = select.poll()
                waiter.register(self._descriptor, select.POLLOUT)
                waiter.poll()

    def _take(self) -> str | None:
        """The next lines, at least one; None when there will be no more."""
        lines: list[str] = []
        while not self._is_closed and len(lines) < MAX_LINES_AT_ONCE and not (lines and self._lines.empty()):
            line = self._lines.get()
            if line is None:
                self._is_closed = True
            else:
                lines.append(line)
        return "".join(lines) or None

    def _dropped(self) -> str:
        """The line that says how many were dropped; empty when none was."""
        if not self.num_dropped:
            return ""
        self.acquire()  # handle() holds it around emit()
        num_dropped, self.num_dropped = self.num_dropped, 0
        self.release()
        return msgspec.json.encode({"time": round(time.time(), 3), "dropped_lines": num_dropped}).decode() + "\n"
