"""The access log's way out: in order, never blocking, and honest about what it dropped."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from server.api.line_writer import LineWriter

PIPE_BYTES = 1 << 16  # what a pipe takes before its writer waits
PADDING = "x" * 200


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue  # the test closed it


def log(writer: LineWriter, start: int, count: int) -> None:
    for index in range(start, start + count):
        message = json.dumps({"index": index, "padding": PADDING})
        writer.handle(logging.LogRecord("access", logging.INFO, "", 0, "%s", (message,), None))


class Reader:
    """The pipe's other end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self.lines: list[dict] = []

    def read_until(self, is_done) -> None:
        """Read lines until `is_done(self)`."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while not is_done(self):
            assert poll.poll(20_000), "nothing comes"
            piece = os.read(self._descriptor, PIPE_BYTES)
            assert piece, "the writing ended"
            *whole, self._rest = (self._rest + piece).split(b"\n")
            self.lines += map(json.loads, whole)

    @property
    def indices(self) -> list[int]:
        return [line["index"] for line in self.lines if "index" in line]

    @property
    def num_dropped(self) -> int:
        return sum(line.get("dropped_lines", 0) for line in self.lines)


def test_all_lines_in_order(pipe):
    reader = Reader(pipe[0])
    writer = LineWriter(pipe[1])
    log(writer, 0, 1000)
    reader.read_until(lambda reader: len(reader.lines) == 1000)
    assert reader.indices == list(range(1000))
    writer.close()


@pytest.mark.parametrize("is_blocking", [True, False])
def test_who_logs_does_not_wait_for_the_reader_and_drops_are_told(pipe, is_blocking):
    reader = Reader(pipe[0])
    os.set_blocking(pipe[1], is_blocking)
    writer = LineWriter(pipe[1], max_lines=500)
    num_logged = 5 * PIPE_BYTES // len(PADDING) + 500
    log(writer, 0, num_logged)  # nobody reads: a handler that waits would stay here
    reader.read_until(lambda reader: len(reader.indices) + reader.num_dropped == num_logged)
    assert reader.num_dropped > 0
    log(writer, num_logged, 1)
    reader.read_until(lambda reader: reader.lines[-1] == {"index": num_logged, "padding": PADDING})
    assert reader.indices == sorted(set(reader.indices))
    assert len(reader.indices) + reader.num_dropped == num_logged + 1
    writer.close()


def test_close_writes_what_is_queued(pipe):
    reader, descriptor = pipe
    writer = LineWriter(descriptor)
    log(writer, 0, 50)
    writer.close()
    os.close(descriptor)
    with os.fdopen(os.dup(reader), "rb") as stream:
        assert [json.loads(line)["index"] for line in stream] == list(range(50))


def test_a_reader_that_left_hurts_nobody(pipe):
    reader, descriptor = pipe
    writer = LineWriter(descriptor, max_lines=10)
    os.close(reader)
    log(writer, 0, 1000)
    writer.close()
    before = writer.num_dropped
    log(writer, 1000, 1000)
    assert writer.num_dropped >= before + 990, "nobody takes them any more"


def test_a_process_whose_log_nobody_reads_ends_by_itself():
    program = (
        "import sys; from server.api import access_log\n"
        "access_log.write_to(sys.stdout)\n"
        f"for index in range(5000): access_log.logger.info('%s %s', index, {PADDING!r})\n"
        "print('logged', file=sys.stderr)\n"
    )
    reader, descriptor = os.pipe()  # held open, never read
    process = subprocess.Popen([sys.executable, "-c", program], stdout=descriptor, stderr=subprocess.PIPE)
    try:
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(reader)
        os.close(descriptor)
    assert (process.returncode, told) == (0, b"logged\n")
