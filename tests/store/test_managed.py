"""What managing adapters asks of the store: reports by the compiler process, reloads, adapters under other names."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest
import pytest_asyncio

from adapters_store.catalog import Catalog
from adapters_store.compile import job
from adapters_store.errors import AdapterDenied, AdapterNotFound, AdapterUnavailable
from adapters_store.inspect import inspect_adapter
from adapters_store.limits import Limits
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.local import LocalSource
from adapters_store.sources.named import NamedSource
from adapters_store.store import AdapterStore
from tests.store.fake_source import FakeSource


@pytest_asyncio.fixture
async def source(plain_adapter):
    source = FakeSource()
    source.put("fr", {path.name: path.read_bytes() for path in plain_adapter.iterdir() if path.suffix != ".md"})
    return source


@pytest_asyncio.fixture
async def open_store(base, tmp_path, source, plain_adapter):
    """A store over one folder and one remote source, asked once an hour; opening it again, closed, is a restart."""
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "local").symlink_to(plain_adapter)
    opened = []

    async def open_(max_rank: int = 512) -> AdapterStore:
        policy = NamePolicy(poll_interval_s=3600, miss_ttl_s=3600, patience_s=0.1)
        limits = Limits(max_rank=max_rank)
        tier = RemoteTier([source], tmp_path / "cache", policy=policy, limits=limits)
        folder = LocalSource(plain_adapter.parent)
        catalog = Catalog([folder], ["base"], named=NamedSource([folder.root]), remote=tier, list_age_s=0)
        opened.append(AdapterStore(tmp_path / "cache", base.manifest, catalog, limits=limits))
        await opened[-1].start()
        return opened[-1]

    yield open_
    for store in opened:
        await store.close()
        assert not store.disk.num_leases and not store.catalog.remote.raw.num_leases


@pytest_asyncio.fixture
async def store(open_store):
    return await open_store()


# --- inspect --------------------------------------------------------------------------------------------


async def test_a_report_is_what_inspect_says_and_nothing_is_compiled(store, base, plain_adapter):
    expected = inspect_adapter(plain_adapter, base.manifest)
    for name in (plain_adapter.name, "fr"):
        version = await store.resolve(name)
        report = await store.inspect(version)
        for field in ("family", "digest", "file_bytes", "image_bytes", "ranks", "targets", "options", "dropped"):
            assert getattr(report, field) == getattr(expected, field), field
        assert report.image_bytes > 0 and report.problems == []
        assert store.peek(version.key) is None and store.compiles == store.disk.num_images == 0
    ref = await store.ensure(version)
    assert (ref.data_bytes, ref.digest) == (report.image_bytes, report.digest)


async def test_a_report_has_every_problem_that_inspect_finds(store, source, base, tmp_path):
    _, files = source.adapters["fr"]
    config = json.loads(files["adapter_config.json"]) | {"use_dora": True}
    source.put("bad", files | {"adapter_config.json": json.dumps(config).encode()})
    source.put("worse", files | {"adapter_model.safetensors": b"not at all"})
    for name in ("bad", "worse"):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in source.adapters[name][1].items():
            (folder / file).write_bytes(content)
        expected = inspect_adapter(folder, base.manifest).problems
        report = await store.inspect(await store.resolve(name))
        assert report.problems == expected != []
        assert report.image_bytes == 0


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_report_keeps_the_limits_of_this_server(open_store, plain_adapter, is_remote):
    store = await open_store(max_rank=2)
    report = await store.inspect(await store.resolve("fr" if is_remote else plain_adapter.name))
    assert {code for code, _ in report.problems} == {"adapter_too_large"} and "2" in report.problems[0][1]


async def test_files_too_large_to_be_read_are_a_problem_too(base, plain_adapter, monkeypatch):
    monkeypatch.setattr(job, "ATTEMPTS", 1)
    version = LocalSource(plain_adapter.parent).resolve(plain_adapter.name)
    from adapters_store.inspect import InspectJob, run_inspection

    report = run_inspection(InspectJob(version, Limits(max_file_bytes=10)), base.manifest)
    assert [code for code, _ in report.problems] == ["adapter_too_large"] and report.digest == ""


async def test_a_folder_that_leads_out_is_not_reported_on(store, tmp_path, plain_adapter):
    """As for a compile: a client names a path, and no file that leaves the root is opened."""
    version = await store.resolve(plain_adapter.name)
    moved = plain_adapter.rename(tmp_path / "moved")
    try:
        plain_adapter.symlink_to(moved)
        with pytest.raises(AdapterNotFound):
            await store.inspect(version)
    finally:
        plain_adapter.unlink()
        moved.rename(plain_adapter)


async def test_reports_follow_each_other_and_the_wait_is_bounded(store, monkeypatch):
    monkeypatch.setattr("adapters_store.store.INSPECT_TURN_S", 0.05)
    version = await store.resolve("fr")
    await store.inspect(version)
    pid = store.worker.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        first = asyncio.create_task(store.inspect(version))
        await asyncio.sleep(0.02)
        with pytest.raises(AdapterUnavailable, match="too many"):
            await store.inspect(version)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await first).problems == []


async def test_a_compiler_that_dies_over_a_report(store):
    version = await store.resolve("fr")
    os.kill(store.worker.pid, signal.SIGSTOP)
    task = asyncio.create_task(store.inspect(version))
    while store.worker._running is None:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    os.kill(store.worker.pid, signal.SIGKILL)
    with pytest.raises(AdapterUnavailable, match="compiler process ended"):
        await task
    assert (await store.inspect(version)).problems == []


# --- reload ---------------------------------------------------------------------------------------------


def touch(source: FakeSource, name: str = "fr") -> None:
    _, files = source.adapters[name]
    source.put(name, files | {"adapter_config.json": files["adapter_config.json"] + b" "})


async def test_a_reloaded_name_is_the_old_version_until_the_new_one_is_compiled(store, source):
    old = await store.resolve("fr")
    await store.ensure(old)
    touch(source)
    seen = []

    async def bring(version):
        ref = await store.ensure(version)  # which fetches, and asks once more after the fetch
        seen.append((await store.resolve("fr"), version))
        assert ref.version == version.key

    await store.catalog.reload("fr", bring)
    ((during, new),) = seen
    assert during == old != new == await store.resolve("fr")
    assert store.lookup(new.key) is not None


async def test_a_reload_that_fails_is_not_remembered_against_the_next(store, source):
    old = await store.resolve("fr")
    _, files = source.adapters["fr"]
    source.put("fr", files | {"adapter_model.safetensors": b"not at all"})

    async def bring(version):
        store.retry(version)
        await store.ensure(version)

    for _ in range(2):
        with pytest.raises(Exception, match="safetensors"):
            await store.catalog.reload("fr", bring)
        assert await store.resolve("fr") == old
    source.fault = raise_once(source)
    touch_back = source.adapters["fr"][1] | files
    source.put("fr", touch_back)
    with pytest.raises(AdapterUnavailable):
        await store.catalog.reload("fr", bring)
    await store.catalog.reload("fr", bring)
    assert (await store.resolve("fr")) != old


async def test_a_reload_asks_whatever_is_remembered(store, source):
    """A key that was missing at the store, an adapter that was not there yet: repaired, and then reloaded by hand."""

    def denied(call):
        raise AdapterDenied("access denied")

    source.fault = denied
    with pytest.raises(AdapterDenied):
        await store.resolve("fr")
    source.come_back()
    with pytest.raises(AdapterDenied):
        await store.resolve("fr")  # for an hour, here
    brought = []

    async def bring(version):
        brought.append(version)

    await store.catalog.reload("fr", bring)
    assert brought == [await store.resolve("fr")]


def raise_once(source):
    """The next fetch fails."""

    def fault(call):
        if call == "fetch":
            source.come_back()
            raise AdapterUnavailable("reset by peer")

    return fault


# --- other names ----------------------------------------------------------------------------------------


async def test_another_name_is_another_version_of_the_same_image(store, source):
    url = f"{source.source}/fr"
    version = await store.catalog.look_at("near", url)
    with pytest.raises(AdapterNotFound):
        await store.resolve("near")  # looking changes nothing
    store.catalog.assign(version)
    near, far = await store.ensure(await store.resolve("near")), await store.ensure(await store.resolve("fr"))
    assert (near.name, far.name) == ("near", "fr")
    assert near.image_key == far.image_key and near.version != far.version
    assert store.disk.num_images == 1
    names = [listing.name for listing in await store.list()]
    assert "near" in names and len(names) == len(set(names))
    store.catalog.release("near")
    with pytest.raises(AdapterNotFound):
        await store.resolve("near")


async def test_another_name_outlives_an_outage_and_a_restart(store, open_store, source):
    url = f"{source.source}/fr"
    store.catalog.assign(await store.catalog.look_at("near", url))
    ref = await store.ensure(await store.resolve("near"))
    await store.close()
    source.go_down()
    again = await open_store()
    again.catalog.assign(await again.catalog.look_at("near", url))
    assert again.lookup((await again.resolve("near")).key) == ref
    assert again.compiles == 0
    with pytest.raises(AdapterUnavailable):
        await again.catalog.look_at("never-seen", url)


async def test_a_name_given_again_is_what_its_source_has_now(store, source):
    """Uploaded, and given once more to replace what was there: whatever was remembered for an hour."""
    url = f"{source.source}/fr"
    old = await store.catalog.look_at("near", url)
    store.catalog.assign(old)
    touch(source)
    new = await store.catalog.look_at("near", url)
    assert new.key != old.key and await store.resolve("near") == old  # until it is assigned
    store.catalog.assign(new)
    assert await store.resolve("near") == new


async def test_another_name_goes_before_what_sources_have_and_leaves_it(store, source, plain_adapter):
    name = plain_adapter.name
    local = await store.resolve(name)
    store.catalog.assign(await store.catalog.look_at(name, f"{source.source}/fr"))
    assert store.catalog.is_given(name) and (await store.resolve(name)).source != local.source
    source.delete("fr")
    store.catalog.remote.aliases[name]._known.clear()
    with pytest.raises(AdapterNotFound):
        await store.resolve(name)  # it never becomes another
    store.catalog.release(name)
    assert await store.resolve(name) == local


@pytest.mark.parametrize("url", ["fake://bucket/team", "fake://bucket/teams/fr", "fake://bucket/team/../x", "", "fr"])
async def test_urls_below_no_source_are_refused(store, source, url):
    with pytest.raises(ValueError, match="adapter-source"):
        await store.catalog.look_at("x", url)
    assert source.calls["resolve"] == 0


async def test_a_name_given_one_remote_adapter_never_becomes_another(store, source):
    source.put("other", source.adapters["fr"][1])
    theirs = await store.resolve("fr")
    store.catalog.assign(await store.catalog.look_at("fr", f"{source.source}/other"))
    assert await store.resolve("fr") != theirs
    source.delete("other")

    async def bring(version):
        raise AssertionError(version)

    await store.catalog.reload("fr", bring)
    with pytest.raises(AdapterNotFound):
        await store.resolve("fr")
    store.catalog.release("fr")
    assert await store.resolve("fr") == theirs


async def test_urls_of_nothing_leave_nothing_behind(store, source, tmp_path):
    before, folders = dict(store.catalog.remote._by_source), sorted((tmp_path / "cache").rglob("*"))
    for index in range(5):
        with pytest.raises(AdapterNotFound):
            await store.catalog.look_at(f"x{index}", f"{source.source}/nobody")
    source.go_down()
    with pytest.raises(AdapterUnavailable):
        await store.catalog.look_at("y", f"{source.source}/fr")
    assert store.catalog.remote._by_source == before
    assert sorted((tmp_path / "cache").rglob("*")) == folders


async def test_names_that_come_and_go_leave_little_behind(store, source, tmp_path, monkeypatch):
    monkeypatch.setattr("adapters_store.remote_tier.MAX_SPARE", 3)
    remote, url = store.catalog.remote, f"{source.source}/fr"
    before = len(remote._by_source)
    for index in range(9):
        version = await store.catalog.look_at(f"x{index}", url)
        if index % 3:  # else the name was refused
            store.catalog.assign(version)
            assert await store.resolve(f"x{index}") == version
            store.catalog.remove(f"x{index}")
    assert len(remote._by_source) == len(remote._turns_of) == before + 3 and not remote.aliases
    assert not list((tmp_path / "cache" / "names").rglob("*.json"))
    assert (await store.ensure(version)).version == version.key  # of a request that runs under a name that is gone


async def test_a_name_that_is_looked_at_again_stays_known(store, source, monkeypatch):
    monkeypatch.setattr("adapters_store.remote_tier.MAX_SPARE", 1)
    url = f"{source.source}/fr"
    for _ in range(2):
        kept = await store.catalog.look_at("kept", url)
        store.catalog.assign(kept)
    for index in range(3):
        await store.catalog.look_at(f"y{index}", url)
    source.go_down()
    store.catalog.remote.aliases["kept"].doubt(kept)
    assert await store.resolve("kept") == kept


async def test_a_name_given_a_folder_is_no_longer_the_remote_ones(store, source, plain_adapter):
    store.catalog.assign(await store.catalog.look_at("near", f"{source.source}/fr"))
    store.catalog.assign(store.catalog.named.look("near", plain_adapter.name))
    assert (await store.resolve("near")).path == str(plain_adapter)
    store.catalog.assign(await store.catalog.look_at("near", f"{source.source}/fr"))
    assert (await store.resolve("near")).path != str(plain_adapter)
    store.catalog.remove("near")
    with pytest.raises(AdapterNotFound):
        await store.resolve("near")
