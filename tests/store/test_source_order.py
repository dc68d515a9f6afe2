"""The order of sources: folders and remote ones as they come, and no name that moves while one can't be asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound, AdapterUnavailable
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.local import LocalSource
from tests.store.fake_source import FakeSource

CONFIG = {"adapter_config.json": b"{}"}
POLICY = NamePolicy(patience_s=0.05, miss_ttl_s=0.0, poll_interval_s=0.0)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps({}))


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """One before the remote source and one after it."""
    first, last = tmp_path / "first", tmp_path / "last"
    put(first, "a")
    put(last, "a", "b", "c")
    return first, last


@pytest.fixture
async def remote() -> FakeSource:
    source = FakeSource()
    for name in ("a", "b"):
        source.put(name, CONFIG)
    return source


@pytest.fixture
async def open_catalog(folders, remote, tmp_path) -> AsyncIterator[Callable[[], Catalog]]:
    """The three in their order; opening it again is a restart."""
    tiers = []

    def open_() -> Catalog:
        tiers.append(RemoteTier([remote, LocalSource(folders[1])], tmp_path / "cache", policy=POLICY))
        return Catalog([LocalSource(folders[0])], ["base"], remote=tiers[-1], list_age_s=0.0)

    yield open_
    for tier in tiers:
        await tier.close()


async def test_a_name_is_the_first_source_s_that_has_it(open_catalog, folders, remote):
    catalog = open_catalog()
    first, last = map(str, folders)
    for name, source in (("a", first), ("b", remote.source), ("c", last)):
        assert (await catalog.resolve(name)).source == source
    assert {item.name: item.version.source for item in await catalog.list()} == {
        "a": first,
        "b": remote.source,
        "c": last,
    }
    assert sum("'a' too" in warning for warning in catalog.warnings) == 2
    remote.delete("b")
    assert (await catalog.resolve("b")).source == last
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("d")


async def test_a_later_folder_s_adapter_is_read_where_it_is(open_catalog, folders):
    catalog = open_catalog()
    version = await catalog.resolve("c")
    assert catalog.covers(version) and not catalog.remote.covers(version)
    assert await catalog.chat_template(version) is None


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_while_a_source_is_down_a_later_folder_answers_for_what_it_served(
    open_catalog, folders, remote, is_restarted
):
    catalog = open_catalog()
    for name in ("a", "b", "c"):
        await catalog.resolve(name)
    remote.go_down()
    if is_restarted:
        catalog = open_catalog()
    first, last = map(str, folders)
    for name, source in (("a", first), ("b", remote.source), ("c", last)):
        assert (await catalog.resolve(name)).source == source
    put(folders[1], "new")
    with pytest.raises(AdapterUnavailable):  # the remote source may have one of that name
        await catalog.resolve("new")
    remote.come_back()
    assert (await catalog.resolve("new")).source == last


async def test_what_a_later_folder_has_no_longer_is_not_known_while_a_source_is_down(open_catalog, folders, remote):
    catalog = open_catalog()
    await catalog.resolve("c")
    remote.go_down()
    (folders[1] / "c" / "adapter_config.json").unlink()
    for _ in range(2):
        with pytest.raises(AdapterUnavailable):
            await catalog.resolve("c")
    remote.come_back()
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("c")


async def test_notes_that_were_damaged_are_none(open_catalog, folders, remote, tmp_path):
    catalog = open_catalog()
    await catalog.resolve("c")
    (note,) = (tmp_path / "cache" / "names").glob("*/*.txt")
    assert note.read_text() == "c"
    note.write_bytes(b"\xff")
    note.with_name("other.txt").write_text("new")
    put(folders[1], "new")
    remote.go_down()
    catalog = open_catalog()
    for name in ("c", "new"):
        with pytest.raises(AdapterUnavailable):
            await catalog.resolve(name)
