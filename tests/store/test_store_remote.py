"""Adapters of a remote source through the store, with the real compiler: fetched once, kept, replaced, restarted."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load, save

from adapters_store.catalog import Catalog
from adapters_store.errors import (
    AdapterCorrupt,
    AdapterDenied,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
    RawDamaged,
)
from adapters_store.host import HostCache
from adapters_store.image import read_header
from adapters_store.limits import Limits
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.store import AdapterStore
from tests.store.bases import peft_model
from tests.store.fake_source import FakeSource, Files
from tests.store.images import Image, worst_error


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(plain_adapter) -> Files:
    return {path.name: path.read_bytes() for path in plain_adapter.iterdir() if path.suffix != ".md"}


def scaled(files: Files, factor: float) -> Files:
    """Other weights of the same shapes."""
    tensors = {name: tensor * factor for name, tensor in load(files["adapter_model.safetensors"]).items()}
    return files | {"adapter_model.safetensors": save(tensors)}


@pytest_asyncio.fixture
async def source(files):
    source = FakeSource()
    source.put("fr", files)
    return source


@pytest_asyncio.fixture
async def open_store(base, tmp_path, source, clock):
    """A store over the cache folder of this test; opening it again, closed, is a restart."""
    opened = []

    def open_(policy: NamePolicy | None = None, limits: Limits | None = None, **options: object) -> AdapterStore:
        tier = RemoteTier(
            [source],
            tmp_path / "cache",
            policy=policy or NamePolicy(patience_s=0.1),
            limits=limits,
            clock=clock,
            **options,
        )
        catalog = Catalog([], ["base"], remote=tier)
        opened.append(AdapterStore(tmp_path / "cache", base.manifest, catalog, limits=limits))
        return opened[-1]

    yield open_
    for store in opened:
        await store.close()
        assert not store.disk.num_leases and not store.catalog.remote.raw.num_leases
    assert list((tmp_path / "cache").rglob("*.tmp")) == []


@pytest_asyncio.fixture
async def store(open_store):
    store = open_store()
    await store.start()
    return store


async def ensured(store: AdapterStore, name: str = "fr"):
    return await store.ensure(await store.resolve(name))


def raw_files(store: AdapterStore) -> list[Path]:
    return sorted(store.catalog.remote.raw._dir.glob("*/*"))


# --- from a name to an image ----------------------------------------------------------------------------


async def test_from_a_remote_name_to_an_image_that_is_pefts(store, source, base, plain_adapter):
    source.adapters["fr"][1]["optimizer.pt"] = b"never noted"
    version = await store.resolve("fr")
    ref = await store.ensure(version)
    assert (ref.name, ref.version) == ("fr", version.key)
    image = Image(read_header(Path(ref.image_path)), bytes(HostCache(1 << 20).get(ref)), base.manifest)
    assert worst_error(peft_model(base, plain_adapter), image, base) < 3e-6
    assert store.lookup(version.key) == ref
    phases = store.phases(version.key)
    assert set(phases) == {"resolve", "raw_queue", "fetch", "queue", "compile"}
    assert all(value >= 0 for value in phases.values())
    raw = store.tier().raw
    assert (raw.num_entries, raw.fetches, raw.hits) == (1, 1, 0)
    assert raw.num_bytes == raw.fetched_bytes > 0
    assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in raw_files(store))


async def test_a_warm_adapter_asks_the_source_for_nothing(store, source):
    for _ in range(10):
        await ensured(store)
    assert source.calls["resolve"] == 2  # at first, and after the fetch
    assert (store.compiles, store.tier().raw.fetches) == (1, 1)


async def test_a_restart_fetches_and_compiles_nothing(store, open_store, source):
    ref = await ensured(store)
    await store.close()
    source.go_down()
    again = open_store()  # not started: it needs no compiler
    assert await ensured(again) == ref
    assert (again.compiles, again.worker.pid, again.tier().raw.fetches) == (0, None, 0)
    assert again.tier().raw.stale_uses == 1


async def test_a_lost_image_is_compiled_from_the_files_that_are_here(store, open_store, source, tmp_path):
    ref = await ensured(store)
    await store.close()
    shutil.rmtree(tmp_path / "cache" / "images")
    shutil.rmtree(tmp_path / "cache" / "index")
    source.go_down()
    again = open_store()
    assert (await ensured(again)).checksum == ref.checksum
    raw = again.tier().raw
    assert (again.compiles, raw.fetches, raw.hits) == (1, 0, 1)


async def test_offline_and_nothing_here_is_unavailable(store, open_store, source, tmp_path):
    await ensured(store)
    await store.close()
    for tier in ("images", "index", "raw"):
        shutil.rmtree(tmp_path / "cache" / tier)
    source.go_down()
    again = open_store()
    with pytest.raises(AdapterUnavailable):
        await ensured(again)


async def test_the_same_bytes_under_two_names_are_one_image(store, source, files):
    source.put("team/copy", files)
    first, second = await ensured(store), await ensured(store, "team/copy")
    assert first.image_key == second.image_key and first.version != second.version
    assert (store.compiles, store.tier().raw.fetches) == (1, 2)


async def test_a_pickle_is_refused_by_name_and_never_fetched(store, source, files):
    pickled = {name: content for name, content in files.items() if name != "adapter_model.safetensors"}
    source.put("old", pickled | {"adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin"):
        await ensured(store, "old")
    assert all(path.name != "adapter_model.bin" for path in raw_files(store))


# --- replacement ----------------------------------------------------------------------------------------


async def test_a_replaced_adapter_is_served_to_new_requests(store, source, files, clock):
    old = await ensured(store)
    store.lease(old)
    source.put("fr", scaled(files, 2))
    assert await ensured(store) == old  # within the interval
    clock.now += 10
    new = await ensured(store)
    assert new.checksum != old.checksum
    assert store.lookup(old.version) == old  # who runs keeps it
    store.release(old)


async def test_files_that_change_between_resolve_and_fetch(store, source, files):
    """The version that was asked for is gone; the one that is there is fetched, under its own key."""
    version = await store.resolve("fr")
    source.put("fr", scaled(files, 3))
    ref = await store.ensure(version)
    current = await store.resolve("fr")
    assert ref.version == current.key != version.key
    assert store.lookup(version.key) is None


async def test_files_that_change_during_the_fetch(store, source, files):
    """The first file is of the old version when it is read; what is served is whole."""
    changes = iter([scaled(files, 3)])

    def fault(call: str) -> None:
        if call == "half" and (changed := next(changes, None)) is not None:
            source.put("fr", changed)

    version = await store.resolve("fr")
    source.fault = fault
    ref = await store.ensure(version)
    assert ref.version == (await store.catalog.remote.again(version)).key != version.key


async def test_files_that_change_right_after_the_fetch_are_fetched_anew(store, source, files):
    """They may have been noted while a pair was being replaced."""
    version = await store.resolve("fr")
    fetch = source.fetch

    async def then_changed(*args: object) -> None:
        await fetch(*args)
        if source.calls["resolve"] < 2:
            source.put("fr", scaled(files, 3))

    source.fetch = then_changed
    ref = await store.ensure(version)
    assert ref.version != version.key
    assert [path.name for path in {path.parent for path in raw_files(store)}] == [ref.version]


async def test_files_that_keep_changing(store, source, files, monkeypatch):
    monkeypatch.setattr("adapters_store.store.FETCH_BACKOFF_S", 0.001)
    version = await store.resolve("fr")
    source.fault = lambda call: source.put("fr", files) if call == "half" else None
    with pytest.raises(AdapterUnavailable, match="keep changing"):
        await store.ensure(version)
    assert raw_files(store) == []


async def test_an_adapter_that_goes_away_before_the_fetch(store, source):
    version = await store.resolve("fr")
    source.delete("fr")
    with pytest.raises(AdapterNotFound):
        await store.ensure(version)


@pytest.mark.parametrize("policy", ["drop", "keep"])
async def test_what_is_deleted_is_dropped_or_kept_by_policy(open_store, source, clock, policy):
    store = open_store(NamePolicy(on_source_delete=policy, patience_s=0.1))
    ref = await ensured(store)
    source.delete("fr")
    clock.now += 10
    if policy == "keep":
        assert await ensured(store) == ref
        forget_images(store)
        assert (await ensured(store)).checksum == ref.checksum  # its files are here too
        forget_images(store)
        store.catalog.remote.raw.discard(ref.version)
    with pytest.raises(AdapterNotFound):
        await ensured(store)


# --- damage ---------------------------------------------------------------------------------------------


def forget_images(store: AdapterStore) -> None:
    for path in store.disk.images_dir.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "gone", "record"])
async def test_damaged_files_are_dropped_and_fetched_again(store, source, damage):
    ref = await ensured(store)
    forget_images(store)
    (weights,) = (path for path in raw_files(store) if path.suffix == ".safetensors")
    if damage == "other bytes":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "shorter":
        os.truncate(weights, 100)
    elif damage == "gone":
        weights.unlink()
    else:
        (weights.parent / "record.json").write_bytes(b"{}")
    assert (await ensured(store)).checksum == ref.checksum
    assert store.tier().raw.fetches == 2


async def test_files_damaged_each_time_are_an_error(store, source):
    fetch = source.fetch

    async def then_damaged(version, folder: Path, limits) -> None:
        await fetch(version, folder, limits)
        adopt = store.catalog.remote.raw.adopt

        def damaging(version, folder: Path, sha256: dict[str, str]) -> None:
            adopt(version, folder, dict.fromkeys(sha256, "0" * 64))

        store.catalog.remote.raw.adopt = damaging if adopt.__name__ == "adopt" else adopt

    source.fetch = then_damaged
    with pytest.raises(RawDamaged):
        await ensured(store)
    assert store.tier().raw.fetches == 2


@pytest.mark.parametrize("when", ["folder", "fetch", "adopt"])
async def test_a_full_disk_is_an_error_of_one_request(store, source, files, clock, when):
    source.put("other", scaled(files, 2))
    raw = store.catalog.remote.raw
    full = OSError(errno.ENOSPC, "No space left on device")
    calls = 0

    def refuse(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise full

    def refuse_fetch(call: str) -> None:
        if call == "half":
            refuse()

    if when == "folder":
        raw.new_folder = refuse
    elif when == "adopt":
        raw.adopt = refuse
    else:
        source.fault = refuse_fetch
    with pytest.raises(AdapterUnavailable, match="No space left"):
        await ensured(store)
    raw.__dict__.pop("new_folder", None)
    raw.__dict__.pop("adopt", None)
    source.come_back()
    assert calls == 1
    assert (await ensured(store, "other")).name == "other"
    with pytest.raises(AdapterUnavailable, match="No space left"):  # remembered for a moment
        await ensured(store)
    store._failures.forget((await store.resolve("fr")).key)
    assert (await ensured(store)).name == "fr"


async def test_a_full_disk_for_the_index_is_an_error_of_one_request(store, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    version = await store.resolve("fr")
    with monkeypatch.context() as patch:
        patch.setattr(store.disk, "_write_entry", full)
        with pytest.raises(AdapterUnavailable, match="No space left"):
            await store.ensure(version)


# --- failures -------------------------------------------------------------------------------------------


async def test_a_bad_adapter_is_an_error_for_a_moment_and_its_repair_is_seen(store, source, files, clock):
    config = json.loads(files["adapter_config.json"])
    source.put("fr", files | {"adapter_config.json": json.dumps(config | {"r": 9}).encode()})
    with pytest.raises(AdapterInvalid, match="r = 9"):
        await ensured(store)
    broken = source.adapters["fr"]
    source.put("fr", files)  # no need to wait for the interval: a version that failed is in doubt
    assert (await ensured(store)).name == "fr"
    source.adapters["fr"] = broken
    clock.now += 10
    for _ in range(5):
        with pytest.raises(AdapterInvalid, match="r = 9"):
            await ensured(store)
    assert store.tier().raw.fetches == 2


async def test_a_failure_of_the_same_version_is_tried_again_later(store, source, monkeypatch):
    version = await store.resolve("fr")
    source.go_down()
    with pytest.raises(AdapterUnavailable, match="down"):
        await store.ensure(version)
    source.come_back()
    with pytest.raises(AdapterUnavailable, match="down"):
        await store.ensure(version)
    now = store._failures._clock() + 5
    monkeypatch.setattr(store._failures, "_clock", lambda: now)
    assert (await store.ensure(version)).name == "fr"


async def test_errors_of_the_source_keep_their_class(store, source):
    for number, error in enumerate((AdapterDenied("no entry"), AdapterCorrupt("checksum"), AdapterUnavailable("slow"))):
        source.put(f"a{number}", source.adapters["fr"][1])
        version = await store.resolve(f"a{number}")

        def fault(call: str, error=error) -> None:
            raise error

        source.fault = fault
        with pytest.raises(type(error), match=error.message):
            await store.ensure(version)
        source.come_back()


async def test_limits_hold_before_the_download(open_store, source):
    for limits in (Limits(max_file_bytes=1000), Limits(max_json_bytes=10)):
        store = open_store(limits=limits)
        with pytest.raises(AdapterTooLarge):
            await ensured(store)
    assert source.calls["fetch"] == 0


# --- single flight, turns, cancellation, quota ------------------------------------------------------------


async def test_many_callers_share_one_fetch_and_one_compile(store, source):
    version = await store.resolve("fr")
    refs = await asyncio.gather(*(store.ensure(version) for _ in range(50)))
    assert all(ref == refs[0] for ref in refs)
    assert (store.compiles, store.tier().raw.fetches) == (1, 1)


async def test_fetches_at_once_are_bounded(open_store, source, files):
    store = open_store(max_fetches=3)
    for number in range(10):
        source.put(f"a{number}", files)
    await asyncio.gather(*(ensured(store, f"a{number}") for number in range(10)))
    assert source.most_at_once == 3


async def test_a_slow_source_leaves_turns_to_the_others(tmp_path, source, files):
    other = FakeSource("fake://other")
    other.put("quick", {"adapter_config.json": b"{}"})
    tier = RemoteTier([source, other], tmp_path / "cache", max_fetches=3)
    source.gate.clear()
    noted = tuple(FileVersion(name, len(content), etag="1") for name, content in files.items())
    held = [SourceVersion(source.source, f"x{index}", f"x{index}", noted) for index in range(5)]

    async def use(version: SourceVersion) -> None:
        async with tier.files(version, confirms=version.source == source.source):
            pass

    waiting = [asyncio.create_task(use(version)) for version in held]
    while not source.at_once:
        await asyncio.sleep(0)
    quick = await tier.names[1].resolve("quick")
    await asyncio.wait_for(use(quick), 10)
    assert source.most_at_once == 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await tier.close()


async def test_files_are_hashed_and_read_in_threads_that_requests_do_not_need(open_store, source, files):
    source.put("chat", files | {"chat_template.jinja": b"hello"})
    store, block = open_store(), threading.Event()
    version, tier = await store.resolve("chat"), store.catalog.remote
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    stalled = loop.run_in_executor(None, block.wait)
    try:
        async with asyncio.timeout(10), tier.files(version):
            assert (await tier.chat_template(version)).source == "hello"
    finally:
        block.set()
        await stalled


async def test_a_fetch_over_the_quota_alone_is_refused_before_it_begins(open_store, source, files):
    store = open_store(quota_bytes=100)
    with pytest.raises(AdapterTooLarge, match="quota of this server for fetched files is 100"):
        await ensured(store)
    assert source.calls["fetch"] == 0


async def test_a_fetch_is_given_up_when_the_last_has_left(store, source):
    version = await store.resolve("fr")
    source.gate.clear()
    tasks = [asyncio.create_task(store.ensure(version)) for _ in range(2)]
    while not source.at_once:
        await asyncio.sleep(0)
    assert store.catalog.remote.is_fetching(version.key)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    assert source.at_once == 1
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert source.at_once == 0 and not store.catalog.remote.is_fetching(version.key)
    async with asyncio.timeout(5):
        while list(store.catalog.remote.raw._dir.glob(".*")):  # a thread deletes them
            await asyncio.sleep(0.01)
    source.gate.set()
    assert (await store.ensure(version)).name == "fr"


async def test_files_go_for_the_quota_and_images_stay(open_store, source, files):
    store = open_store(quota_bytes=0, eviction_grace_s=0.05)
    refs = []
    for number in range(4):
        source.put(f"a{number}", scaled(files, number + 2))
        refs.append(await ensured(store, f"a{number}"))
        await asyncio.sleep(0.06)
    raw = store.tier().raw
    assert raw.evictions >= 3 and raw.num_entries <= 1
    assert all(store.lookup(ref.version) == ref for ref in refs)
    assert (await ensured(store, "a0")) == refs[0] and store.tier().raw.fetches == 4


# --- chat templates -------------------------------------------------------------------------------------


async def test_a_template_is_read_from_the_fetched_files(store, source, files):
    source.put("chat", files | {"chat_template.jinja": b"hello"})
    version = await store.resolve("chat")
    await store.ensure(version)
    template = await store.catalog.chat_template(version)
    assert (template.source, template.file) == ("hello", "chat_template.jinja")
    assert store.tier().raw.fetches == 1


async def test_a_template_does_not_wait_for_the_weights(store, source, files):
    source.put("chat", files | {"chat_template.jinja": b"hello"})
    version = await store.resolve("chat")
    found = await asyncio.gather(*(store.catalog.chat_template(version) for _ in range(10)))
    assert {template.source for template in found} == {"hello"}
    assert source.calls["half"] == 1  # one file
    assert (await store.ensure(version)).name == "chat"


async def test_a_template_waits_for_its_turn_a_bounded_time_and_an_adapter_does_not(open_store, source, files):
    store = open_store(NamePolicy(turn_s=0.05), max_fetches=1)
    await store.start()
    for name in ("chat", "other"):
        source.put(name, files | {"chat_template.jinja": name.encode()})
    chat, other, fr = [await store.resolve(name) for name in ("chat", "other", "fr")]
    source.gate.clear()
    held = asyncio.create_task(store.catalog.remote.chat_template(other))
    while not source.at_once:
        await asyncio.sleep(0)
    adapter = asyncio.create_task(store.ensure(fr))
    with pytest.raises(AdapterUnavailable, match="too many fetches from fake://bucket/team are under way"):
        await asyncio.wait_for(store.catalog.chat_template(chat), 5)
    assert not adapter.done()
    source.gate.set()
    assert (await held).source == "other"
    assert (await adapter).name == "fr"
    assert (await store.catalog.chat_template(chat)).source == "chat"


async def test_no_template_fetches_nothing(store, source):
    assert await store.catalog.chat_template(await store.resolve("fr")) is None
    assert source.calls["fetch"] == 0


async def test_a_damaged_template_is_fetched_again(store, source, files):
    source.put("chat", files | {"chat_template.jinja": b"hello"})
    version = await store.resolve("chat")
    await store.ensure(version)
    (file,) = (path for path in raw_files(store) if path.name == "chat_template.jinja")
    file.write_bytes(b"jello")
    assert (await store.catalog.chat_template(version)).source == "hello"


async def test_a_template_that_is_replaced_or_too_large(store, source, files):
    source.put("chat", files | {"chat_template.jinja": b"hello"})
    version = await store.resolve("chat")
    source.put("chat", files | {"chat_template.jinja": b"other"})
    with pytest.raises(AdapterUnavailable, match="being replaced"):
        await store.catalog.chat_template(version)
    assert (await store.catalog.chat_template(await store.resolve("chat"))).source == "other"  # asked anew
    source.put("large", files | {"chat_template.jinja": b"x" * (2 << 20)})
    before = source.calls["fetch"]
    with pytest.raises(AdapterTooLarge, match=r"chat_template\.jinja"):
        await store.catalog.chat_template(await store.resolve("large"))
    assert source.calls["fetch"] == before
