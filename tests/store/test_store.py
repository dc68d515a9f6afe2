"""The store with its real compiler process: single flight, restarts, torn reads, crashes, cancellation."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio
import uvloop
from safetensors.torch import load_file, save_file

from adapters_store.catalog import Catalog
from adapters_store.compile.base import BaseWeights
from adapters_store.compile.job import CompileJob, CompileResult, run_job
from adapters_store.errors import (
    AdapterCorrupt,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnsupported,
)
from adapters_store.host import HostCache
from adapters_store.image import read_header
from adapters_store.limits import Limits
from adapters_store.manifest import write_manifest
from adapters_store.sources.local import LocalSource
from adapters_store.store import AdapterStore
from adapters_store.worker import NICENESS, CompileWorker
from loadtest.adapters import write_random_adapter
from tests.store.bases import peft_model
from tests.store.images import Image, worst_error


@pytest.fixture
def root(tmp_path, plain_adapter) -> Path:
    root = tmp_path / "adapters"
    shutil.copytree(plain_adapter, root / "fr")
    return root


@pytest.fixture
def open_store(base, tmp_path, root):
    """A store over the cache folder of this test; opening it again is a restart."""

    def open_(**options: object) -> AdapterStore:
        return AdapterStore(tmp_path / "cache", base.manifest, Catalog([LocalSource(root)], ["base"]), **options)

    return open_


@pytest_asyncio.fixture
async def store(open_store):
    store = open_store()
    await store.start()
    yield store
    await store.close()


def scale_weights(folder: Path, factor: float) -> None:
    """Other weights of the same shapes, written as a trainer does: to the same file."""
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)


async def ensured(store: AdapterStore, name: str = "fr"):
    return await store.ensure(await store.resolve(name))


# --- from a name to an image ----------------------------------------------------------------------------


async def test_from_a_name_to_an_image_that_is_pefts(store, base, plain_adapter):
    version = await store.resolve("fr")
    assert store.lookup(version.key) is None
    ref = await store.ensure(version)
    assert store.lookup(version.key) == ref
    assert (ref.name, ref.version, ref.max_rank) == ("fr", version.key, 4)
    assert len(ref.sites) == 6
    header = read_header(Path(ref.image_path))
    assert (header.data_offset, header.data_bytes, header.checksum) == (ref.data_offset, ref.data_bytes, ref.checksum)
    image = Image(header, bytes(HostCache(1 << 20).get(ref)), base.manifest)
    assert worst_error(peft_model(base, plain_adapter), image, base) < 3e-6


async def test_phases_are_timed(store):
    version = await store.resolve("fr")
    assert set(store.phases(version.key)) == {"resolve"}
    started = time.perf_counter()
    await store.ensure(version)
    elapsed = time.perf_counter() - started
    phases = store.phases(version.key)
    assert set(phases) == {"resolve", "queue", "fetch", "compile"}
    assert all(seconds >= 0 for seconds in phases.values())
    assert phases["fetch"] + phases["compile"] + phases["queue"] <= elapsed
    assert store.phases("unknown") == {}


async def test_a_restart_compiles_nothing(store, open_store):
    ref = await ensured(store)
    await store.close()
    again = open_store()  # not started: it needs no compiler
    version = await again.resolve("fr")
    assert again.lookup(version.key) == ref
    assert await again.ensure(version) == ref
    assert (again.compiles, again.worker.pid) == (0, None)
    await again.close()


async def test_the_same_bytes_under_another_name_or_time_are_compiled_once(store, root):
    first = await ensured(store)
    shutil.copytree(root / "fr", root / "team" / "copy")
    second = await ensured(store, "team/copy")
    os.utime(root / "fr" / "adapter_config.json", (1, 1))
    third = await ensured(store)
    assert (first.image_key, first.digest) == (second.image_key, second.digest) == (third.image_key, third.digest)
    assert (second.name, third.name) == ("team/copy", "fr")
    assert len({ref.version for ref in (first, second, third)}) == 3
    assert store.compiles == 1


async def test_other_weights_are_another_image_and_the_old_one_stays(store, root):
    old = await ensured(store)
    store.lease(old)
    scale_weights(root / "fr", 2)
    new = await ensured(store)
    assert new.image_key != old.image_key
    assert new.checksum != old.checksum
    assert Path(old.image_path).exists()
    assert store.lookup(old.version) == old
    store.release(old)


async def test_an_image_of_another_base_is_another(store, open_store, base, base_of, root, tmp_path):
    ref = await ensured(store)
    other = msgspec.structs.replace(base.manifest, digest="another base")
    beside = AdapterStore(tmp_path / "cache", other, Catalog([LocalSource(root)], ["base"]))
    version = await beside.resolve("fr")
    assert beside.lookup(version.key) is None
    assert (await beside.ensure(version)).image_key != ref.image_key
    await beside.close()


async def test_a_damaged_image_is_compiled_anew(store):
    ref = await ensured(store)
    os.truncate(ref.image_path, ref.data_offset)
    assert store.lookup(ref.version) is None
    assert await ensured(store) == ref
    # a flipped bit is found by who reads the data
    content = bytearray(Path(ref.image_path).read_bytes())
    content[-1] ^= 1
    Path(ref.image_path).write_bytes(content)
    with pytest.raises(AdapterCorrupt):
        HostCache(0).get(ref)
    store.discard(ref)
    assert await ensured(store) == ref
    HostCache(0).get(ref)
    assert store.compiles == 3


async def test_leases_keep_images_under_a_quota(open_store, root):
    for number in range(4):
        shutil.copytree(root / "fr", root / f"a{number}")
        scale_weights(root / f"a{number}", number + 2)
    store = open_store(quota_bytes=0, eviction_grace_s=0.2)
    kept = await ensured(store, "a0")
    store.lease(kept)
    dropped = await ensured(store, "a1")
    await asyncio.sleep(0.25)
    last = await ensured(store, "a2")
    assert store.lookup(kept.version) is not None
    assert store.lookup(dropped.version) is None
    assert store.lookup(last.version) is not None  # just made
    store.release(kept)
    await store.close()


# --- failures -------------------------------------------------------------------------------------------


async def test_unknown_names(store):
    with pytest.raises(AdapterNotFound, match="nobody"):
        await store.resolve("nobody")


async def test_errors_keep_their_class_across_the_process(store, root, open_store):
    def bad(name: str, **config: object) -> Path:
        folder = root / name
        shutil.copytree(root / "fr", folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        return folder

    bad("dora", use_dora=True)
    bad("rank", r=9)
    truncated = bad("truncated") / "adapter_model.safetensors"
    os.truncate(truncated, 3000)
    os.utime(truncated, (1, 1))
    for name, error, word in (
        ("dora", AdapterUnsupported, "use_dora"),
        ("rank", AdapterInvalid, "r = 9"),
        ("truncated", AdapterCorrupt, "adapter_model.safetensors"),
    ):
        with pytest.raises(error, match=word) as raised:
            await ensured(store, name)
        assert type(raised.value) is error
    await ensured(store)  # others are unaffected
    assert store.compiles == 1


async def test_limits_reach_the_compiler(open_store, store):
    await store.close()
    for limits in (Limits(max_rank=3), Limits(max_file_bytes=1000), Limits(max_image_bytes=1000)):
        strict = open_store(limits=limits)
        with pytest.raises(AdapterTooLarge):
            await ensured(strict)
        await strict.close()


async def test_a_failure_is_not_remembered(store, root):
    config = root / "fr" / "adapter_config.json"
    sound = config.read_bytes()
    config.write_text("{")
    with pytest.raises(AdapterCorrupt):
        await ensured(store)
    version = await store.resolve("fr")
    config.write_bytes(sound)
    assert (await store.ensure(version)).name == "fr"  # even when asked with the failed version


async def test_an_adapter_that_goes_away_is_not_found(store, root):
    version = await store.resolve("fr")
    shutil.rmtree(root / "fr")
    with pytest.raises(AdapterNotFound):
        await store.ensure(version)


# --- single flight and cancellation ---------------------------------------------------------------------


async def test_many_callers_share_one_compile(store):
    version = await store.resolve("fr")
    jobs = 0
    run = store.worker.compile

    async def counting(job: CompileJob) -> CompileResult:
        nonlocal jobs
        jobs += 1
        return await run(job)

    store.worker.compile = counting
    refs = await asyncio.gather(*(store.ensure(version) for _ in range(50)))
    assert all(ref == refs[0] for ref in refs)
    assert (store.compiles, jobs) == (1, 1)


async def test_all_callers_get_the_failure(store, root):
    (root / "fr" / "adapter_config.json").write_text("{")
    version = await store.resolve("fr")
    outcomes = await asyncio.gather(*(store.ensure(version) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(outcome, AdapterCorrupt) for outcome in outcomes)


async def test_one_caller_that_leaves_does_not_take_the_others_along(store):
    version = await store.resolve("fr")
    leaving, staying = (asyncio.create_task(store.ensure(version)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    ref = await staying
    assert leaving.cancelled()
    assert ref.name == "fr"


async def test_when_the_last_caller_leaves_the_work_is_given_up(store, root):
    for number in range(3):
        shutil.copytree(root / "fr", root / f"a{number}")
        scale_weights(root / f"a{number}", number + 2)
    versions = [await store.resolve(f"a{number}") for number in range(3)]
    tasks = [asyncio.create_task(store.ensure(version)) for version in versions]
    await asyncio.sleep(0.001)
    for task in tasks[:2]:  # one at work, one in the queue
        task.cancel()
    ref = await tasks[2]
    assert ref.name == "a2"
    assert store.compiles == 1
    assert store.lookup(versions[1].key) is None
    assert (await store.ensure(versions[0])).name == "a0"


async def test_a_flight_given_up_does_not_take_its_successor_off_the_books(store):
    version = await store.resolve("fr")
    first = asyncio.create_task(store.ensure(version))
    await asyncio.sleep(0)
    first.cancel()
    second = asyncio.create_task(store.ensure(version))  # takes off before the first flight has ended
    await asyncio.sleep(0.005)
    third = asyncio.create_task(store.ensure(version))
    await asyncio.sleep(0)
    assert len(store._flights) == 1
    assert store._flights.waiters(version.key) == 2
    assert await second == await third


async def test_close_ends_what_is_under_way(open_store):
    store = open_store()
    await store.start()
    pid = store.worker.pid
    task = asyncio.create_task(ensured(store))
    await asyncio.sleep(0.02)
    await store.close()
    with pytest.raises((asyncio.CancelledError, AdapterUnavailable)):
        await task
    assert not psutil.pid_exists(pid)


# --- torn reads -----------------------------------------------------------------------------------------


async def test_files_that_change_between_resolve_and_read(store, root):
    """The version that was asked for is gone; the one that is there is compiled, under its own key."""
    version = await store.resolve("fr")
    scale_weights(root / "fr", 3)
    ref = await store.ensure(version)
    current = await store.resolve("fr")
    assert ref.version == current.key != version.key
    assert store.lookup(version.key) is None
    assert store.lookup(current.key) == ref


async def test_a_pair_is_never_torn(store, root):
    """A link is moved between two adapters while they are read: every image is one of a whole pair."""
    folder = root / "fr"
    config = json.loads((folder / "adapter_config.json").read_text())
    folder.rename(root / "v0")
    folder.symlink_to("v0")
    shutil.copytree(root / "v0", root / "v1")
    # alpha times B is the same for both, so both have one image; a torn pair would have another
    (root / "v1" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
    file = root / "v1" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor / 4 if "lora_B" in name else tensor for name, tensor in tensors.items()}, file)
    whole = {(await ensured(store, name)).checksum for name in ("v0", "v1")}
    assert len(whole) == 1
    done = threading.Event()

    def keep_moving() -> None:
        while not done.is_set():
            for target in ("v0", "v1"):
                (root / "next").symlink_to(target)
                (root / "next").rename(folder)
                time.sleep(random.random() * 0.002)

    mover = threading.Thread(target=keep_moving)
    mover.start()
    try:
        outcomes = [await _attempt(store) for _ in range(15)]
    finally:
        done.set()
        mover.join()
    assert {outcome for outcome in outcomes if isinstance(outcome, str)} <= whole
    assert any(isinstance(outcome, str) for outcome in outcomes)
    assert (await ensured(store)).checksum in whole


async def _attempt(store: AdapterStore) -> str | AdapterUnavailable:
    try:
        return (await ensured(store)).checksum
    except AdapterUnavailable as error:
        return error


@pytest.mark.parametrize("touched", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("num_changes", [3, 1000])
def test_torn_reads_are_repeated_a_few_times(num_changes, touched, root, base, tmp_path, monkeypatch):
    """A file is written after the config was read, that one or the next: once more, and at last given up."""
    changes = 0

    class Restless(LocalSource):
        def read(self, version, file):
            nonlocal changes
            content = super().read(version, file)
            if file.name == "adapter_config.json" and changes < num_changes:
                changes += 1
                os.utime(root / "fr" / touched, (changes, changes))
            return content

    job = job_of(root, "fr", tmp_path / "images")
    monkeypatch.setattr("adapters_store.compile.job.LocalSource", Restless)
    monkeypatch.setattr("adapters_store.compile.job.BACKOFF_S", 0.001)
    if num_changes > 100:
        with pytest.raises(AdapterUnavailable, match="keep changing"):
            run_job(job, base.manifest, BaseWeights())
        assert list((tmp_path / "images").iterdir()) == []
    else:
        ref = run_job(job, base.manifest, BaseWeights()).ref
        assert ref.version == LocalSource(root).resolve("fr").key


async def test_an_adapter_that_is_still_being_copied_is_looked_at_again(store, root):
    (root / "slow").mkdir()
    shutil.copy(root / "fr" / "adapter_config.json", root / "slow")
    content = (root / "fr" / "adapter_model.safetensors").read_bytes()
    (root / "slow" / "adapter_model.safetensors").write_bytes(content[:1000])
    task = asyncio.create_task(ensured(store, "slow"))
    await asyncio.sleep(0.05)
    (root / "slow" / "adapter_model.safetensors").write_bytes(content)
    assert (await task).name == "slow"


# --- the process ----------------------------------------------------------------------------------------


def job_of(root: Path, name: str, images: Path) -> CompileJob:
    images.mkdir(exist_ok=True)
    version = LocalSource(root).resolve(name)
    assert version is not None
    return CompileJob(version, str(images), Limits())


async def test_a_killed_compiler_costs_one_job_and_is_started_anew(store, root):
    shutil.copytree(root / "fr", root / "other")
    scale_weights(root / "other", 2)
    first = store.worker.pid
    stopped = psutil.Process(first)
    stopped.suspend()  # so that the job is surely at work when it dies
    task = asyncio.create_task(ensured(store))
    await asyncio.sleep(0.1)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(AdapterUnavailable, match="-9"):
        await task
    assert (await ensured(store)).name == "fr"
    assert (await ensured(store, "other")).name == "other"
    assert store.worker.pid not in (None, first)


async def test_a_compiler_killed_over_a_write_leaves_no_half_image(store, root, base):
    """It may be as large as any image, and who is killed for memory is killed again and again."""

    def kill(pid: int) -> None:
        while not task.done():
            if any(store.disk.images_dir.glob(".*.tmp")):
                os.kill(pid, signal.SIGKILL)
                return

    for seed in range(20):  # until one kill was in time
        write_random_adapter(root / "fr", base.manifest, 512, seed=seed)
        task = asyncio.create_task(ensured(store))
        await asyncio.to_thread(kill, store.worker.pid)
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, AdapterUnavailable):
            break
    assert isinstance(outcome, AdapterUnavailable)
    assert not list(store.disk.images_dir.glob(".*"))
    await ensured(store)
    assert len(list(store.disk.images_dir.iterdir())) == store.disk.num_images


async def test_a_compiler_that_died_idle_is_started_anew(store, root):
    await ensured(store)
    process = psutil.Process(store.worker.pid)
    process.kill()
    await asyncio.sleep(0.2)
    scale_weights(root / "fr", 2)
    assert (await ensured(store)).name == "fr"


async def test_the_compiler_gives_way_within_the_servers_session(store):
    """Between sessions Linux shares the processors evenly, whatever the niceness."""
    await ensured(store)
    pid = store.worker.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == NICENESS
    assert os.getsid(pid) == os.getsid(0)


async def test_a_job_over_the_timeout_is_ended(open_store, root):
    """A regular expression that backtracks for ever, from a config: the adapter fails, the store goes on."""
    config = root / "fr" / "adapter_config.json"
    sound = json.loads(config.read_text())
    config.write_text(json.dumps(sound | {"rank_pattern": {"(.+)+(.+)+(.+)+!": 4}}))
    store = open_store(compile_timeout_s=1.0)
    with pytest.raises(AdapterUnavailable, match="longer than 1 s"):
        await ensured(store)
    config.write_text(json.dumps(sound))
    assert (await ensured(store)).name == "fr"
    await store.close()


async def test_the_compiler_ends_with_its_client(base, tmp_path):
    write_manifest(base.manifest, tmp_path / "manifest.json")
    worker = CompileWorker(tmp_path / "manifest.json")
    await worker.start()
    pid = worker.pid
    await worker.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(AdapterUnavailable, match="shutting down"):
        await worker.start()


async def test_the_compiler_dies_with_a_killed_parent(base, tmp_path, root):
    write_manifest(base.manifest, tmp_path / "manifest.json")
    script = """
import asyncio, sys
from pathlib import Path
from adapters_store.worker import CompileWorker
async def main():
    worker = CompileWorker(Path(sys.argv[1]))
    await worker.start()
    print(worker.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(tmp_path / "manifest.json")), stdout=asyncio.subprocess.PIPE
    )
    pid = int(await parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    await parent.wait()
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("the compiler outlived its parent")


async def test_the_compiler_is_small_and_has_no_torch(store):
    await ensured(store)
    process = psutil.Process(store.worker.pid)
    maps = {Path(mapped.path).name for mapped in process.memory_maps()}
    assert not any("torch" in name for name in maps)
    assert process.memory_info().rss < 100 << 20


async def test_ctrl_c_in_the_terminal_is_the_parents_to_handle(store, root):
    await ensured(store)  # it leaves our group on its own, before its first job
    pid = store.worker.pid
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    scale_weights(root / "fr", 2)
    await ensured(store)
    assert store.worker.pid == pid


def test_the_servers_own_event_loop(open_store, root):
    """uvloop has its own subprocess code, which takes other arguments than asyncio's."""

    async def scenario() -> None:
        store = open_store()
        await store.start()
        assert (await ensured(store)).name == "fr"
        os.kill(store.worker.pid, signal.SIGKILL)
        scale_weights(root / "fr", 2)
        await asyncio.sleep(0.1)
        assert (await ensured(store)).name == "fr"
        await store.close()

    uvloop.run(scenario())
