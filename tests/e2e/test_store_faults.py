"""Faults at every tier of the store under traffic, in real processes over a real S3 server.

Each ends in its status for the requests concerned and in none for others (whose tokens are PEFT's all the while),
nothing is left of it, and the adapter is served once it is over. The tables say what ends how.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters_store.sources.folder import CONFIG_FILE, WEIGHTS_FILE
from tests.e2e.store_world import MISS_TTL_S, POLL_S, StoreWorld, Traffic, file_size_limit, store_world

SOUND = ["base", "sound/a", "sound/b", "sound/c"]
ALWAYS = 0
OK, DOWN = (200, ""), (503, "adapter_unavailable")
DENIED, MISSING, CORRUPT = (403, "adapter_denied"), (404, "model_not_found"), (422, "adapter_corrupt")

SOURCE_FAULTS = {
    # adapter: what is done to which of its requests to the store, how often, and what its own requests get
    "list-reset": ("list", "reset", ALWAYS, DOWN),
    "list-silent": ("list", "hang:40", ALWAYS, DOWN),  # read timeouts
    "list-cut": ("list", "cut:40", ALWAYS, DOWN),
    "list-403": ("list", "status:403", ALWAYS, DENIED),
    "list-404": ("list", "status:404", ALWAYS, MISSING),
    "list-500": ("list", "status:500", ALWAYS, DOWN),
    "list-slow-down": ("list", "status:503", ALWAYS, DOWN),
    "list-slow-down-twice": ("list", "status:503", 2, OK),
    "get-reset": ("weights", "reset", ALWAYS, DOWN),
    "get-reset-in-mid-body-at-the-same-place": ("weights", "abort:0", ALWAYS, DOWN),
    "get-reset-in-mid-body-further-each-time": ("weights", "abort:300000", ALWAYS, OK),
    "get-cut-at-the-same-place": ("weights", "cut:0", ALWAYS, DOWN),
    "get-cut-further-each-time": ("weights", "cut:300000", ALWAYS, OK),
    "get-silent": ("weights", "hang:40", ALWAYS, DOWN),
    "get-drip": ("weights", "drip:0.05", ALWAYS, DOWN),  # 20 bytes a second
    "get-403": ("weights", "status:403", ALWAYS, DENIED),
    "get-404-of-what-is-listed": ("weights", "status:404", ALWAYS, DOWN),
    "get-500": ("config", "status:500", ALWAYS, DOWN),
    "get-slow-down": ("config", "status:503", ALWAYS, DOWN),
    "get-slow-down-twice": ("weights", "status:503", 2, OK),
    "get-wrong-bytes": ("weights", "corrupt", ALWAYS, CORRUPT),
    "get-wrong-bytes-of-the-config": ("config", "corrupt", ALWAYS, CORRUPT),
    "get-wrong-bytes-once": ("weights", "corrupt", 1, OK),
    "get-another-etag": ("weights", "etag:other", ALWAYS, DOWN),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[StoreWorld]:
    with store_world(tmp_path_factory.mktemp("faults"), "--adapter-memory", "2MiB") as world:
        world.put(*SOUND[1:])
        world.start()
        yield world


def where(name: str, kind: str) -> str:
    """What the targets of these requests have in them."""
    return {"list": f"%2F{name}%2F", "weights": f"/{name}/{WEIGHTS_FILE}", "config": f"/{name}/{CONFIG_FILE}"}[kind]


async def warm_up(store: StoreWorld) -> int:
    """Whatever a server opens once is open; how many files that are."""
    async with Traffic(store, SOUND):
        await asyncio.sleep(1.0)
    await asyncio.to_thread(store.until_quiet, 1 << 20)
    return store.open_files()


@pytest.mark.timeout(280)
async def test_faults_of_the_source(store):
    """All at a time, each to its adapter."""
    large = [name for name in SOURCE_FAULTS if name.endswith("further-each-time")]
    await asyncio.to_thread(store.put, *(name for name in SOURCE_FAULTS if name not in large))
    await asyncio.to_thread(lambda: store.put(*large, rank=64))  # a piece that comes whole is 256 KiB
    open_files = await warm_up(store)
    for name, (kind, fault, times, _) in SOURCE_FAULTS.items():
        faults = store.network.proxy.faults if times else store.network.proxy.always
        faults += [(where(name, kind), fault)] * (times or 1)
    async with Traffic(store, SOUND) as traffic:

        async def ended(name: str) -> set[tuple[int, str]]:
            """As a stream and as a whole; both wait for the same."""
            asks = [store.ask(traffic.http, name, streams=streams) for streams in (False, True)]
            return {outcome.told for outcome in await asyncio.gather(*asks)}

        ends = await asyncio.gather(*map(ended, SOURCE_FAULTS))
        found = dict(zip(SOURCE_FAULTS, ends, strict=True))
        assert found == {name: {end} for name, (*_, end) in SOURCE_FAULTS.items()}
        await asyncio.to_thread(store.network.listen)
        await asyncio.sleep(MISS_TTL_S + 0.1)
        assert [(name, (await store.ask(traffic.http, name)).told) for name in SOURCE_FAULTS] == [
            (name, OK) for name in SOURCE_FAULTS
        ]
    await asyncio.to_thread(store.until_quiet, open_files)


@pytest.mark.timeout(200)
async def test_a_source_that_takes_no_connection(store):
    """Connect timeouts, then refusals: what was served is served on, what was never seen is 503, and then it is not."""
    await asyncio.to_thread(store.put, "late/a", "late/b")
    open_files = await warm_up(store)
    async with Traffic(store, SOUND) as traffic:
        for name, take_away in (("late/a", store.network.ignore), ("late/b", store.network.refuse)):
            take_away()
            before = traffic.answered.copy()
            assert (await store.ask(traffic.http, name)).told == DOWN
            await asyncio.sleep(2 * POLL_S)
            assert all(traffic.answered[sound] > before[sound] for sound in SOUND)
            await asyncio.to_thread(store.network.listen)
            await asyncio.sleep(MISS_TTL_S + 0.1)
            assert (await store.ask(traffic.http, name, streams=True)).told == OK
        assert store.samples("multilora_adapter_stale_uses_total")[""] > 0
    await asyncio.to_thread(store.until_quiet, open_files)


async def test_a_full_disk(store):
    """For the files as fetched (the API process writes them), then for the image (the compiler does)."""
    await asyncio.to_thread(lambda: store.put("large/a", "large/b", rank=64))
    await asyncio.to_thread(store.put, "small/a", "small/b")
    open_files = await warm_up(store)
    async with Traffic(store, SOUND) as traffic:
        for process, large, small in (("api", "large/a", "small/a"), ("worker", "large/b", "small/b")):
            with file_size_limit(store.server.pid(process), 200_000):
                ends = await asyncio.gather(*(store.ask(traffic.http, name) for name in (large, small, large)))
                assert [end.told for end in ends] == [DOWN, OK, DOWN]
            await asyncio.sleep(MISS_TTL_S + 0.1)
            assert (await store.ask(traffic.http, large, streams=True)).told == OK
    await asyncio.to_thread(store.until_quiet, open_files)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DISK_FAULTS: dict[
    str, tuple[Callable[[Path], None] | None, Callable[[Path], None] | None, tuple[int, str], int, int]
] = {
    # what is done to its image, what to its weights as fetched, what the first request gets; fetches, compiles
    "image-deleted": (Path.unlink, None, OK, 0, 1),
    "image-cut": (cut, None, OK, 0, 1),
    "image-wrong-bytes": (flipped, None, DOWN, 0, 1),  # found by the engine; the next request has it compiled anew
    "image-and-files-deleted": (Path.unlink, Path.unlink, OK, 1, 1),
    "image-deleted-files-cut": (Path.unlink, cut, OK, 1, 1),
    "image-deleted-files-wrong-bytes": (Path.unlink, flipped, OK, 1, 1),
    "files-wrong-bytes": (None, flipped, OK, 0, 0),  # nobody needs them
}


async def test_files_damaged_on_disk(store):
    """After a restart, so that no adapter is on the device or in memory."""
    await asyncio.to_thread(store.put, *DISK_FAULTS)
    async with httpx.AsyncClient() as http:
        keys = {name: (await store.ask(http, name)).image_key for name in DISK_FAULTS}
    await asyncio.to_thread(store.start)
    open_files = await warm_up(store)
    assert store.counts() == (0, 0), "a restart fetches and compiles nothing"
    async with Traffic(store, SOUND) as traffic:
        for name, (to_image, to_files, first, num_fetches, num_compiles) in DISK_FAULTS.items():
            if to_files is not None:
                to_files(store.raw(name) / WEIGHTS_FILE)
            if to_image is not None:
                to_image(store.image(keys[name]))
            before = store.counts()
            assert (name, (await store.ask(traffic.http, name)).told) == (name, first)
            again = await store.ask(traffic.http, name, streams=True)
            assert (name, again.told, again.image_key) == (name, OK, keys[name])
            done = tuple(now - then for now, then in zip(store.counts(), before, strict=True))
            assert (name, done) == (name, (num_fetches, num_compiles))
    await asyncio.to_thread(store.until_quiet, open_files)


@pytest.mark.parametrize("damage", [Path.unlink, flipped, cut])
async def test_an_image_damaged_between_its_lease_and_its_load(store, damage):
    """The engine stands still while it is done: the request has its lease on the image and waits."""
    name = f"leased-{damage.__name__}"
    await asyncio.to_thread(store.put, name)
    async with httpx.AsyncClient() as http:
        key = (await store.ask(http, name)).image_key
    await asyncio.to_thread(store.start)
    open_files = await warm_up(store)
    async with Traffic(store, SOUND) as traffic:
        engine = store.server.pid("engine")
        os.kill(engine, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.5)  # the traffic waits too, with all its leases
            leases = store.samples("multilora_tier_leases")["disk"]
            asking = asyncio.create_task(store.ask(traffic.http, name))
            await store.until("disk", "multilora_tier_leases", leases + 1)
            damage(store.image(key))
        finally:
            os.kill(engine, signal.SIGCONT)
        assert (await asking).told == DOWN
        again = await store.ask(traffic.http, name, streams=True)
        assert (again.told, again.image_key) == (OK, key)
    await asyncio.to_thread(store.until_quiet, open_files)


@pytest.mark.parametrize("damage", [Path.unlink, flipped, cut])
async def test_files_damaged_between_their_fetch_and_their_compile(store, damage):
    """The compiler stands still while it is done. They are fetched once more, and no request notices."""
    name = f"fetched-{damage.__name__}"
    await asyncio.to_thread(store.put, name)
    open_files = await warm_up(store)
    async with Traffic(store, SOUND) as traffic:
        fetches, _ = store.counts()
        worker = store.server.pid("worker")
        os.kill(worker, signal.SIGSTOP)
        try:
            asking = asyncio.create_task(store.ask(traffic.http, name))
            await store.until("raw", "multilora_tier_leases", 1)
            damage(store.raw(name) / WEIGHTS_FILE)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert (await asking).told == OK
        assert store.counts()[0] == fetches + 2
    await asyncio.to_thread(store.until_quiet, open_files)


async def test_the_compiler_is_killed_over_an_adapter(store):
    """That one's requests get 503; the one behind it has a new compiler, and so has this one once it is asked again."""
    await asyncio.to_thread(store.put, "killed/a", "killed/b")
    open_files = await warm_up(store)
    async with Traffic(store, SOUND) as traffic:
        worker = store.server.pid("worker")
        os.kill(worker, signal.SIGSTOP)  # so that the first is certainly in its hands
        asks = [asyncio.create_task(store.ask(traffic.http, "killed/a", streams=streams)) for streams in (False, True)]
        await store.until("raw", "multilora_tier_leases", 1)
        behind = asyncio.create_task(store.ask(traffic.http, "killed/b"))
        await store.until("raw", "multilora_tier_leases", 2)
        os.kill(worker, signal.SIGKILL)
        assert [(await ask).told for ask in asks] == [DOWN, DOWN]
        assert (await behind).told == OK
        await asyncio.sleep(MISS_TTL_S + 0.1)
        assert (await store.ask(traffic.http, "killed/a")).told == OK
        assert store.server.pid("worker") != worker
    await asyncio.to_thread(store.until_quiet, open_files)
