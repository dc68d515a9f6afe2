"""Hashes of files in the making: any order of parts gives the file's own digests, and nothing reads on afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import threading

import pytest

from adapters_store.sources import hashing
from adapters_store.sources.hashing import FileHashes

CONTENT = random.Random(1).randbytes(700_001)


@pytest.fixture
def file(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=[(1, 50_000, 7_000), (512 << 10, 4 << 20, 128 << 10)], ids=["small", "large"])
def sizes(request, monkeypatch):
    least, step, block = request.param
    monkeypatch.setattr(hashing, "_LEAST_BYTES", least)
    monkeypatch.setattr(hashing, "STEP_BYTES", step)
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", block)


def pieces(seed: int) -> list[tuple[int, int]]:
    """The file in pieces of random lengths, in random order."""
    rng = random.Random(seed)
    cuts = sorted({0, len(CONTENT), *(rng.randrange(len(CONTENT)) for _ in range(rng.randrange(1, 40)))})
    found = list(itertools.pairwise(cuts))
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("seed", range(8))
async def test_any_order_gives_the_files_digests(file, sizes, seed):
    hashes = FileHashes(file, ["md5", "sha256"])
    for start, stop in pieces(seed):
        os.pwrite(file, CONTENT[start:stop], start)
        hashes.note(start, stop)
        if start % 3 == 0:
            await asyncio.sleep(0.001)
    expected = {"md5": hashlib.md5(CONTENT).hexdigest(), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    assert await asyncio.wait_for(hashes.finish(), 20) == expected
    await hashes.stop()


@pytest.mark.parametrize("first", [1, 300_000, len(CONTENT)])
async def test_a_file_that_is_written_anew_is_hashed_anew(file, sizes, first):
    """What came in the first try was wrong, and part of it was hashed by then."""
    hashes = FileHashes(file, ["md5", "sha256"])
    os.pwrite(file, b"x" * first, 0)
    hashes.note(0, first)
    await asyncio.sleep(0.02)
    for start, stop in itertools.pairwise([0, 150_000, 300_000, 600_000, len(CONTENT)]):
        os.pwrite(file, CONTENT[start:stop], start)
        hashes.note(start, stop)
    expected = {"md5": hashlib.md5(CONTENT).hexdigest(), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    assert await asyncio.wait_for(hashes.finish(), 20) == expected
    await hashes.stop()


async def test_an_empty_file_has_a_digest(file):
    hashes = FileHashes(file, ["sha256"])
    assert await hashes.finish() == {"sha256": hashlib.sha256(b"").hexdigest()}
    await hashes.stop()


async def test_what_is_behind_a_hole_waits(file, sizes):
    hashes = FileHashes(file, ["sha256"])
    os.pwrite(file, CONTENT, 0)
    hashes.note(0, 600_000)
    hashes.note(650_000, len(CONTENT))
    assert await asyncio.wait_for(hashes.finish(), 20) == {"sha256": hashlib.sha256(CONTENT[:600_000]).hexdigest()}
    await hashes.stop()


async def test_a_file_that_becomes_shorter_is_an_error(file, sizes):
    hashes = FileHashes(file, ["sha256"])
    os.pwrite(file, CONTENT[:1000], 0)
    hashes.note(0, len(CONTENT))
    with pytest.raises(OSError, match="shorter"):
        await asyncio.wait_for(hashes.finish(), 20)
    await hashes.stop()


async def test_stop_waits_for_the_thread_that_reads(file, sizes, monkeypatch):
    """Also when it is cancelled meanwhile: the descriptor is closed right after."""
    gate, began, reads = threading.Event(), threading.Event(), []

    def preadv(descriptor, buffers, offset):
        began.set()
        gate.wait(10)
        reads.append(offset)
        return os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(hashing, "os", type("Os", (), {"preadv": staticmethod(preadv)}))
    os.pwrite(file, CONTENT, 0)
    hashes = FileHashes(file, ["sha256"])
    hashes.note(0, len(CONTENT))
    assert await asyncio.to_thread(began.wait, 10)
    stopping = asyncio.create_task(hashes.stop())
    await asyncio.sleep(0.02)
    stopping.cancel()
    await asyncio.sleep(0.02)
    assert not stopping.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(stopping), 20)
    number = len(reads)
    assert number
    await asyncio.sleep(0.05)
    assert len(reads) == number
