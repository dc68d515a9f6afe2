"""`name@version`: what a prefix means, which versions of a name are at hand, and that no other name's ever are."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.catalog import Catalog
from adapters_store.errors import VersionAmbiguous, VersionNotFound
from adapters_store.ref import AdapterRef, FileVersion, SourceVersion
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.local import LocalSource
from adapters_store.store import AdapterStore
from adapters_store.versions import MAX_SHOWN, Held, VersionBook, find_version, is_version_prefix
from tests.store.fake_source import FakeSource, Files
from tests.store.test_store_remote import Clock, scaled

OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64


# --- what a prefix means ---------------------------------------------------------------------------------


def version_of(number: int, name: str = "fr") -> SourceVersion:
    return SourceVersion("s", name, f"s/{name}", (FileVersion("adapter_config.json", number),))


def held(number: int, digest: str | None = None, image_key: str = "") -> Held:
    version = version_of(number)
    if digest is None:
        return Held(version.key, version)
    return Held(version.key, version, AdapterRef("fr", version.key, digest, image_key, "", 0, 1, "", 8))


def test_key_digest_and_image_key_each_name_a_version():
    all_held = [held(1, OLD, NEW), held(2, OTHER, "d" * 64), held(3)]
    for prefix in (OLD[:8], OLD, NEW[:9], all_held[0].version.key[:8], all_held[0].version.key):
        assert find_version("fr", prefix, all_held) is all_held[0]
    assert find_version("fr", OTHER[:8], all_held) is all_held[1]
    assert find_version("fr", all_held[2].version.key[:20], all_held) is all_held[2]


def test_versions_of_one_image_are_one_and_the_current_goes_first():
    all_held = [held(1, OLD, NEW), held(2, OLD, NEW)]
    assert find_version("fr", OLD[:8], all_held) is all_held[0]
    assert find_version("fr", all_held[1].version.key, all_held) is all_held[1]


def test_a_prefix_of_two_contents_is_ambiguous():
    all_held = [held(1, OLD, NEW), held(2, OLD[:10] + OTHER[10:], OTHER)]
    with pytest.raises(VersionAmbiguous, match=all_held[1].version.key[:12]) as refused:
        find_version("fr", OLD[:9], all_held)
    assert refused.value.http_status == 400
    assert find_version("fr", OLD[:11], all_held) is all_held[0]


def test_what_is_not_there_is_told_with_what_is_bounded():
    all_held = [held(number) for number in range(MAX_SHOWN + 3)]
    with pytest.raises(VersionNotFound) as missing:
        find_version("fr", "0123abcd", all_held)
    said = missing.value.message
    assert (missing.value.http_status, missing.value.code) == (404, "model_not_found")
    assert "0123abcd" in said and f"{all_held[0].version.key[:12]} (current)" in said and "3 more" in said
    assert all_held[MAX_SHOWN].version.key[:12] not in said and len(said) < 400


@pytest.mark.parametrize("text", ["", "abc1234", "ABCDEF12", "0123456g", "a" * 65, "12345678\n", "٣" * 8])
def test_what_can_be_no_version(text):
    assert not is_version_prefix(text)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["fr", "de"]), st.integers(0, 4)), max_size=40))
def test_the_book_has_each_names_own_the_latest_first(changes):
    book, model = VersionBook(), {"fr": [], "de": []}
    for is_added, name, number in changes:
        if number in model[name]:
            model[name].remove(number)
        if is_added:
            model[name].insert(0, number)
            book.add(version_of(number, name))
        else:
            book.discard(version_of(number, name).key)
        for each, numbers in model.items():
            assert book.of(each) == [(version_of(n, each).key, version_of(n, each)) for n in numbers]


# --- what is at hand -------------------------------------------------------------------------------------


@pytest.fixture
def files(plain_adapter) -> Files:
    return {path.name: path.read_bytes() for path in plain_adapter.iterdir() if path.suffix != ".md"}


@pytest_asyncio.fixture
async def source(files) -> FakeSource:
    source = FakeSource()
    source.put("fr", files)
    return source


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def open_store(base, tmp_path, source, clock) -> AsyncIterator:
    opened = []

    def open_(*sources: FakeSource, roots: tuple[Path, ...] = (), **options: object) -> AdapterStore:
        policy = NamePolicy(patience_s=0.1)
        tier = RemoteTier(sources or [source], tmp_path / "cache", policy=policy, clock=clock, **options)
        catalog = Catalog([LocalSource(root) for root in roots], ["base"], remote=tier)
        opened.append(AdapterStore(tmp_path / "cache", base.manifest, catalog))
        return opened[-1]

    yield open_
    for store in opened:
        await store.close()


async def ensured(store: AdapterStore, name: str = "fr") -> AdapterRef:
    return await store.ensure(await store.resolve(name))


async def replaced(store: AdapterStore, source: FakeSource, files: Files, clock: Clock, name: str = "fr") -> AdapterRef:
    """The name's new content, seen and compiled."""
    source.put(name, files)
    clock.now += 10
    return await ensured(store, name)


async def pinned(store: AdapterStore, prefix: str, name: str = "fr") -> SourceVersion:
    return store.pinned(await store.resolve(name), prefix)


async def test_former_versions_stay_at_hand_over_a_restart(open_store, source, files, clock):
    store = open_store()
    refs = [await ensured(store)]
    for factor in (2, 3):
        refs.append(await replaced(store, source, scaled(files, factor), clock))
    for _ in range(2):
        for ref in refs:
            for prefix in (ref.version[:8], ref.digest[:8], ref.image_key):
                found = await pinned(store, prefix)
                assert (found.key, found.name) == (ref.version, "fr")
                assert await store.ensure(found) == ref
        with pytest.raises(VersionNotFound, match=f"{refs[2].version[:12]} \\(current\\), {refs[1].version[:12]}, "):
            await pinned(store, "0" * 8)
        assert store.compiles in (0, 3)
        await store.close()
        store = open_store()


async def test_no_name_serves_what_only_another_had(open_store, source, files, clock):
    """Not by key, digest nor image key; where both had it, each by its own."""
    source.put("de", scaled(files, 2))
    store = open_store()
    fr, de = await ensured(store), await ensured(store, "de")
    both = await replaced(store, source, scaled(files, 5), clock, "de")
    for _ in range(2):
        for prefix in (de.version, de.digest, de.image_key, both.version, both.digest, both.image_key):
            with pytest.raises(VersionNotFound):
                await pinned(store, prefix)
            assert (await pinned(store, prefix, "de")).name == "de"
        with pytest.raises(VersionNotFound):
            await pinned(store, fr.image_key, "de")
        await store.close()
        store = open_store()
    own = await replaced(store, source, scaled(files, 5), clock, "fr")
    assert own.image_key == both.image_key and own.version != both.version
    found = await pinned(store, both.image_key)
    assert (found.key, found.name) == (own.version, "fr")
    with pytest.raises(VersionNotFound):
        await pinned(store, both.version)


async def test_an_index_entry_that_says_another_name_gives_it_nothing(open_store, source, files, clock, tmp_path):
    """The key covers the name: an entry whose two halves disagree is no version of either."""
    source.put("de", scaled(files, 2))
    store = open_store()
    await ensured(store)
    de = await ensured(store, "de")
    await store.close()
    (entry,) = (tmp_path / "cache" / "index").glob(f"*/{de.version}.json")
    said = json.loads(entry.read_bytes())
    for changed in ({"version": said["version"] | {"name": "fr"}}, {"ref": said["ref"] | {"name": "fr"}}):
        entry.write_text(json.dumps(said | changed))
        shutil.rmtree(tmp_path / "cache" / "raw")
        store = open_store()
        with pytest.raises(VersionNotFound):
            await pinned(store, de.image_key)
        assert store.disk.versions_of("de") == []
        await store.close()


async def test_a_version_without_an_image_is_compiled_from_its_files(open_store, source, files, clock):
    store = open_store()
    old = await ensured(store)
    await replaced(store, source, scaled(files, 2), clock)
    store.discard(old)
    found = await pinned(store, old.version[:10])
    with pytest.raises(VersionNotFound):
        await pinned(store, old.digest)  # of what is compiled only
    fetches = store.tier().raw.fetches
    assert await store.ensure(found) == old
    assert store.tier().raw.fetches == fetches
    assert (await pinned(store, old.digest)).key == old.version


async def test_what_went_from_disk_is_not_at_hand(open_store, source, files, clock):
    store = open_store()
    old = await ensured(store)
    await replaced(store, source, scaled(files, 2), clock)
    store.discard(old)
    store.catalog.remote.raw.discard(old.version)
    for _ in range(2):
        with pytest.raises(VersionNotFound):
            await pinned(store, old.version)
        await store.close()
        store = open_store()


async def test_a_former_version_that_is_damaged_does_not_become_the_current_one_unnoticed(
    open_store, source, files, clock
):
    store = open_store()
    old = await ensured(store)
    new = await replaced(store, source, scaled(files, 2), clock)
    store.discard(old)
    found = await pinned(store, old.version)
    weights = store.catalog.remote.raw.folder_of(old.version) / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    ref = await store.ensure(found)
    assert ref.version == new.version, "whoever asks for exactly the old one looks at ref.version"


async def test_files_of_a_chat_template_alone_are_no_version(open_store, source, files, clock):
    source.put("fr", files | {"chat_template.jinja": b"hello"})
    store = open_store()
    version = await store.resolve("fr")
    await store.catalog.chat_template(version)
    raw = store.catalog.remote.raw
    assert raw.num_entries == 1 and raw.versions_of("fr") == []
    await store.ensure(version)
    assert raw.versions_of("fr") == [(version.key, version)]


async def test_versions_of_a_source_that_is_configured_no_longer(open_store, source, files):
    store = open_store()
    old = await ensured(store)
    await store.close()
    other = FakeSource("fake://other")
    other.put("fr", scaled(files, 2))
    with pytest.raises(VersionNotFound):
        await pinned(open_store(other), old.version)


async def test_a_folders_former_version_is_at_hand_while_its_image_is(open_store, files, tmp_path):
    folder = tmp_path / "root" / "local"
    folder.mkdir(parents=True)

    def write(written: Files) -> None:
        for name, content in written.items():
            (folder / f".{name}").write_bytes(content)
            (folder / f".{name}").rename(folder / name)

    write(files)
    store = open_store(roots=(tmp_path / "root",))
    old = await ensured(store, "local")
    write(scaled(files, 2))
    new = await ensured(store, "local")
    assert old.image_key != new.image_key
    found = await pinned(store, old.digest[:8], "local")
    assert await store.ensure(found) == old
    await store.close()
    store = open_store(roots=(tmp_path / "root",))
    assert (await pinned(store, old.version[:8], "local")).key == old.version
    store.discard(old)
    with pytest.raises(VersionNotFound):
        await pinned(store, old.version, "local")


async def test_times_by_tier_and_phase(open_store, source, files, clock):
    store = open_store()
    await ensured(store)
    tier = store.tier()
    counted = {phase: sum(times.counts) for phase, times in tier.raw.seconds.items()}
    assert counted == {"resolve": 2, "queue": 1, "fetch": 1}  # asked again after the fetch
    assert {phase: sum(times.counts) for phase, times in tier.seconds.items()} == {"queue": 1, "fetch": 1, "compile": 1}
