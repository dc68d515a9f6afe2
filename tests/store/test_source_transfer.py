"""How files are brought, with readers made up by the tests: cancellation, the floor on speed, tries, threads."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store.errors import AdapterUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources import transfer
from adapters_store.sources.retry import Passing, Retry
from adapters_store.sources.transfer import Checksum, Part, Transfer

MIB = 1 << 20
FILE = "adapter_model.safetensors"


async def bring(
    folder: Path, read: Callable[[Part], Awaitable[None]], size: int, checksum: Checksum | None = None, **changes
) -> bytes:
    """What comes of a file of that size."""
    parts = {"part_bytes": 64 * MIB, "min_part_bytes": 64 * MIB, "parts_in_flight": 2}
    given = {**parts, "min_bytes_per_s": 1, "grace_s": 30.0, **changes}
    retry = Retry(attempts=2, total_s=0.05, first_s=0.001, max_s=0.001)
    version = SourceVersion("fake://s", "fr", "fr", (FileVersion(FILE, size, 1, "tag"),))
    await Transfer(retry=retry, **given).fetch(version, folder, Limits(), read, lambda _: checksum)
    return (folder / FILE).read_bytes()


async def test_however_often_it_is_cancelled_a_write_ends_before_its_file_is_closed(tmp_path, monkeypatch):
    """Else its bytes go to whichever file has the number then."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    write_all = transfer._write_all

    def stalled(*args: object) -> None:
        begun.set()
        assert may_end.wait(10)
        write_all(*args)
        ended.set()

    monkeypatch.setattr(transfer, "_write_all", stalled)
    fetch = asyncio.ensure_future(bring(tmp_path, lambda part: part.write(b"x" * 10), 10))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    for _ in range(4):
        fetch.cancel()
        await asyncio.sleep(0.01)
        assert not fetch.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    assert ended.is_set() and (tmp_path / FILE).read_bytes() == b"x" * 10


async def test_a_large_file_that_stalls_is_given_up_long_before_its_size_would_allow(tmp_path):
    async def read(part: Part) -> None:
        await part.write(b"x" * MIB)
        await asyncio.sleep(60)

    with pytest.raises(AdapterUnavailable, match=rf"too slowly: {MIB} of {64 * MIB} bytes in"):
        await asyncio.wait_for(bring(tmp_path, read, 64 * MIB, min_bytes_per_s=2 * MIB, grace_s=0.2), 10)


async def test_bytes_that_keep_coming_go_on_past_the_grace(tmp_path):
    async def read(part: Part) -> None:
        while part.position < part.stop:
            await part.write(b"x" * MIB)
            await asyncio.sleep(0.05)

    assert await bring(tmp_path, read, 12 * MIB, min_bytes_per_s=MIB, grace_s=0.3) == b"x" * 12 * MIB


async def test_a_part_that_gets_further_at_each_try_is_tried_on(tmp_path):
    """Also one whose tries are longer than all tries together may take."""
    tries = 0

    async def read(part: Part) -> None:
        nonlocal tries
        tries += 1
        await part.write(b"x" * MIB)
        await asyncio.sleep(0.06)
        raise Passing("the connection was reset")

    with pytest.raises(AdapterUnavailable, match="more bytes came"):
        await bring(tmp_path, read, 5 * MIB)  # all of it in five tries, and then too much
    assert tries == 6
    assert (tmp_path / FILE).stat().st_size == 5 * MIB


async def test_a_part_that_begins_anew_each_time_has_its_tries(tmp_path):
    tries = 0

    async def read(part: Part) -> None:
        nonlocal tries
        tries += 1
        part.position = 0
        await part.write(b"x" * MIB)
        raise Passing("the connection was reset")

    with pytest.raises(AdapterUnavailable, match="after 2 tries"):
        await bring(tmp_path, read, 5 * MIB)
    assert tries == 2


async def test_a_fetch_needs_no_thread_of_those_that_requests_need(tmp_path):
    block = threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    stalled = loop.run_in_executor(None, block.wait)
    try:
        checksum = Checksum("sha256", hashlib.sha256(b"x" * 10).hexdigest())
        content = await asyncio.wait_for(bring(tmp_path, lambda part: part.write(b"x" * 10), 10, checksum), 10)
        assert content == b"x" * 10
    finally:
        block.set()
        await stalled


@pytest.mark.parametrize("algorithm", ["md5", "git"])
def test_old_hashes_are_checksums_where_security_needs_others(tmp_path, monkeypatch, algorithm):
    """As on machines that allow MD5 and SHA-1 for other uses only."""
    new, content = hashlib.new, os.urandom(100)
    (tmp_path / FILE).write_bytes(content)

    def strict(name: str, data: bytes = b"", *, usedforsecurity: bool = True):
        if usedforsecurity and name in ("md5", "sha1"):
            raise ValueError("disabled for FIPS")
        return new(name, data, usedforsecurity=usedforsecurity)

    monkeypatch.setattr(hashlib, "new", strict)
    monkeypatch.setattr(hashlib, "sha1", lambda data=b"", **given: strict("sha1", data, **given))
    told = {"md5": new("md5", content), "git": new("sha1", b"blob 100\0" + content)}[algorithm].hexdigest()
    assert Checksum(algorithm, told).fits(tmp_path / FILE)
    assert not Checksum(algorithm, told[::-1]).fits(tmp_path / FILE)
