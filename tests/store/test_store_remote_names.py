"""What a remote name points to: how old an answer may be, and what holds while its source is down or has it no more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections import Counter
from pathlib import Path

import pytest
import pytest_asyncio

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterDenied, AdapterError, AdapterNotFound, AdapterUnavailable, SourceUnavailable
from adapters_store.remote_names import MAX_QUESTIONS, NamePolicy, RemoteNames
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.local import LocalSource
from tests.store.fake_source import FakeSource

ONE = {"adapter_config.json": b"{}"}
TWO = {"adapter_config.json": b"{ }"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def source():
    source = FakeSource()
    source.put("fr", ONE)
    return source


@pytest_asyncio.fixture
async def open_names(source, tmp_path, clock):
    """Over the folder of this test; opening it again is a restart."""
    opened = []

    def open_(**policy: object) -> RemoteNames:
        opened.append(RemoteNames(source, tmp_path, NamePolicy(patience_s=0.05, **policy), clock))
        return opened[-1]

    yield open_
    for names in opened:
        await names.close()


def number(version) -> str:
    """Which put it was."""
    return version.files[0].etag


async def settled(names: RemoteNames) -> None:
    while names._refreshes:
        await asyncio.sleep(0)


async def test_a_hot_name_is_not_asked_for_at_each_request(source, open_names, clock):
    names = open_names()
    for _ in range(100):
        assert number(await names.resolve("fr")) == "1"
    assert source.calls["resolve"] == 1


async def test_a_name_in_use_is_asked_for_in_the_background(source, open_names, clock):
    names = open_names()
    await names.resolve("fr")
    source.put("fr", TWO)
    clock.now += 4.9
    assert number(await names.resolve("fr")) == "1"
    assert source.calls["resolve"] == 1
    clock.now += 0.1  # half the interval
    assert number(await names.resolve("fr")) == "1"
    await settled(names)
    assert number(await names.resolve("fr")) == "2"
    assert source.calls["resolve"] == 2


async def test_a_name_after_a_pause_waits_for_its_source(source, open_names, clock):
    names = open_names()
    await names.resolve("fr")
    source.put("fr", TWO)
    clock.now += 10
    assert number(await names.resolve("fr")) == "2"
    assert names.stale_uses == 0


async def test_an_interval_of_nothing_asks_each_time(source, open_names):
    names = open_names(poll_interval_s=0.0)
    await names.resolve("fr")
    source.put("fr", TWO)
    assert number(await names.resolve("fr")) == "2"
    assert source.calls["resolve"] == 2


async def test_many_who_ask_at_once_share_one_question(source, open_names):
    names = open_names()
    found = await asyncio.gather(*(names.resolve("fr") for _ in range(50)))
    assert {number(version) for version in found} == {"1"}
    assert source.calls["resolve"] == 1


async def test_a_question_is_given_up_when_the_last_has_left(source, open_names):
    names = open_names()
    source.gate.clear()
    tasks = [asyncio.create_task(names.resolve("fr")) for _ in range(2)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
    assert len(names._flights) == 0
    source.gate.set()
    assert number(await names.resolve("fr")) == "1"
    assert source.calls["resolve"] == 2


async def test_a_miss_is_remembered_for_a_while(source, open_names, clock):
    names = open_names()
    for _ in range(10):
        assert await names.resolve("new") is None
    assert source.calls["resolve"] == 1
    source.put("new", ONE)
    clock.now += 4.9
    assert await names.resolve("new") is None
    clock.now += 0.1
    assert (await names.resolve("new")).name == "new"


async def test_a_failure_is_remembered_for_a_while(source, open_names, clock):
    names = open_names()
    source.go_down()
    for _ in range(10):
        with pytest.raises(AdapterUnavailable, match="down"):
            await names.resolve("fr")
    assert source.calls["resolve"] == 1
    source.come_back()
    clock.now += 5
    assert number(await names.resolve("fr")) == "1"


async def test_misses_of_made_up_names_are_bounded(source, open_names):
    names = open_names()
    for made_up in range(6000):
        assert await names.resolve(f"x{made_up}") is None
    assert len(names._misses) <= 4096 and len(names._known) == 0


# --- the source is down ---------------------------------------------------------------------------------


async def test_while_the_source_is_down_the_last_version_is_served(source, open_names, clock):
    names = open_names()
    await names.resolve("fr")
    source.go_down()
    clock.now += 10
    assert number(await names.resolve("fr")) == "1"
    assert names.stale_uses == 1
    for _ in range(20):  # at once, and the source is asked again now and then
        clock.now += 1
        assert number(await names.resolve("fr")) == "1"
    await settled(names)
    assert names.stale_uses == 21
    assert 3 <= source.calls["resolve"] <= 6
    source.put("fr", TWO)
    source.come_back()
    clock.now += 5
    await names.resolve("fr")
    await settled(names)
    assert number(await names.resolve("fr")) == "2"


@pytest.mark.parametrize("error", [AdapterUnavailable("down"), AdapterDenied("access denied")])
async def test_a_restart_while_the_source_can_not_be_asked(source, open_names, error):
    await open_names().resolve("fr")

    def fault(call: str) -> None:
        raise error

    source.fault = fault
    again = open_names()
    assert number(await again.resolve("fr")) == "1"
    with pytest.raises(type(error), match=error.message):
        await again.resolve("never-seen")


async def test_by_policy_a_source_that_is_down_is_an_error(source, open_names, clock):
    names = open_names(on_source_down="fail")
    await names.resolve("fr")
    source.go_down()
    clock.now += 9
    assert number(await names.resolve("fr")) == "1"  # young enough
    await settled(names)
    clock.now += 1
    with pytest.raises(AdapterUnavailable):
        await names.resolve("fr")
    source.come_back()
    clock.now += 5
    assert number(await names.resolve("fr")) == "1"


async def test_a_source_that_does_not_answer_holds_up_a_known_name_once(source, open_names, clock):
    names = open_names()
    await names.resolve("fr")
    source.gate.clear()
    clock.now += 10
    assert number(await names.resolve("fr")) == "1"  # after the patience
    for _ in range(5):
        assert number(await asyncio.wait_for(names.resolve("fr"), 0.04)) == "1"  # at once
    source.put("fr", TWO)
    source.gate.set()
    await settled(names)
    assert number(await names.resolve("fr")) == "2"


NOT_GIVEN = [AdapterDenied("gated"), AdapterUnavailable("HTTP 418"), AdapterUnavailable("an address was refused")]


@pytest.mark.parametrize("error", [SourceUnavailable("no answer"), *NOT_GIVEN], ids=str)
async def test_names_that_fail_again_and_again_keep_no_other_from_being_asked_for(source, open_names, clock, error):
    """A client that names what is not for this server's key does not freeze what others use."""
    names, resolve, asked = open_names(), source.resolve, Counter()
    await names.resolve("fr")

    async def gated(name: str):
        asked[name] += 1
        if name != "fr":
            raise error
        return await resolve(name)

    source.resolve = gated
    source.put("fr", TWO)
    clock.now += 20
    found = []
    for turn in range(5):
        clock.now += 4
        with contextlib.suppress(AdapterError):
            await names.resolve(f"gated{turn}")
        found.append(number(await names.resolve("fr")))
        await settled(names)
    if isinstance(error, SourceUnavailable):  # a source that may be down is asked for it now and then
        assert found[-1] == "2"
    else:
        assert found == ["2"] * 5 and names.stale_uses == 0


@pytest.mark.parametrize("error", NOT_GIVEN, ids=str)
async def test_one_known_name_that_is_not_given_is_no_outage(source, open_names, clock, caplog, error):
    """It goes on as it was and is asked for now and then; the others are asked for as ever."""
    names, resolve, asked = open_names(), source.resolve, Counter()
    source.put("odd", ONE)
    for name in ("fr", "odd"):
        await names.resolve(name)

    async def not_given(name: str):
        asked[name] += 1
        if name == "odd":
            raise error
        return await resolve(name)

    source.resolve = not_given
    for put in range(3, 13):
        source.put("fr", ONE if put % 2 else TWO)
        clock.now += 10
        assert number(await names.resolve("odd")) == "2"
        for _ in range(5):  # remembered for a while: no further question
            clock.now += 0.5
            assert number(await names.resolve("odd")) == "2"
        assert number(await names.resolve("fr")) == str(put)
        await settled(names)
    assert asked == {"odd": 10, "fr": 10} and names.stale_uses == 60 and not names._is_down
    said = [record.message for record in caplog.records if "odd" in record.message]
    assert 1 < len(said) <= 4 and all(error.message in line for line in said)  # 125 s
    source.resolve = resolve
    source.put("odd", TWO)
    clock.now += 10
    assert number(await names.resolve("odd")) == "13"


async def test_a_question_waits_for_its_turn_a_bounded_time(source, open_names):
    names = open_names(turn_s=0.05)
    source.gate.clear()
    asking = [asyncio.create_task(names.resolve(f"x{index}")) for index in range(MAX_QUESTIONS)]
    while source.calls["resolve"] < MAX_QUESTIONS:
        await asyncio.sleep(0)
    for _ in range(2):  # and it is not the name's fault: nothing is remembered of it
        with pytest.raises(AdapterUnavailable, match="too many questions wait for fake://bucket/team; try again"):
            await asyncio.wait_for(names.resolve("fr"), 5)
    assert not names._is_down
    source.gate.set()
    assert await asyncio.gather(*asking) == [None] * MAX_QUESTIONS
    assert number(await names.resolve("fr")) == "1"


async def test_an_answer_to_an_earlier_question_does_not_undo_a_later_one(source, open_names, clock):
    names = open_names()
    answers: list[asyncio.Future[object]] = []
    resolve = source.resolve

    async def slow(name: str):
        answers.append(asyncio.get_running_loop().create_future())
        version = await resolve(name)
        await answers[-1]
        return version

    source.resolve = slow
    first = asyncio.create_task(names.ask("fr"))
    while not answers:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    source.put("fr", TWO)
    clock.now += 1
    second = asyncio.create_task(names.ask("fr"))
    while len(answers) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    answers[1].set_result(None)
    assert number(await second) == "2"
    answers[0].set_result(None)
    await first
    assert number(await names.resolve("fr")) == "2"


# --- the source has it no more --------------------------------------------------------------------------


async def test_a_deleted_adapter_is_not_found_any_more(source, open_names, clock):
    names = open_names()
    await names.resolve("fr")
    source.delete("fr")
    clock.now += 10
    assert await names.resolve("fr") is None
    source.go_down()
    clock.now += 10
    with pytest.raises(AdapterUnavailable):  # nothing of it is kept, on disk neither
        await open_names().resolve("fr")


async def test_by_policy_a_deleted_adapter_goes_on(source, open_names, clock):
    names = open_names(on_source_delete="keep")
    await names.resolve("fr")
    source.delete("fr")
    clock.now += 10
    assert number(await names.resolve("fr")) == "1"
    assert names.stale_uses == 0  # the source was asked
    assert await names.resolve("never-there") is None
    assert number(await open_names(on_source_delete="keep").resolve("fr")) == "1"
    source.put("fr", TWO)
    clock.now += 10
    assert number(await names.resolve("fr")) == "2"


async def test_a_full_disk_costs_only_the_note(source, open_names, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    names = open_names()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert number(await names.resolve("fr")) == "1"
    assert list(names._folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{}", b'{"source": 1}'])
async def test_notes_that_can_not_be_read_are_dropped(source, open_names, content):
    names = open_names()
    await names.resolve("fr")
    (note,) = names._folder.iterdir()
    note.write_bytes(content)
    source.go_down()
    with pytest.raises(AdapterUnavailable):
        await open_names().resolve("fr")
    assert list(names._folder.iterdir()) == []


async def test_notes_are_for_this_user_alone(source, tmp_path):
    before = os.umask(0o022)
    try:
        names = RemoteNames(source, tmp_path / "cache" / "names")
    finally:
        os.umask(before)
    assert await names.resolve("fr") is not None
    folders = [path for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")) if path.is_dir()]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 3
    await names.close()


async def test_the_same_url_at_another_endpoint_is_another_source(source, open_names):
    await open_names().resolve("fr")
    source.go_down()
    assert number(await open_names().resolve("fr")) == "1"
    source.endpoint = "https://another.example"
    with pytest.raises(AdapterUnavailable):
        await open_names().resolve("fr")


async def test_names_that_are_remembered_are_bounded(source, open_names, monkeypatch):
    monkeypatch.setattr("adapters_store.remote_names.MAX_KNOWN", 3)
    names = open_names()
    for name in ("a", "b", "c"):
        source.put(name, ONE)
        await names.resolve(name)
    await names.resolve("a")  # in use
    await names.resolve("fr")
    assert set(names._known) == {"a", "c", "fr"} and len(list(names._folder.iterdir())) == 3
    monkeypatch.setattr("adapters_store.remote_names.MAX_KNOWN", 2)
    assert len(open_names()._known) == len(list(names._folder.iterdir())) == 2


# --- listings -------------------------------------------------------------------------------------------


async def test_a_listing_is_remembered_and_outlives_its_source(source, open_names, clock):
    names = open_names()
    source.put("team/sql", ONE)
    assert [await names.names() for _ in range(5)] == [["fr", "team/sql"]] * 5
    assert source.calls["names"] == 1
    assert names.version_of("fr").files == ()  # never asked for
    await names.resolve("fr")
    assert number(names.version_of("fr")) == "1"
    source.go_down()
    clock.now += 10
    assert await names.names() == ["fr", "team/sql"]
    assert await open_names().names() == ["fr"]  # what was asked for


async def test_a_source_that_can_not_list_has_the_names_that_were_asked_for(source, open_names):
    async def nothing() -> None:
        return None

    source.names = nothing
    names = open_names()
    await names.resolve("fr")
    await names.resolve("missing")
    assert await names.names() == ["fr"]


async def test_a_source_that_lists_nothing_has_nothing(source, open_names):
    names = open_names()
    await names.resolve("fr")
    source.delete("fr")
    assert await names.names() == []


async def test_a_listing_that_fails_is_no_outage(source, open_names, clock, caplog):
    def fault(call: str) -> None:
        if call == "names":
            raise AdapterUnavailable("a key there has an empty part")

    source.fault = fault
    names = open_names()
    await names.resolve("fr")
    source.put("fr", TWO)
    for _ in range(3):
        clock.now += 10
        assert await names.names() == ["fr"]
    assert number(await names.resolve("fr")) == "2" and names.stale_uses == 0
    said = [record.message for record in caplog.records if "fake://bucket/team" in record.message]
    assert said == ["fake://bucket/team can't be listed: a key there has an empty part"]


# --- several sources ------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def two(tmp_path, clock):
    """Two sources and the tier over them."""
    sources = [FakeSource("fake://first"), FakeSource("fake://second")]
    tier = RemoteTier(sources, tmp_path, policy=NamePolicy(patience_s=0.05), clock=clock)
    yield *sources, tier
    await tier.close()
    assert all(source.is_closed for source in sources)


async def test_the_first_source_that_has_a_name_wins(two):
    first, second, tier = two
    first.put("a", ONE)
    second.put("a", TWO)
    second.put("b", ONE)
    assert (await tier.resolve("a")).source == "fake://first"
    assert (await tier.resolve("b")).source == "fake://second"
    assert await tier.resolve("c") is None


async def test_a_name_never_quietly_moves_to_a_later_source(two, clock):
    first, second, tier = two
    first.put("a", ONE)
    second.put("a", TWO)
    second.put("b", ONE)
    await tier.resolve("a")
    await tier.resolve("b")
    first.go_down()
    clock.now += 10
    assert (await tier.resolve("a")).source == "fake://first"  # its last version
    assert (await tier.resolve("b")).source == "fake://second"  # the first did not have it
    second.put("c", ONE)
    with pytest.raises(AdapterUnavailable):  # the first may have it
        await tier.resolve("c")


async def test_listings_are_asked_for_at_once(tmp_path):
    sources = [FakeSource("fake://first"), FakeSource("fake://second")]
    tier = RemoteTier(sources, tmp_path, policy=NamePolicy(patience_s=60.0))
    for source in sources:
        source.gate.clear()
        source.put(source.source[-1], ONE)
    listing = asyncio.create_task(Catalog([], [], remote=tier).list())
    for _ in range(100):
        await asyncio.sleep(0.001)
    assert [source.calls["names"] for source in sources] == [1, 1]
    for source in sources:
        source.gate.set()
    assert [item.name for item in await listing] == ["d", "t"]
    await tier.close()


async def test_the_catalog_puts_folders_first_and_lists_all(two, tmp_path):
    first, second, tier = two
    for name in ("local", "base"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    for source, names in ((first, ("a", "local", "base")), (second, ("a", "b"))):
        for name in names:
            source.put(name, ONE)
    second.misnamed = ["no name"]
    catalog = Catalog([LocalSource(tmp_path / "adapters")], ["base"], remote=tier)
    assert (await catalog.resolve("local")).source == str(tmp_path / "adapters")
    assert (await catalog.resolve("a")).source == "fake://first"
    listed = {item.name: item.path for item in await catalog.list()}
    assert listed == {"a": "fake://first/a", "b": "fake://second/b", "local": str(tmp_path / "adapters" / "local")}
    for word in ("fake://second has an adapter 'a' too", "fake://first has an adapter 'local' too", "'no name'"):
        assert any(word in warning for warning in catalog.warnings), word
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("base")
    catalog.remove("b")
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("b")
    assert first.calls["resolve"] == 1  # a listing asks for no single adapter
