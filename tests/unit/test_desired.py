"""What is served is made to agree with --adapters-file, whatever happens to the file and the sources."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from types import SimpleNamespace

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.local import LocalSource
from adapters_store.sources.named import NamedSource
from server import desired
from server.api.adapter_bodies import AdapterEntry
from server.api.naming import AdapterNames
from server.api.supply import AdapterSupply
from server.desired import DesiredAdapters
from server.desired_file import read_adapters_file
from tests.api.doubles import ScriptedEngine, ScriptedStore
from tests.store.fake_source import FakeSource

POLL_S = 0.01


def add_folder(root, name):
    folder = root / "adapters" / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Folders one and two, a source with far, and a file; nothing runs yet."""
    monkeypatch.setattr(desired, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(desired, "MAX_RETRY_S", 0.05)
    for name in ("one", "two"):
        add_folder(tmp_path, name)
    root = tmp_path / "adapters"
    source = FakeSource()
    source.put("far", {"adapter_config.json": b"{}"})
    engine, store = ScriptedEngine(300, 0, lambda request: None), ScriptedStore()
    remote = RemoteTier([source], tmp_path / "cache", policy=NamePolicy(poll_interval_s=0, miss_ttl_s=0))
    catalog = Catalog([LocalSource(root)], ["base"], named=NamedSource([root]), remote=remote, list_age_s=0)
    supply = AdapterSupply(engine, catalog, store, ["base"])
    names = AdapterNames(engine, catalog, store, ("base",), supply)
    path = tmp_path / "adapters.json"
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("tmp_path", "monkeypatch")})


def say(world, *entries):
    """Replace the file as a deployment does: by a rename."""
    text = entries[0] if entries and isinstance(entries[0], str) else json.dumps({"adapters": list(entries)})
    beside = world.path.with_suffix(".new")
    beside.write_text(text)
    beside.rename(world.path)


@contextlib.asynccontextmanager
async def watching(world, *entries):
    say(world, *entries)
    watched = DesiredAdapters(read_adapters_file(world.path), world.names, poll_s=POLL_S)
    await watched.start()
    try:
        yield watched
    finally:
        await watched.close()
        await world.remote.close()


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def polls(count: int = 5) -> None:
    await asyncio.sleep(count * POLL_S)


def served(world) -> dict[str, str]:
    """The names that were given, and the folder of each."""
    found = {name: world.catalog.named.resolve(name) for name in world.catalog.named.names()}
    return {name: version.path.rpartition("/")[2] for name, version in found.items() if version}


async def test_names_are_there_when_the_start_is_over(world):
    entries = ({"name": "a", "path": "one"}, {"name": "b", "path": "two", "preload": True, "weight": 2.0})
    async with watching(world, *entries, {"name": "c", "path": "one", "pin": True}) as watched:
        assert served(world) == {"a": "one", "b": "two", "c": "one"}
        assert sorted(world.store.ensured) == ["b", "c"]
        assert world.engine.weights == {"b": 2.0} and world.engine.pinned == ["image-of-c"]
        assert world.names.giver_of("a") == "file"
        status = watched.status()
        assert (status["ok"], status["entries"], status["num_failed"]) == (True, 3, 0)
        assert abs(status["last_applied"] - time.time()) < 30
        ensured = list(world.store.ensured)
        await polls()
        assert world.store.ensured == ensured  # what agrees is left alone


async def test_added_changed_and_removed(world):
    async with watching(world, {"name": "a", "path": "one", "pin": True}, {"name": "b", "path": "one"}):
        say(world, {"name": "a", "path": "two", "weight": 3.0}, {"name": "c", "path": "two"})
        await until(lambda: served(world) == {"a": "two", "c": "two"})
        assert world.store.ensured == ["a", "a"]  # a replacement is compiled before it is one
        await until(lambda: "a" not in world.supply.pins)
        assert world.engine.weights == {"a": 3.0}
        say(world)
        await until(lambda: served(world) == {})
        await until(lambda: world.engine.weights == {"a": 1.0})
        assert not +world.store.leases
        assert world.names.giver_of("a") is None


async def test_a_replacement_that_fails_leaves_the_old_one_and_is_tried_again(world, caplog):
    async with watching(world, {"name": "a", "path": "one"}) as watched:
        world.store.errors["a"] = AdapterCorrupt("cut short")
        say(world, {"name": "a", "path": "two"}, {"name": "b", "path": "two"})
        await until(lambda: world.store.ensured.count("a") >= 3)
        assert served(world) == {"a": "one", "b": "two"}  # the others go on
        assert [told["name"] for told in watched.status()["failed"]] == ["a"]
        assert world.names.failed["a"].message == "cut short"
        assert "".join(watched.metrics()).count("multilora_adapters_file_failed_entries 1\n") == 1
        assert sum("cut short" in line for line in caplog.messages) == 1
        del world.store.errors["a"]
        await until(lambda: served(world)["a"] == "two")
        await until(lambda: watched.status()["num_failed"] == 0)
        assert "a" not in world.names.failed


async def test_attempts_become_rarer(world, monkeypatch):
    monkeypatch.setattr(desired, "FIRST_RETRY_S", 0.04)
    monkeypatch.setattr(desired, "MAX_RETRY_S", 60.0)
    world.store.errors["a"] = AdapterUnavailable("no room")
    async with watching(world, {"name": "a", "path": "one", "preload": True}):
        await asyncio.sleep(0.4)
        assert 2 <= len(world.store.ensured) <= 5  # at 0, 0.04, 0.12, 0.28
        say(world, {"name": "a", "path": "two", "preload": True})
        del world.store.errors["a"]
        await until(lambda: served(world) == {"a": "two"}, timeout_s=1.0)  # a new wish waits for no old failure


async def test_a_source_that_is_down(world):
    world.source.go_down()
    url = f"{world.source.source}/far"
    async with watching(world, {"name": "near", "source": url}, {"name": "a", "path": "one"}) as watched:
        assert served(world) == {"a": "one"} and watched.status()["num_failed"] == 1
        world.source.come_back()
        await until(lambda: watched.status()["num_failed"] == 0)
        version = await world.catalog.resolve("near")
        assert version.name == "near" and world.names.giver_of("near") == "file"
        say(world, {"name": "a", "path": "one"})
        await until(lambda: not world.catalog.is_given("near"))


BROKEN = ["", "{", '{"adapters": [{"name": "a", "path": "one"}, {"name": "b"}', '{"adapters": [{"name": "../x"}]}']


@pytest.mark.parametrize("content", BROKEN)
async def test_an_invalid_file_changes_nothing_and_is_told_once(world, caplog, content):
    async with watching(world, {"name": "a", "path": "one"}) as watched:
        applied = watched.status()["last_applied"]
        say(world, content)
        await until(lambda: not watched.status()["ok"])
        await polls()
        assert served(world) == {"a": "one"}
        assert watched.status()["error"].startswith("adapters.json: ") and watched.status()["last_applied"] == applied
        assert sum("left as it was" in line for line in caplog.messages) == 1
        assert "multilora_adapters_file_ok 0\n" in "".join(watched.metrics())
        say(world, {"name": "b", "path": "two"})
        await until(lambda: served(world) == {"b": "two"})
        assert watched.status()["ok"] and watched.status()["error"] is None


async def test_a_file_that_goes_and_comes_back(world, caplog):
    async with watching(world, {"name": "a", "path": "one"}) as watched:
        held = world.path.rename(world.path.with_suffix(".held"))
        await until(lambda: not watched.status()["ok"])
        await polls()
        assert served(world) == {"a": "one"}
        held.rename(world.path)
        await until(lambda: watched.status()["ok"])
        assert world.store.ensured == []
        assert sum("left as it was" in line for line in caplog.messages) == 1


async def test_a_file_that_is_being_written_is_not_read(world):
    """Half of a YAML file is often a valid file with fewer adapters."""
    both = [{"name": "a", "path": "one"}, {"name": "b", "path": "two"}]
    async with watching(world, *both) as watched:
        for step in range(12):
            world.path.write_text(json.dumps({"adapters": both[:1]}) + " " * step)
            await asyncio.sleep(POLL_S / 2)
        world.path.write_text(json.dumps({"adapters": both}))
        await until(lambda: watched._seen == watched._read)
        assert served(world) == {"a": "one", "b": "two"}


async def test_a_swapped_link_is_another_file(world):
    folders = [world.path.with_name(name) for name in ("v1", "v2")]
    for folder, name in zip(folders, ("one", "two"), strict=True):
        folder.mkdir()
        (folder / "adapters.json").write_text(json.dumps({"adapters": [{"name": "a", "path": name}]}))
    data = world.path.with_name("..data")
    data.symlink_to("v1")
    world.path.symlink_to("..data/adapters.json")
    watched = DesiredAdapters(read_adapters_file(world.path), world.names, poll_s=POLL_S)
    await watched.start()
    assert served(world) == {"a": "one"}
    swap = world.path.with_name("..swap")
    swap.symlink_to("v2")
    swap.rename(data)
    await until(lambda: served(world) == {"a": "two"})
    await watched.close()
    await world.remote.close()


async def test_names_given_by_hand_are_left_alone(world):
    await world.names.give(AdapterEntry(name="mine", path="one"), replaces=False, compiles=False)
    async with watching(world, {"name": "mine", "path": "two"}, {"name": "a", "path": "one"}) as watched:
        assert served(world) == {"mine": "one", "a": "one"}
        assert "by hand" in watched.status()["failed"][0]["message"]
        say(world, {"name": "a", "path": "one"})
        await until(lambda: watched.status()["num_failed"] == 0)
        assert served(world) == {"mine": "one", "a": "one"}
        say(world, {"name": "a", "path": "one"}, {"name": "mine", "path": "two"})
        await until(lambda: watched.status()["num_failed"] == 1)
        await world.names.take("mine")
        await until(lambda: served(world) == {"mine": "two", "a": "one"})  # once it is free


async def test_a_removed_entry_leaves_what_a_source_has_under_the_name(world):
    async with watching(world, {"name": "one", "path": "two"}):
        assert (await world.catalog.resolve("one")).path.endswith("two")
        say(world)
        await until(lambda: not world.catalog.is_given("one"))
        assert (await world.catalog.resolve("one")).path.endswith("one")


async def test_a_name_that_stays_what_it_is_may_be_pinned_and_let_go(world):
    async with watching(world, {"name": "one", "pin": True}, {"name": "two", "weight": 4.0}):
        assert "one" in world.supply.pins and world.engine.weights == {"two": 4.0}
        assert served(world) == {}
        say(world, {"name": "one"})
        await until(lambda: "one" not in world.supply.pins)
        await until(lambda: world.engine.weights == {"two": 1.0})


async def test_a_pin_that_the_file_never_asked_for_stays(world):
    """--pin, beside a file that says nothing of pins."""
    ref = await world.supply.compile(await world.catalog.resolve("one"))
    world.supply.pins.add(ref)
    async with watching(world, {"name": "one"}):
        say(world, {"name": "one", "weight": 2.0})
        await until(lambda: world.engine.weights == {"one": 2.0})
        assert "one" in world.supply.pins
        say(world, {"name": "one", "pin": False})
        await until(lambda: "one" not in world.supply.pins)


async def test_a_start_does_not_wait_for_ever(world, monkeypatch):
    monkeypatch.setattr(desired, "START_PATIENCE_S", 0.02)
    gate = world.store.gates["slow"] = asyncio.Event()
    entries = ({"name": "slow", "path": "one", "preload": True}, {"name": "a", "path": "two"})
    async with watching(world, *entries):
        assert served(world) == {"a": "two"}
        gate.set()
        await until(lambda: served(world) == {"a": "two", "slow": "one"})


async def test_a_wish_that_changes_while_the_last_is_under_way(world):
    gate = world.store.gates["a"] = asyncio.Event()
    async with watching(world, {"name": "b", "path": "two"}):
        say(world, {"name": "a", "path": "one", "preload": True})
        await until(lambda: world.store.ensured == ["a"])
        say(world, {"name": "a", "path": "two", "preload": True})
        await polls()
        gate.set()
        await until(lambda: served(world) == {"a": "two"})
        gate.clear()
        say(world, {"name": "a", "path": "one", "preload": True})
        await until(lambda: len(world.store.ensured) == 3)
        say(world)
        await polls()
        gate.set()
        await until(lambda: served(world) == {})


async def test_a_wish_that_fails_does_not_hold_up_the_next_one(world, monkeypatch):
    monkeypatch.setattr(desired, "FIRST_RETRY_S", 60.0)
    monkeypatch.setattr(desired, "MAX_RETRY_S", 60.0)
    gate = world.store.gates["a"] = asyncio.Event()
    async with watching(world, {"name": "b", "path": "two"}) as watched:
        world.store.errors["a"] = AdapterCorrupt("cut short")
        say(world, {"name": "a", "path": "one", "preload": True})
        await until(lambda: world.store.ensured == ["a"])
        say(world, {"name": "a", "path": "two"})
        await polls()
        gate.set()
        await until(lambda: served(world) == {"a": "two"})
        assert watched.status()["num_failed"] == 0


async def test_a_defect_costs_one_name(world, monkeypatch, caplog):
    give = AdapterNames.give

    async def broken(self, entry, **options):
        if entry.name == "a":
            raise ZeroDivisionError
        return await give(self, entry, **options)

    monkeypatch.setattr(AdapterNames, "give", broken)
    with caplog.at_level(logging.CRITICAL, "server.desired"):
        async with watching(world, {"name": "a", "path": "one"}, {"name": "b", "path": "two"}) as watched:
            assert served(world) == {"b": "two"} and watched.status()["num_failed"] == 1
            monkeypatch.setattr(AdapterNames, "give", give)
            await until(lambda: served(world) == {"a": "one", "b": "two"})


async def test_many_names_change_a_few_at_once(world, monkeypatch):
    at_once, most = 0, 0
    compile_ = AdapterSupply.compile

    async def counted(self, version):
        nonlocal at_once, most
        at_once, most = at_once + 1, max(most, at_once + 1)
        await asyncio.sleep(0.001)
        at_once -= 1
        return await compile_(self, version)

    monkeypatch.setattr(AdapterSupply, "compile", counted)
    entries = [{"name": f"n{index}", "path": "one", "preload": True} for index in range(40)]
    async with watching(world, *entries):
        assert len(served(world)) == 40 and 1 < most <= desired.MAX_AT_ONCE
