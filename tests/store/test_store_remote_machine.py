"""The whole store under random faults: every `ensure` ends in an image of the right version, or in a typed error."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import tempfile
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from adapters_store.catalog import Catalog
from adapters_store.compile.base import BaseWeights
from adapters_store.compile.job import CompileJob, CompileResult, run_job
from adapters_store.errors import AdapterCorrupt, AdapterDenied, AdapterError, AdapterNotFound, AdapterUnavailable
from adapters_store.host import read_image
from adapters_store.image import ImageHeader, write_image
from adapters_store.ref import AdapterRef
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.store import AdapterStore
from tests.store.bases import Base
from tests.store.fake_source import FakeSource, Files
from tests.store.images import compile_folder
from tests.store.test_store_remote import scaled

NAMES = ("a", "b", "c")
NUM_CONTENTS = 4
POLICIES = [
    NamePolicy(patience_s=0.2, on_source_down=down, on_source_delete=delete)
    for down in ("serve", "fail")
    for delete in ("drop", "keep")
]
FAULTS = {
    "unavailable": AdapterUnavailable("down"),
    "denied": AdapterDenied("no entry"),
    "corrupt": AdapterCorrupt("checksum"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
}


@dataclass
class Request:
    """One `ensure` under way, and since when the world counts for it (the fake clock's time)."""

    name: str
    since: float
    task: asyncio.Task[AdapterRef]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class StoreMachine(RuleBasedStateMachine):
    """The source is in memory, the compiler runs in place; the disk, the tiers and their owners are real."""

    base: Base
    contents: list[Files]
    checksums: list[str]  # of the contents' images
    runner: asyncio.Runner

    @initialize(policy=st.sampled_from(POLICIES))
    def open_world(self, policy: NamePolicy) -> None:
        self.cache = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.policy = policy
        self.requests: list[Request] = []
        self.leases: list[AdapterRef] = []
        self.history: dict[str, list[tuple[float, int | None]]] = {name: [(0.0, None)] for name in NAMES}
        self.is_broken = False
        self.broken_until = -1.0  # the last moment at which the source could not be asked
        self.damaged: set[str] = set()  # image keys
        self.source = self.run(self.make_source())
        for name in NAMES:
            self.put(name, 0)
        self.run(self.open_store())

    def run(self, work):
        return self.runner.run(work)

    async def make_source(self) -> FakeSource:
        return FakeSource()

    async def open_store(self) -> None:
        size = sum(map(len, self.contents[0].values()))
        tier = RemoteTier(
            [self.source],
            self.cache,
            policy=self.policy,
            quota_bytes=2 * size,
            max_fetches=2,
            eviction_grace_s=0.0,
            clock=self.clock,
        )
        catalog = Catalog([], ["base"], remote=tier)
        self.store = AdapterStore(
            self.cache, self.base.manifest, catalog, quota_bytes=2 * self.image_bytes, eviction_grace_s=0.0
        )
        self.store._failures._clock = self.clock
        self.store.worker.compile = self.compile

    async def compile(self, job: CompileJob) -> CompileResult:
        await asyncio.sleep(0)
        try:
            result = run_job(job, self.base.manifest, BaseWeights())
        except OSError as error:  # as the compiler process has it
            raise AdapterUnavailable(f"can't be compiled: {error!r}") from error
        await asyncio.sleep(0)
        return result

    # --- the source ---

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1))
    def put(self, name: str, content: int) -> None:
        self.source.put(name, self.contents[content])
        self.history[name].append((self.clock.now, content))

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        self.source.delete(name)
        self.history[name].append((self.clock.now, None))

    @rule(
        fault=st.sampled_from(sorted(FAULTS)),
        call=st.sampled_from(["resolve", "fetch", "half", "any"]),
        times=st.sampled_from([1, 1, 2, 1000]),
    )
    def break_source(self, fault: str, call: str, times: int) -> None:
        error, left = FAULTS[fault], times

        def fail(called: str) -> None:
            nonlocal left
            if left and call in (called, "any") and (called != "resolve" or not isinstance(error, OSError)):
                left -= 1
                raise error

        self.is_broken = True
        self.source.fault = fail

    @rule()
    def hang_source(self) -> None:
        self.is_broken = True
        self.source.gate.clear()

    @rule()
    def repair_source(self) -> None:
        if self.is_broken:
            self.is_broken, self.broken_until = False, self.clock.now
        self.source.come_back()
        self.source.gate.set()

    @rule(seconds=st.sampled_from([1.0, 4.0, 6.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    # --- requests ---

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        async def ask() -> AdapterRef:
            ref = await self.store.ensure(await self.store.resolve(name))
            self.store.lease(ref)
            return ref

        async def start() -> Request:
            return Request(name, self.clock.now, asyncio.create_task(ask()))

        self.requests.append(self.run(start()))

    @rule(name=st.sampled_from(NAMES))
    def ask_and_wait(self, name: str) -> None:
        self.ask(name)
        self.let_all_end()

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1))
    def replace_and_ask(self, name: str, content: int) -> None:
        self.put(name, content)
        self.wait(20.0)
        self.ask_and_wait(name)

    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        if not self.requests:
            return
        request = self.requests.pop(which % len(self.requests))

        async def cancel() -> None:
            request.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, AdapterError):
                self.leases.append(await request.task)  # it had ended before

        self.run(cancel())

    @rule(turns=st.integers(1, 30))
    def go_on(self, turns: int) -> None:
        async def go_on() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(go_on())
        self.look()

    @rule()
    def let_all_end(self) -> None:
        if not self.source.gate.is_set():
            self.repair_source()
        self.run(self.all_ended())
        self.look()

    async def all_ended(self) -> None:
        if self.requests:
            _, late = await asyncio.wait({request.task for request in self.requests}, timeout=20)
            assert not late, "a request never ended"

    def look(self) -> None:
        """The outcome of every request that has ended."""
        for request in [request for request in self.requests if request.task.done()]:
            self.requests.remove(request)
            error = request.task.exception()
            if error is None:
                ref = request.task.result()
                self.leases.append(ref)
                self.check(request, ref)
            else:
                assert isinstance(error, AdapterError), repr(error)
                if isinstance(error, AdapterNotFound):
                    assert None in self.possible(request, self.policy.miss_ttl_s), "a 404 for what was there all along"

    def possible(self, request: Request, age_s: float) -> set[int | None]:
        """What the name was between `age_s` before the request and now."""
        start, found = request.since - age_s, set()
        history = self.history[request.name]
        for index, (_, content) in enumerate(history):
            ended = history[index + 1][0] if index + 1 < len(history) else float("inf")
            if ended >= start:
                found.add(content)
        return found

    def check(self, request: Request, ref: AdapterRef) -> None:
        allowed = self.possible(request, self.policy.poll_interval_s)
        is_kept = self.policy.on_source_delete == "keep" and None in allowed
        is_unconfirmed = self.is_broken or self.broken_until >= request.since - 2 * self.policy.poll_interval_s
        if is_kept or (is_unconfirmed and self.policy.on_source_down == "serve"):
            allowed = {content for _, content in self.history[request.name]}
        found = {index for index, checksum in enumerate(self.checksums) if checksum == ref.checksum}
        assert found & allowed, f"content {found} of {request.name}, allowed {allowed}"
        self.read(ref)

    def read(self, ref: AdapterRef) -> None:
        """As the engine does: a damaged image is told, compiled anew and right."""
        try:
            read_image(ref, bytearray(ref.data_bytes))
        except AdapterError as error:
            assert ref.image_key in self.damaged, repr(error)
            self.store.discard(ref)

    @rule()
    def release(self) -> None:
        if self.leases:
            self.store.release(self.leases.pop())

    # --- the disk ---

    @rule(how=st.sampled_from(["flip", "cut", "remove"]), which=st.integers(0, 20))
    def damage_raw(self, how: str, which: int) -> None:
        files = sorted((self.cache / "raw").glob("[0-9a-f]*/*"))
        if files:
            damage(files[which % len(files)], how)

    @rule(how=st.sampled_from(["flip", "cut", "remove"]), which=st.integers(0, 20))
    def damage_image(self, how: str, which: int) -> None:
        files = sorted((self.cache / "images").glob("[0-9a-f]*.safetensors"))
        if files:
            file = files[which % len(files)]
            damage(file, how)
            self.damaged.add(file.name.partition(".")[0])

    @rule(is_killed=st.booleans())
    def restart(self, is_killed: bool) -> None:
        if is_killed:  # what a kill leaves half-written
            (self.cache / "raw" / ".half.tmp").mkdir()
            (self.cache / "raw" / ".half.tmp" / "adapter_config.json").write_bytes(b"{")

        async def restart() -> None:
            tasks = [request.task for request in self.requests]
            await self.store.close()
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, AdapterRef | AdapterError | asyncio.CancelledError), repr(outcome)
            self.requests.clear()
            self.leases.clear()
            await self.open_store()

        self.run(restart())

    # --- the end ---

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.let_all_end()
        while self.leases:
            self.release()
        self.run(self.still_works())
        assert (self.store.disk.num_leases, self.store.catalog.remote.raw.num_leases) == (0, 0)
        assert len(self.store._flights) == 0 and self.source.at_once == 0
        self.run(self.store.close())
        assert list(self.cache.rglob("*.tmp")) == []
        shutil.rmtree(self.cache)

    async def still_works(self) -> None:
        """Repaired and with what is remembered outlived, every name is what the source has now."""
        self.source.come_back()
        for name in NAMES:
            self.clock.now += 100
            self.source.put(name, self.contents[0])
            for _ in range(3):  # a source that was down is asked in the background first
                self.clock.now += 20
                try:
                    version = await self.store.resolve(name)
                    ref = await self.store.ensure(version)
                    read_image(ref, bytearray(ref.data_bytes))
                except AdapterCorrupt:
                    self.store.discard(ref)
                except AdapterError:
                    pass
                await asyncio.sleep(0.001)
            self.clock.now += 20
            ref = await self.store.ensure(await self.store.resolve(name))
            assert ref.checksum == self.checksums[0]


def damage(file: Path, how: str) -> None:
    if how == "remove":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.fixture(scope="module")
def machine(base, plain_adapter, tmp_path_factory) -> type[StoreMachine]:
    sound = {path.name: path.read_bytes() for path in plain_adapter.iterdir() if path.suffix != ".md"}
    StoreMachine.base = base
    StoreMachine.contents = [scaled(sound, factor + 1) for factor in range(NUM_CONTENTS)]
    StoreMachine.checksums = []
    for content in StoreMachine.contents:
        folder = tmp_path_factory.mktemp("content")
        for name, written in content.items():
            (folder / name).write_bytes(written)
        header = write_image_of(folder, base)
        StoreMachine.checksums.append(header.checksum)
        StoreMachine.image_bytes = header.data_offset + header.data_bytes
    assert len(set(StoreMachine.checksums)) == NUM_CONTENTS
    return StoreMachine


def write_image_of(folder: Path, base: Base) -> ImageHeader:
    sites = compile_folder(folder, base).sites
    return write_image(folder / "image", sites, base.manifest, image_key="k", digest="d", compiler_version=1)


async def in_place(function, *args):
    """Instead of asyncio.to_thread: what hypothesis replays must not depend on threads."""
    await asyncio.sleep(0)
    return function(*args)


class InPlace(Executor):
    """Instead of the raw tier's threads, for the same reason."""

    def submit(self, work, /, *args, **given):
        done = Future()
        try:
            done.set_result(work(*args, **given))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.mark.timeout(120)
def test_every_request_ends_right_whatever_breaks(machine, monkeypatch):
    monkeypatch.setattr(asyncio, "to_thread", in_place)
    monkeypatch.setattr("adapters_store.disk_threads.RAW_THREADS", InPlace())
    with asyncio.Runner() as runner:
        machine.runner = runner
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
