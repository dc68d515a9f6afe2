"""The whole store under random faults: every `ensure` ends in an image of the right version, or in a typed error."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adapters_store.catalog import Catalog
from adapters_store.chat_template import AdapterTemplate
from adapters_store.compile.base import BaseWeights
from adapters_store.compile.job import CompileJob, CompileResult, compile_adapter, run_job
from adapters_store.errors import AdapterCorrupt, AdapterDenied, AdapterError, AdapterNotFound, AdapterUnavailable
from adapters_store.host import read_image
from adapters_store.image import ImageHeader, write_image
from adapters_store.limits import Limits
from adapters_store.raw import fetched_files
from adapters_store.ref import AdapterRef, FileVersion, SourceVersion
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.folder import NOTED_FILES, FileChanged
from adapters_store.store import AdapterStore
from tests.store.bases import Base
from tests.store.fake_source import FakeSource, Files
from tests.store.images import compile_folder
from tests.store.test_store_remote import scaled

NAMES = ("a", "b", "c")
NUM_CONTENTS = 4
ALPHAS = (1, 7, 11, 13)
"""of the contents' configs, times the plain one: no product with the weights' factors 1 to 4 comes twice"""
WEIGHTS, CONFIG, TEMPLATE = "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"
OUTLIVED_S = 11.0
"""a little more than the poll interval, which is longer than a failure is remembered"""
GRACE_S = 0.5
"""that an image or files just used stay whoever wants their room"""
Content = tuple[int, int]
"""which config (with its template) and which weights; unequal while one replaces the other"""
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


class Spans:
    """Pieces of work that ended well, by key: no two of one key at a time."""

    def __init__(self) -> None:
        self.doubled: list[str] = []
        self._ends: dict[str, int] = {}
        self._now = itertools.count()

    def begin(self) -> int:
        return next(self._now)

    def end(self, key: str, begun: int) -> None:
        if self._ends.get(key, -1) > begun:
            self.doubled.append(key)
        self._ends[key] = next(self._now)


class WatchedSource(FakeSource):
    """Files are put one by one. What was fetched is known, and whether it was asked for once more afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, tuple[int, bytes]]] = {}  # by name and file: a number of that put, the bytes
        self.spans = Spans()
        self.confirmed: set[str] = set()
        """keys of fetched versions that were the name's after the fetch too, or the source did not say"""
        self.damaged: set[str] = set()
        """keys of fetched versions that were damaged on disk since"""
        self._fetched: dict[str, set[str]] = {name: set() for name in NAMES}

    def put(self, name: str, files: Files) -> None:
        self._puts += 1
        self.files.setdefault(name, {}).update({file: (self._puts, content) for file, content in files.items()})

    def delete(self, name: str) -> None:
        self.files.pop(name, None)

    async def resolve(self, name: str) -> SourceVersion | None:
        try:
            await self._called("resolve")
        except AdapterError:
            self.confirmed |= self._fetched[name]
            raise
        files = self.files.get(name)
        if files is None:
            return None
        noted = [
            FileVersion(file, len(files[file][1]), etag=f"{files[file][0]}") for file in NOTED_FILES if file in files
        ]
        version = SourceVersion(self.source, name, f"{self.source}/{name}", tuple(noted))
        self.confirmed |= self._fetched[name] & {version.key}
        return version

    async def names(self) -> list[str]:
        await self._called("names")
        return sorted(self.files)

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        begun, key = self.spans.begin(), version.key
        self.at_once += 1
        try:
            limits.check_files(fetched_files(version))
            for part in fetched_files(version):
                await self._called("fetch")
                number, content = self.files.get(version.name, {}).get(part.name, (0, b""))
                if part.etag != f"{number}":
                    raise FileChanged(part.name)
                (folder / part.name).write_bytes(content[: len(content) // 2])  # a reader must never see this
                await self._called("half")
                (folder / part.name).write_bytes(content)
        finally:
            self.at_once -= 1
        self.spans.end(key, begun)
        self.confirmed.discard(key)
        self.damaged.discard(key)
        self._fetched[version.name].add(key)
        return {}


@dataclass
class Request:
    """One `ensure` (or one look for a template) under way, and since when the world counts for it."""

    name: str
    since: float
    """the fake clock's time"""
    task: asyncio.Task[AdapterRef | AdapterTemplate | None]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class StoreMachine(RuleBasedStateMachine):
    """The source is in memory, the compiler runs in place; the disk, the tiers and their owners are real."""

    base: Base
    contents: list[Files]
    checksums: dict[Content, str]  # of the contents' images
    runner: asyncio.Runner

    @initialize(policy=st.sampled_from(POLICIES))
    def open_world(self, policy: NamePolicy) -> None:
        self.cache = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.policy = policy
        self.requests: list[Request] = []
        self.leases: list[AdapterRef] = []
        self.history: dict[str, list[tuple[float, Content | None]]] = {name: [(0.0, None)] for name in NAMES}
        self.is_broken = False
        self.broken_until = -1.0  # the last moment at which the source could not be asked
        self.damaged: set[str] = set()  # image keys
        self.faults: list[str] = []  # of the store, seen where no request tells
        self.source = self.run(self.make_source())
        for name in NAMES:
            self.put(name, 0)
        self.run(self.open_store())

    def run(self, work):
        return self.runner.run(work)

    async def make_source(self) -> WatchedSource:
        self.compiler = asyncio.Event()
        self.compiler.set()
        return WatchedSource()

    async def open_store(self) -> None:
        size = sum(map(len, self.contents[0].values()))
        tier = RemoteTier(
            [self.source],
            self.cache,
            policy=self.policy,
            quota_bytes=2 * size + 1000,  # some other content has a few bytes more
            max_fetches=2,
            eviction_grace_s=GRACE_S,
            clock=self.clock,
        )
        catalog = Catalog([], ["base"], remote=tier)
        self.store = AdapterStore(
            self.cache, self.base.manifest, catalog, quota_bytes=2 * self.image_bytes, eviction_grace_s=GRACE_S
        )
        self.store._failures._clock = self.store.disk._lru._clock = tier.raw._lru._clock = self.clock
        self.store.worker.compile = self.compile
        self.compiles = Spans()

    async def compile(self, job: CompileJob) -> CompileResult:
        begun, key = self.compiles.begin(), job.version.key
        await asyncio.sleep(0)
        await self.compiler.wait()
        if key not in self.source.confirmed:
            self.faults.append("files were compiled that may be a torn pair: the source was not asked after the fetch")
        if not Path(job.folder).is_dir() and key not in self.source.damaged:
            self.faults.append("files went while they were leased")
        try:
            result = run_job(job, self.base.manifest, BaseWeights())
        except OSError as error:  # as the compiler process has it
            raise AdapterUnavailable(f"can't be compiled: {error!r}") from error
        await asyncio.sleep(0)
        self.compiles.end(key, begun)
        return result

    @invariant()
    def keeps_its_promises(self) -> None:
        """What no single request may notice."""
        if not hasattr(self, "store"):
            return
        assert not self.faults, self.faults
        assert not self.source.spans.doubled, "one version was fetched twice at a time"
        assert not self.compiles.doubled, "one version was compiled twice at a time"
        done = [
            request.task.result() for request in self.requests if request.task.done() and not request.task.exception()
        ]
        held = Counter(ref.image_key for ref in [*self.leases, *done] if isinstance(ref, AdapterRef))
        assert self.store.disk._lru.leases == held, "leases on images are those that were taken and not given back"
        for key in held.keys() - self.damaged:
            assert self.store.disk.image_path(key).is_file(), "a leased image went"
        raw = self.store.catalog.remote.raw
        for key in raw._lru.leases.keys() - self.source.damaged:
            assert raw.folder_of(key).is_dir(), "leased files went"
        if not self.requests:
            assert raw.num_leases == 0, "a lease on files outlived its use"

    # --- the source ---

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1))
    def put(self, name: str, content: int) -> None:
        self.source.put(name, self.contents[content])
        self.history[name].append((self.clock.now, (content, content)))

    @rule(
        name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1), half=st.sampled_from([WEIGHTS, CONFIG])
    )
    def put_half(self, name: str, content: int, half: str) -> None:
        """As replacing goes in stores: one file, then another."""
        _, now = self.history[name][-1]
        if now is None:
            return
        files = {file: data for file, data in self.contents[content].items() if (file == WEIGHTS) == (half == WEIGHTS)}
        self.source.put(name, files)
        self.history[name].append((self.clock.now, (now[0], content) if half == WEIGHTS else (content, now[1])))

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

    @rule(is_open=st.booleans())
    def hold_or_free_the_compiler(self, is_open: bool) -> None:
        (self.compiler.set if is_open else self.compiler.clear)()

    # --- requests ---

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        async def ask() -> AdapterRef:
            ref = await self.store.ensure(await self.store.resolve(name))
            self.store.lease(ref)
            return ref

        self.begin(name, ask())

    @rule(name=st.sampled_from(NAMES))
    def ask_for_the_template(self, name: str) -> None:
        async def ask() -> AdapterTemplate | None:
            return await self.store.catalog.chat_template(await self.store.resolve(name))

        self.begin(name, ask())

    def begin(self, name: str, work) -> None:
        async def start() -> Request:
            return Request(name, self.clock.now, asyncio.create_task(work))

        self.requests.append(self.run(start()))

    @rule(name=st.sampled_from(NAMES))
    def ask_and_wait(self, name: str) -> None:
        self.ask(name)
        self.let_all_end()

    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        if not self.requests:
            return
        request = self.requests.pop(which % len(self.requests))

        async def cancel() -> None:
            request.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, AdapterError):
                ended = await request.task  # it had ended before
                self.leases += [ended] if isinstance(ended, AdapterRef) else []

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
        self.compiler.set()
        self.run(self.all_ended())
        self.look()

    async def all_ended(self) -> None:
        if self.requests:
            _, late = await asyncio.wait({request.task for request in self.requests}, timeout=20)
            assert not late, "a request never ended"
        for names in self.store.catalog.remote.names:
            await asyncio.gather(*names._refreshes.values())
        for _ in range(10):  # flights whose last caller has left
            await asyncio.sleep(0)

    def look(self) -> None:
        """The outcome of every request that has ended."""
        for request in [request for request in self.requests if request.task.done()]:
            self.requests.remove(request)
            error = request.task.exception()
            if error is None:
                self.check(request, request.task.result())
            else:
                assert isinstance(error, AdapterError), repr(error)
                if isinstance(error, AdapterNotFound):
                    assert None in self.possible(request, self.policy.miss_ttl_s), "a 404 for what was there all along"

    def possible(self, request: Request, age_s: float) -> set[Content | None]:
        """What the name was between `age_s` before the request and now."""
        start, found = request.since - age_s, set()
        history = self.history[request.name]
        for index, (_, content) in enumerate(history):
            ended = history[index + 1][0] if index + 1 < len(history) else float("inf")
            if ended >= start:
                found.add(content)
        return found

    def check(self, request: Request, ended: AdapterRef | AdapterTemplate | None) -> None:
        allowed = self.possible(request, self.policy.poll_interval_s)
        is_kept = self.policy.on_source_delete == "keep" and None in allowed
        is_unconfirmed = self.is_broken or self.broken_until >= request.since - self.policy.miss_ttl_s
        if is_kept or (is_unconfirmed and self.policy.on_source_down == "serve"):
            allowed = {content for _, content in self.history[request.name]}
        if isinstance(ended, AdapterRef):
            self.leases.append(ended)
            found = {content for content, checksum in self.checksums.items() if checksum == ended.checksum}
            assert found & allowed, f"content {found} of {request.name}, allowed {allowed}"
            self.read(ended)
        else:
            configs = {f"template {content[0]}" for content in allowed if content is not None}
            assert ended is not None and ended.source in configs, f"{ended}, allowed {configs}"

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

    # --- what must work, once all that was wrong is over and outlived ---

    @rule(name=st.sampled_from(NAMES))
    def outlive_it_all(self, name: str) -> None:
        """The name is what the source has, or is not found, and no failure of before counts any more."""
        self.repair_source()
        self.let_all_end()
        self.clock.now += OUTLIVED_S
        for _ in range(2):
            error, ref = self.run(self.outcome(name))
            _, content = self.history[name][-1]
            if content is None:
                assert self.policy.on_source_delete == "keep" or isinstance(error, AdapterNotFound), repr(error or ref)
                return
            assert ref is not None, f"{name} is {content}, and it ended in {error!r}"
            assert ref.checksum == self.checksums[content], f"{name} is not {content}"
            self.read(ref)  # what it finds damaged is compiled anew in the second turn
        assert self.policy.on_source_delete == "keep" or read_image(ref, bytearray(ref.data_bytes)) is None

    async def outcome(self, name: str) -> tuple[AdapterError | None, AdapterRef | None]:
        try:
            return None, await asyncio.wait_for(self.store.ensure(await self.store.resolve(name)), 20)
        except AdapterError as error:
            return error, None

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1))
    def replace_and_ask(self, name: str, content: int) -> None:
        self.put(name, content)
        self.outlive_it_all(name)

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1), fault=st.sampled_from(sorted(FAULTS)))
    def fail_and_outlive_it(self, name: str, content: int, fault: str) -> None:
        self.put(name, content)
        self.repair_source()
        self.let_all_end()
        self.clock.now += OUTLIVED_S
        self.break_source(fault, "fetch", 1000)
        self.ask_and_wait(name)
        self.outlive_it_all(name)

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1), turns=st.integers(0, 12))
    def replace_it_while_it_is_fetched(self, name: str, content: int, turns: int) -> None:
        self.put(name, (content + 1) % NUM_CONTENTS)
        self.repair_source()
        self.let_all_end()
        self.clock.now += OUTLIVED_S
        self.put_half(name, content, CONFIG)
        self.ask(name)
        self.go_on(turns)
        self.put_half(name, content, WEIGHTS)
        self.let_all_end()
        self.outlive_it_all(name)

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, NUM_CONTENTS - 1), num_cancelled=st.integers(0, 2))
    def ask_together(self, name: str, content: int, num_cancelled: int) -> None:
        self.put(name, content)
        self.repair_source()
        self.let_all_end()
        self.clock.now += OUTLIVED_S
        for _ in range(3):
            self.ask(name)
            self.ask_for_the_template(name)
        self.go_on(5)
        for _ in range(num_cancelled):
            self.cancel(0)
        self.let_all_end()
        self.outlive_it_all(name)

    @rule(turns=st.integers(20, 80))
    def use_all_one_after_another(self, turns: int) -> None:
        """More than the quotas hold: of files while they are compiled, of images while requests run."""
        self.repair_source()
        self.let_all_end()
        for number, name in enumerate(NAMES):
            _, now = self.history[name][-1]
            self.put(name, (number if now is None else now[0] + 1) % NUM_CONTENTS)
        self.clock.now += OUTLIVED_S
        self.compiler.clear()
        for name in NAMES:
            self.ask(name)
            self.go_on(turns)
            self.clock.now += 2 * GRACE_S
        self.keeps_its_promises()
        self.let_all_end()
        self.keeps_its_promises()

    # --- the disk ---

    @rule(how=st.sampled_from(["flip", "cut", "remove"]), which=st.integers(0, 20))
    def damage_raw(self, how: str, which: int) -> None:
        files = sorted((self.cache / "raw").glob("[0-9a-f]*/*"))
        if files:
            self.damage_file(files[which % len(files)], how)

    def damage_file(self, file: Path, how: str) -> None:
        damage(file, how)
        self.source.damaged.add(file.parent.name)

    @rule(how=st.sampled_from(["flip", "cut", "remove"]), which=st.integers(0, 20))
    def damage_image(self, how: str, which: int) -> None:
        files = sorted((self.cache / "images").glob("[0-9a-f]*.safetensors"))
        if files:
            file = files[which % len(files)]
            damage(file, how)
            self.damaged.add(file.name.partition(".")[0])

    @rule(
        name=st.sampled_from(NAMES),
        how=st.sampled_from(["flip", "cut", "remove"]),
        file=st.sampled_from([WEIGHTS, CONFIG]),
    )
    def damage_all_of_it_and_ask(self, name: str, how: str, file: str) -> None:
        """The image has gone and what it was made of is not what was fetched."""
        self.outlive_it_all(name)
        _, ref = self.run(self.outcome(name))
        if ref is None:
            return
        image = self.store.disk.image_path(ref.image_key)
        self.damaged.add(ref.image_key)
        damage(image, "remove")
        fetched = self.cache / "raw" / ref.version / file
        if fetched.exists():
            self.damage_file(fetched, how)
        self.ask_and_wait(name)
        self.outlive_it_all(name)

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
                is_right = isinstance(outcome, AdapterRef | AdapterTemplate | AdapterError | asyncio.CancelledError)
                assert is_right, repr(outcome)
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
        for name in NAMES:
            self.outlive_it_all(name)
            self.replace_and_ask(name, 0)
        self.let_all_end()
        self.keeps_its_promises()
        assert (self.store.disk.num_leases, self.store.catalog.remote.raw.num_leases) == (0, 0)
        assert len(self.store._flights) == 0 and self.source.at_once == 0
        self.run(self.store.close())
        assert list(self.cache.rglob("*.tmp")) == []
        shutil.rmtree(self.cache)


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
    config = json.loads(sound[CONFIG])
    StoreMachine.base = base
    StoreMachine.contents = []
    for number, alpha in enumerate(ALPHAS):
        written = json.dumps(config | {"lora_alpha": config["lora_alpha"] * alpha}).encode()
        changed = {CONFIG: written, TEMPLATE: f"template {number}".encode()}
        StoreMachine.contents.append(scaled(sound, number + 1) | changed)
    StoreMachine.checksums = {}
    for configs, weights in itertools.product(range(NUM_CONTENTS), repeat=2):
        folder = tmp_path_factory.mktemp("content")
        files = StoreMachine.contents[configs] | {WEIGHTS: StoreMachine.contents[weights][WEIGHTS]}
        for name, written in files.items():
            (folder / name).write_bytes(written)
        header = write_image_of(folder, base)
        StoreMachine.checksums[configs, weights] = header.checksum
        StoreMachine.image_bytes = header.data_offset + header.data_bytes
    assert len(set(StoreMachine.checksums.values())) == NUM_CONTENTS**2
    return StoreMachine


def write_image_of(folder: Path, base: Base) -> ImageHeader:
    sites = compile_folder(folder, base).sites
    return write_image(folder / "image", sites, base.manifest, image_key="k", digest="d", compiler_version=1)


def remembering(compile_):
    """The compiler's own work, done once for the same bytes: it is the store that is tried here."""
    done = {}

    def compiled(files, *rest):
        key = tuple(sorted((name, bytes(content)) for name, content in files.items()))
        if key not in done:
            done[key] = compile_(files, *rest)
        return done[key]

    return compiled


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
    monkeypatch.setattr("adapters_store.compile.job.compile_adapter", remembering(compile_adapter))
    with asyncio.Runner() as runner:
        machine.runner = runner
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
