"""The raw tier on disk: what survives a restart, what does not, quota and leases; and misses, flights."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from adapters_store.errors import AdapterDenied, AdapterNotFound, AdapterTooLarge, AdapterUnavailable, RawDamaged
from adapters_store.flights import Flights
from adapters_store.lru import STALE_TEMPORARY_S, TOUCH_S, LeasedLru, Resident
from adapters_store.misses import Misses
from adapters_store.raw import RECORD_FILE, RawFiles, RawFolder, hash_files
from adapters_store.ref import FileVersion, SourceVersion

CONTENT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 100, "adapter_model.bin": b"pickle"}
NUM_BYTES = 102  # the pickle is noted, never fetched


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def version_of(name: str) -> SourceVersion:
    files = tuple(FileVersion(file, len(content), etag=name) for file, content in CONTENT.items())
    return SourceVersion("s3://bucket", name, f"s3://bucket/{name}", files)


def bring(raw: RawFiles, name: str) -> SourceVersion:
    """What a fetch leaves."""
    version, folder = version_of(name), raw.new_folder()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_bytes(CONTENT[file])
    raw.adopt(version, folder, hash_files(version, folder))
    return version


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "raw").iterdir()} - {"lock"}


def test_what_was_adopted_is_found_also_after_a_restart(tmp_path):
    raw = RawFiles(tmp_path)
    assert not raw.find(version_of("a"))
    version = bring(raw, "a")
    for tier in (raw, RawFiles(tmp_path)):
        assert tier.find(version) and tier.peek(version.key)
        assert (tier.num_entries, tier.bytes_used) == (1, NUM_BYTES)
    mode = stat.S_IMODE(raw.folder_of(version.key).stat().st_mode)
    assert (mode, stat.S_IMODE((tmp_path / "raw").stat().st_mode)) == (0o700, 0o700)
    assert left(tmp_path) == {version.key}


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("damage", ["shorter", "gone", "no record", "no folder"])
def test_an_entry_that_is_not_whole_is_dropped(tmp_path, damage, is_restarted):
    raw = RawFiles(tmp_path)
    version = bring(raw, "a")
    folder = raw.folder_of(version.key)
    if damage == "shorter":
        os.truncate(folder / "adapter_model.safetensors", 99)
    elif damage == "gone":
        (folder / "adapter_config.json").unlink()
    elif damage == "no record":
        (folder / RECORD_FILE).unlink()
    else:
        folder.rename(tmp_path / "elsewhere")
    raw = RawFiles(tmp_path) if is_restarted else raw
    assert not raw.find(version)
    assert (raw.num_entries, raw.bytes_used, left(tmp_path)) == (0, 0, set())
    assert raw.find(bring(raw, "a"))


@pytest.mark.parametrize("record", [b"", b"{}", b'{"version": 1}'])
def test_a_record_of_something_else_is_dropped_at_start(tmp_path, record):
    raw = RawFiles(tmp_path)
    version, other = bring(raw, "a"), bring(raw, "b")
    (raw.folder_of(version.key) / RECORD_FILE).write_bytes(
        record or (raw.folder_of(other.key) / RECORD_FILE).read_bytes()
    )
    assert left(tmp_path) == {version.key, other.key}
    again = RawFiles(tmp_path)
    assert not again.find(version) and again.find(other)
    assert left(tmp_path) == {other.key}


def test_who_reads_finds_other_bytes_of_the_same_size(tmp_path):
    raw = RawFiles(tmp_path)
    version = bring(raw, "a")
    folder = RawFolder(raw.folder_of(version.key))
    config, weights = version.files[:2]
    assert folder.again(version) == version
    assert bytes(folder.read(version, weights)) == CONTENT[weights.name]
    sound = hash_files(version, raw.folder_of(version.key))
    folder.check(version, sound)
    with pytest.raises(RawDamaged, match=weights.name):
        folder.check(version, sound | {weights.name: sound[config.name]})
    with pytest.raises(RawDamaged):
        folder.again(version_of("b"))
    os.truncate(raw.folder_of(version.key) / weights.name, 50)
    with pytest.raises(RawDamaged, match=weights.name):
        folder.read(version, weights)
    with pytest.raises(AdapterUnavailable, match="not fetched whole"):
        hash_files(version, raw.folder_of(version.key))


def test_the_least_recently_used_goes_and_what_is_leased_stays(tmp_path):
    clock = Clock()
    raw = RawFiles(tmp_path, 2 * NUM_BYTES, grace_s=0.0, clock=clock)
    a, b, c = (bring(raw, name) for name in "abc")
    assert [raw.peek(version.key) for version in (a, b, c)] == [False, True, True]
    assert raw.lease(b.key) and not raw.lease(a.key)
    clock.now += 100
    assert raw.find(c)
    d = bring(raw, "d")
    assert [raw.peek(version.key) for version in (b, c, d)] == [True, False, True]
    bring(raw, "e")
    bring(raw, "f")
    assert raw.peek(b.key) and raw.num_leases == 1
    raw.release(b.key)
    assert (raw.num_leases, raw.evictions, raw.num_entries) == (0, 4, 2)
    assert raw.bytes_used <= 2 * NUM_BYTES


def test_a_quota_of_nothing_keeps_what_is_in_use_and_no_more(tmp_path):
    clock = Clock()
    raw = RawFiles(tmp_path, 0, grace_s=50.0, clock=clock)
    version = bring(raw, "a")
    assert raw.lease(version.key)  # within the grace
    clock.now += 100
    raw.release(version.key)
    assert (raw.num_entries, left(tmp_path)) == (0, set())


def test_the_order_of_use_survives_a_restart(tmp_path):
    clock = Clock()
    raw = RawFiles(tmp_path, 10 * NUM_BYTES, clock=clock)
    a, b = bring(raw, "a"), bring(raw, "b")
    clock.now += 100
    assert raw.find(a)
    raw.close()
    again = RawFiles(tmp_path, 2 * NUM_BYTES, grace_s=0.0, clock=clock)
    bring(again, "c")
    assert again.peek(a.key) and not again.peek(b.key)


@pytest.mark.parametrize(("quota", "age_s", "is_swept"), [(1000, 0, True), (None, 0, False), (None, 1, True)])
def test_half_written_folders_are_swept_at_start(tmp_path, quota, age_s, is_swept):
    """All of them where this process is alone in the folder, else only the old ones."""
    raw = RawFiles(tmp_path)
    half = raw.new_folder()
    (half / "adapter_config.json").write_bytes(b"{")
    raw.close()
    if age_s:
        os.utime(half, (1, 1))
    assert STALE_TEMPORARY_S > 60
    RawFiles(tmp_path, quota)
    assert half.exists() is not is_swept


def test_who_evicts_is_alone_in_the_folder(tmp_path):
    alone = RawFiles(tmp_path, 1000)
    with pytest.raises(OSError, match="in use by another server"):
        RawFiles(tmp_path)
    alone.close()
    RawFiles(tmp_path).close()


def test_two_processes_that_bring_the_same_version(tmp_path):
    one, other = RawFiles(tmp_path), RawFiles(tmp_path)
    version = bring(one, "a")
    bring(other, "a")
    assert one.find(version) and other.find(version)
    assert left(tmp_path) == {version.key}


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_entry_of_another_process_is_replaced(tmp_path, damage):
    one, other = RawFiles(tmp_path), RawFiles(tmp_path)
    version = bring(one, "a")
    weights = one.folder_of(version.key) / "adapter_model.safetensors"
    os.truncate(weights, 1) if damage == "shorter" else weights.unlink()
    bring(other, "a")
    assert one.find(version) and other.find(version)
    assert weights.read_bytes() == CONTENT[weights.name]
    assert left(tmp_path) == {version.key}


def test_folders_above_are_for_this_user_alone(tmp_path):
    before = os.umask(0o022)
    try:
        RawFiles(tmp_path / "cache")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("cache", "cache/raw")] == [0o700, 0o700]


@pytest.mark.parametrize("what", ["discard", "abandon"])
async def test_an_event_loop_does_not_wait_for_gigabytes_to_be_deleted(tmp_path, monkeypatch, what):
    raw, may_end, rmtree = RawFiles(tmp_path), threading.Event(), shutil.rmtree
    version = bring(raw, "a")

    def slow(*args: object, **given: object) -> None:
        assert threading.current_thread() is not threading.main_thread() and may_end.wait(10)
        rmtree(*args, **given)

    monkeypatch.setattr(shutil, "rmtree", slow)
    if what == "discard":
        raw.discard(version.key)
        assert not raw.find(version) and version.key not in left(tmp_path)
        assert raw.find(bring(raw, "a"))  # its place is free at once
    else:
        folder = raw.new_folder()
        (folder / "adapter_config.json").write_bytes(b"{")
        raw.abandon(folder)
    assert len(left(tmp_path) - {version.key}) == 1
    closing = asyncio.ensure_future(asyncio.to_thread(raw.close))
    await asyncio.sleep(0.02)
    assert not closing.done()
    may_end.set()
    await closing
    assert left(tmp_path) == {version.key}


def test_an_entry_that_goes_while_it_is_looked_at_at_start(tmp_path, monkeypatch):
    """Another process evicts; folders of this test are taken for gone when they are looked at."""
    version = bring(RawFiles(tmp_path), "a")
    look = Path.stat

    def stat_(path: Path, **given: bool):
        if path.name == version.key and given.get("follow_symlinks", True) and len(looks) >= 1:
            raise FileNotFoundError(path)
        looks.extend([path] if path.name == version.key else [])
        return look(path, **given)

    looks: list[Path] = []
    monkeypatch.setattr(Path, "stat", stat_)
    assert RawFiles(tmp_path).num_entries == 0


def test_a_damaged_entry_that_cant_be_deleted_is_not_used(tmp_path, monkeypatch):
    raw = RawFiles(tmp_path)
    version = bring(raw, "a")
    (raw.folder_of(version.key) / "adapter_config.json").unlink()

    def refused(path: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    assert not raw.find(version)
    assert raw.num_entries == raw.bytes_used == 0


def test_what_is_over_the_quota_alone_is_refused(tmp_path):
    for quota, is_refused in ((NUM_BYTES - 1, True), (NUM_BYTES, False), (0, False), (None, False)):
        raw = RawFiles(tmp_path, quota)
        if is_refused:
            with pytest.raises(AdapterTooLarge, match=f"a has {NUM_BYTES} bytes; .* is {quota}"):
                raw.check_quota(version_of("a"))
        else:
            raw.check_quota(version_of("a"))
        raw.close()


def lru(tmp_path: Path, quota: int, clock: Clock, **residents: Resident) -> LeasedLru[Resident]:
    made = LeasedLru(quota, path_of=lambda key: tmp_path / key, drop=lambda key: made.pop(key), grace_s=50, clock=clock)
    for key, resident in residents.items():
        (tmp_path / key).touch()
        made.put(key, resident)
    return made


def test_a_use_in_the_future_keeps_nothing_for_ever(tmp_path):
    clock = Clock()
    ahead = lru(tmp_path, 10, clock, old=Resident(10, 1.0), ahead=Resident(10, clock.now + 1e6))
    ahead.evict()
    assert set(ahead.residents) == {"ahead"}
    ahead.put("more", Resident(5, clock.now - 100))
    ahead.touch("more")
    ahead.evict()
    assert set(ahead.residents) == {"more"}
    future = lru(tmp_path, 10, clock, ahead=Resident(10, clock.now + 1e6))
    os.utime(tmp_path / "ahead", (clock.now + 1e6,) * 2)
    future.touch("ahead")
    assert abs((tmp_path / "ahead").stat().st_mtime - clock.now) < TOUCH_S


async def test_what_the_grace_kept_goes_when_it_is_over_though_nobody_asks(tmp_path):
    """Two arrive and one is leased; nothing happens then until the lease ends."""
    raw = RawFiles(tmp_path, 1, grace_s=0.05)
    a, b = bring(raw, "a"), bring(raw, "b")
    assert raw.lease(a.key) and raw.peek(b.key)
    async with asyncio.timeout(10):
        while raw.peek(b.key):
            await asyncio.sleep(0.01)
        assert raw.peek(a.key)
        raw.release(a.key)  # used moments ago: within the grace anew
        while raw.num_entries:
            await asyncio.sleep(0.01)
    kept = bring(raw, "c")
    raw.close()
    await asyncio.sleep(0.2)
    assert raw.peek(kept.key) and left(tmp_path) == {kept.key}  # the folder may be another's by now


async def test_it_looks_again_when_the_grace_of_the_oldest_ends(tmp_path, monkeypatch):
    delays: list[float] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda delay, call: delays.append(delay))
    clock = Clock()
    kept = lru(tmp_path, 5, clock, late=Resident(10, clock.now - 10), old=Resident(10, clock.now - 39))
    kept.leases["leased"] = 1
    kept.put("leased", Resident(10, clock.now - 45))
    kept.evict()  # a second later by this clock, of a grace of 50
    assert delays == [10] and len(kept.residents) == 3


def test_a_lower_quota_holds_from_the_start_on(tmp_path):
    clock = Clock()
    raw = RawFiles(tmp_path, clock=clock)
    for name in "abc":
        bring(raw, name)
    raw.close()
    clock.now += 100
    assert RawFiles(tmp_path, NUM_BYTES, clock=clock).num_entries == 1


def test_under_the_quota_nothing_is_summed_or_sorted(tmp_path):
    full = lru(tmp_path, 100, Clock(), a=Resident(40, 1.0), b=Resident(60, 1.0))

    class Unlooked(dict):
        def items(self):
            raise AssertionError("looked at all of them")

        values = items

    full.residents = Unlooked(full.residents)
    full.evict()
    full.put("b", Resident(50, 1.0))  # in place of the one before
    assert full.bytes_used == 90
    full.pop("a")
    assert (full.bytes_used, full.pop("a")) == (50, None)
    full.evict()


def test_a_refusing_disk_is_said_and_leaves_the_folder_to_its_owner(tmp_path, monkeypatch):
    raw = RawFiles(tmp_path)
    version, folder = version_of("a"), raw.new_folder()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            raw.adopt(version, folder, {})
    raw.abandon(folder)
    assert (left(tmp_path), raw.num_entries) == (set(), 0)


# --- misses ---------------------------------------------------------------------------------------------


def test_misses_end():
    now = 0.0
    misses = Misses(5.0, clock=lambda: now)
    misses.add("a", AdapterNotFound("no a"))
    misses.add("b", AdapterDenied("not yours"))
    found = misses.get("a")
    assert isinstance(found, AdapterNotFound) and found.message == "no a"
    assert misses.get("a") is not found  # raised by several, one object would collect their tracebacks
    assert isinstance(misses.get("b"), AdapterDenied) and misses.get("c") is None
    misses.forget("b")
    assert misses.get("b") is None
    now = 5.0
    assert misses.get("a") is None and len(misses) == 0


def test_misses_are_bounded():
    misses = Misses(5.0, max_entries=3, clock=lambda: 0.0)
    for number in range(100):
        misses.add(f"{number}", AdapterNotFound("no"))
    assert len(misses) == 3
    assert misses.get("96") is None and misses.get("97") is not None


# --- flights --------------------------------------------------------------------------------------------


async def test_one_flight_for_all_and_none_when_the_last_has_left():
    flights: Flights[int] = Flights()
    starts = ends = 0
    gate = asyncio.Event()

    async def work() -> int:
        nonlocal starts, ends
        starts += 1
        try:
            await gate.wait()
        finally:
            ends += 1
        return starts

    leaving = [asyncio.create_task(flights.join("k", work)) for _ in range(3)]
    await asyncio.sleep(0)
    assert ("k" in flights, flights.waiters("k"), len(flights)) == (True, 3, 1)
    leaving[0].cancel()
    await asyncio.sleep(0)
    assert (flights.waiters("k"), ends) == (2, 0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await asyncio.sleep(0)
    assert (starts, ends, len(flights)) == (1, 1, 0)
    gate.set()
    assert await asyncio.gather(*(flights.join("k", work) for _ in range(3))) == [2, 2, 2]


async def test_close_ends_all_flights():
    flights: Flights[None] = Flights()
    waiting = [asyncio.create_task(flights.join(key, lambda: asyncio.sleep(60))) for key in "ab"]
    await asyncio.sleep(0)
    await flights.close()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
    assert len(flights) == 0
