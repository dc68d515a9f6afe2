"""Adapters managed over HTTP: added, shown, taken, pinned, reloaded, prefetched, inspected; and who may do so."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import pytest

from adapters_store.errors import AdapterCorrupt, AdapterTooLarge, AdapterUnavailable
from adapters_store.remote_names import NamePolicy
from adapters_store.remote_tier import RemoteTier
from server.api import prefetch, tasks
from server.api.pins import Pins
from server.desired_file import read_adapters_file
from server.engine.messages import SlotChange
from tests.api.conftest import BASE, add_adapter, serve
from tests.api.doubles import ref_of
from tests.store.fake_source import FakeSource

ADAPTERS = "/v1/adapters"
ACTIONS = ("pin", "unpin", "reload", "prefetch")


@pytest.fixture
async def served(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir, may_load_adapters=True) as server:
        yield server


async def ask(served, method, path="", **options):
    async with served.http() as http:
        return await http.request(method, f"{ADAPTERS}{path}", **options)


async def add(served, name, path=None, query="", **fields):
    body = {"name": name, **({} if path is None else {"path": str(path)}), **fields}
    return await ask(served, "POST", query, json=body)


async def act(served, name, action, **options):
    return await ask(served, "POST", f"/{name}/{action}", **options)


async def listed(served) -> dict[str, dict]:
    return {entry["name"]: entry for entry in (await ask(served, "GET")).json()["data"]}


def check_error(response, status: int, code: str, param: str | None, *parts: str) -> None:
    """OpenAI's form, and nothing beside it."""
    assert response.status_code == status, response.text
    body = response.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and set(body) == {"error"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert all(part in error["message"] for part in parts), error["message"]


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


# --- add ------------------------------------------------------------------------------------------------


async def test_an_added_adapter_is_compiled_described_and_served(served):
    response = await add(served, "q", "team/sql", weight=2)
    assert response.status_code == 201
    told = response.json()
    assert (told["name"], told["root"], told["given_by"], told["weight"]) == ("q", "team/sql", "hand", 2.0)
    assert (told["disk"], told["image_key"]) == ({"state": "compiled"}, "image-of-q")
    assert told["device"] == {"state": "absent", "pinned": False} and not told["is_changing"]
    assert served.store.ensured == ["q"] and served.engine.weights == {"q": 2.0}
    assert (await ask(served, "GET", "/q")).json() == told == (await listed(served))["q"]
    await served.client().completions.create(model="q", prompt="x")
    assert str(served.adapters_dir) not in json.dumps(await listed(served))


async def test_it_answers_when_it_is_compiled_and_nobody_meets_it_before(served):
    gate = served.store.gates["q"] = asyncio.Event()
    task = asyncio.create_task(add(served, "q", "team/sql"))
    await until(lambda: served.store.ensured)
    on_its_way = (await ask(served, "GET", "/q")).json()
    assert (on_its_way["version"], on_its_way["is_changing"]) == (None, True)
    async with served.http() as http:
        assert (await http.post("/v1/completions", json={"model": "q", "prompt": "x"})).status_code == 404
    assert not task.done()
    gate.set()
    assert (await task).status_code == 201


async def test_without_waiting(served):
    gate = served.store.gates["q"] = asyncio.Event()
    response = await add(served, "q", "team/sql", "?wait=false")
    assert response.status_code == 202 and response.json()["is_changing"]
    check_error(await add(served, "q", "team/sql", "?wait=false"), 409, "conflict", "name", "under way")
    gate.set()
    async with asyncio.timeout(5):
        while (await ask(served, "GET", "/q")).json()["is_changing"]:
            await asyncio.sleep(0.005)
    assert (await ask(served, "GET", "/q")).json()["disk"]["state"] == "compiled"


async def test_what_went_wrong_while_nobody_waited_is_told_until_it_goes_well(served):
    served.store.errors["q"] = AdapterCorrupt("cut short")
    gate = served.store.gates["q"] = asyncio.Event()
    assert (await add(served, "q", "team/sql", "?wait=false")).status_code == 202
    gate.set()
    await until(lambda: not served.store.gates or "q" in served.store.ensured)
    async with asyncio.timeout(5):
        while (told := (await ask(served, "GET", "/q")).json())["is_changing"]:
            await asyncio.sleep(0.005)
    assert told["last_error"]["message"] == "cut short" and told["version"] is None
    assert (await listed(served))["q"]["last_error"]["message"] == "cut short"
    del served.store.errors["q"]
    assert (await add(served, "q", "team/sql")).status_code == 201
    assert (await ask(served, "GET", "/q")).json()["last_error"] is None


async def test_what_is_wrong_at_once_is_an_answer_without_waiting_too(served):
    check_error(await add(served, "q", "nothing", "?wait=false"), 404, "model_not_found", "path", "nothing")
    check_error(await add(served, "q", "/etc", "?wait=false"), 400, "invalid_value", "path")
    check_error(await add(served, "support-fr", "team/sql", "?wait=false"), 409, "adapter_exists", "name")
    check_error(await ask(served, "GET", "/q"), 404, "model_not_found", "name")


async def test_changes_that_nobody_waits_for_are_bounded(served, monkeypatch):
    monkeypatch.setattr(tasks, "MAX_TASKS", 2)
    gates = {name: asyncio.Event() for name in ("a", "b")}
    served.store.gates |= gates
    for name in gates:
        assert (await add(served, name, "team/sql", "?wait=false")).status_code == 202
    response = await add(served, "c", "team/sql", "?wait=false")
    check_error(response, 503, "overloaded", None, "2 changes")
    assert response.headers["retry-after"] == "1"
    for gate in gates.values():
        gate.set()


async def test_not_compiled_where_that_was_asked_for(served):
    response = await add(served, "q", "team/sql", preload=False)
    assert (response.status_code, served.store.ensured) == (201, [])
    assert response.json()["disk"] == {"state": "absent"}
    await served.client().completions.create(model="q", prompt="x")
    assert served.store.ensured == ["q"]


async def test_a_taken_name_is_replaced_only_when_asked_to(served):
    assert (await add(served, "q", "team/sql")).status_code == 201
    check_error(await add(served, "q", "support-fr"), 409, "adapter_exists", "name", "'q'", "replace")
    check_error(await add(served, "support-fr", "team/sql"), 409, "adapter_exists", "name")
    served.store.errors["q"] = AdapterCorrupt("cut short")
    check_error(await add(served, "q", "support-fr", replace=True), 422, "adapter_corrupt", "path", "cut short")
    assert (await ask(served, "GET", "/q")).json()["root"] == "team/sql"  # the old one goes on
    del served.store.errors["q"]
    assert (await add(served, "q", "support-fr", replace=True)).status_code == 201
    assert (await ask(served, "GET", "/q")).json()["root"] == "support-fr"


async def test_changes_of_one_name_follow_each_other(served):
    gate = served.store.gates["q"] = asyncio.Event()
    first = asyncio.create_task(add(served, "q", "team/sql"))
    await until(lambda: served.store.ensured)
    others = [
        asyncio.create_task(add(served, "q", "support-fr", replace=True)),
        asyncio.create_task(add(served, "q", "support-fr")),
        asyncio.create_task(add(served, "r", "support-fr")),
    ]
    await until(others[2].done)  # another name waits for nobody
    await asyncio.sleep(0.02)
    assert served.store.ensured == ["q", "r"]
    gate.set()
    statuses = [(await task).status_code for task in (first, *others)]
    assert statuses == [201, 201, 409, 201]
    assert (await ask(served, "GET", "/q")).json()["root"] == "support-fr"


async def test_a_name_as_it_is_may_be_kept_otherwise(served):
    """Without path and source the name stays what it is: pinned, weighed, compiled ahead."""
    response = await add(served, "team/sql", pin=True, weight=0.5)
    assert response.status_code == 200
    told = response.json()
    assert (told["given_by"], told["weight"], told["device"]) == (None, 0.5, {"state": "resident", "pinned": True})
    assert (await add(served, "team/sql")).json()["device"]["pinned"]  # null leaves it
    assert not (await add(served, "team/sql", pin=False)).json()["device"]["pinned"]
    check_error(await add(served, "nobody", pin=True), 404, "model_not_found", "name")


BAD_BODIES = [
    ({}, "missing_required_parameter", "name"),
    ({"name": ""}, "invalid_value", "name"),
    ({"name": 1}, "invalid_type", "name"),
    ({"name": None}, "missing_required_parameter", "name"),
    ({"name": BASE, "path": "team/sql"}, "invalid_value", "name"),
    ({"name": "base-alias", "path": "team/sql"}, "invalid_value", "name"),
    ({"name": "../x", "path": "team/sql"}, "invalid_value", "name"),
    ({"name": "q@deadbeef", "path": "team/sql"}, "invalid_value", "name"),
    ({"name": "x" * 129, "path": "team/sql"}, "invalid_value", "name"),
    ({"name": "x" * 2000, "path": "team/sql"}, "invalid_value", "name"),
    ({"name": "q", "path": ""}, "invalid_value", "path"),
    ({"name": "q", "path": "x" * 5000}, "invalid_value", "path"),
    ({"name": "q", "path": ["team/sql"]}, "invalid_type", "path"),
    ({"name": "q", "path": "team/sql\0"}, "invalid_value", "path"),
    ({"name": "q", "path": "../outside"}, "invalid_value", "path"),
    ({"name": "q", "path": "team/sql", "source": "s3://b/x"}, "invalid_value", "source"),
    ({"name": "q", "source": "s3://b/x"}, "invalid_value", "source"),
    ({"name": "q", "path": "team/sql", "pin": 1}, "invalid_type", "pin"),
    ({"name": "q", "path": "team/sql", "replace": "yes"}, "invalid_type", "replace"),
    ({"name": "q", "path": "team/sql", "weight": 0}, "invalid_value", "weight"),
    ({"name": "q", "path": "team/sql", "weight": -1}, "invalid_value", "weight"),
    ({"name": "q", "path": "team/sql", "weight": 1e9}, "invalid_value", "weight"),
    ({"name": "q", "path": "team/sql", "weight": "2"}, "invalid_type", "weight"),
    ({"name": "q", "path": "team/sql", "weight": True}, "invalid_type", "weight"),
    ({"name": "q", "path": "team/sql", "wish": 1}, "unknown_parameter", "wish"),
]


@pytest.mark.parametrize(("body", "code", "param"), BAD_BODIES, ids=lambda value: str(value)[:40])
async def test_bad_bodies(served, body, code, param):
    check_error(await ask(served, "POST", json=body), 400, code, param)
    assert served.store.ensured == [] and "q" not in await listed(served)


async def test_bodies_that_are_no_json(served):
    for path in ("", "/inspect", "/team/sql/prefetch"):
        for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
            response = await ask(served, "POST", path, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 400 and "error" in response.json()
        check_error(await ask(served, "POST", path, content=b"{}"), 400, "invalid_content_type", None)


@pytest.mark.parametrize("query", ["?wait=no", "?wait=", "?wait=true&wait=false", "?wait=1"])
async def test_a_wait_that_is_none(served, query):
    check_error(await add(served, "q", "team/sql", query), 400, "invalid_value", "wait")
    assert served.store.ensured == []


# --- show, take -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody", "team", "..", "team/sql/", "a:b", BASE, "x" * 5000])
async def test_names_that_are_no_adapter(served, name):
    for method in ("GET", "DELETE"):
        assert (await ask(served, method, f"/{name}")).status_code == 404
    for action in ACTIONS:
        assert (await act(served, name, action)).status_code == 404, action
    assert served.store.ensured == [] and served.engine.pinned == []


@pytest.mark.parametrize("name", ["q", "team/sql"])
async def test_a_taken_away_name_is_gone_and_may_come_again(served, name):
    """One given by hand and one found in a folder; its image on the device, its pin and its weight go too."""
    assert (await add(served, name, "team/sql", replace=True, pin=True, weight=3.0)).status_code == 201
    response = await ask(served, "DELETE", f"/{name}")
    assert (response.status_code, response.json()) == (200, {"name": name, "object": "adapter", "deleted": True})
    assert set(served.engine.dropped) == {f"image-of-{name}"} and served.engine.weights == {name: 1.0}
    check_error(await ask(served, "GET", f"/{name}"), 404, "model_not_found", "name")
    check_error(await ask(served, "DELETE", f"/{name}"), 404, "model_not_found", "name")
    assert name not in await listed(served) and not +served.store.leases
    told = (await add(served, name, "team/sql")).json()
    assert (told["weight"], told["device"]["pinned"]) == (1.0, False)


# --- pins -----------------------------------------------------------------------------------------------


async def test_pin_and_unpin(served):
    response = await act(served, "team/sql", "pin")
    assert response.status_code == 200
    assert response.json()["device"] == {"state": "resident", "pinned": True}
    assert served.engine.pinned == ["image-of-team/sql"] and served.store.leases["image-of-team/sql"] == 1
    assert (await act(served, "team/sql", "unpin")).json()["device"]["pinned"] is False
    assert served.engine.dropped == ["image-of-team/sql"] and not +served.store.leases
    assert (await act(served, "team/sql", "unpin")).status_code == 200  # it isn't pinned anyway


async def test_a_pin_that_waits_for_room_is_told_as_such(served, monkeypatch):
    monkeypatch.setattr(prefetch, "WAIT_S", 0.05)
    served.engine.is_crowded = True
    response = await act(served, "team/sql", "pin")
    assert response.status_code == 202
    assert response.json()["device"] == {"state": "absent", "pinned": True}
    await act(served, "team/sql", "unpin")


async def test_a_pin_that_can_never_fit_changes_nothing(tokenizer, adapters_dir, monkeypatch):
    monkeypatch.setattr(Pins, "check", refuse_all)
    async with serve(tokenizer, adapters_dir, may_load_adapters=True) as served:
        check_error(await act(served, "team/sql", "pin"), 422, "adapter_too_large", "name", "adapter memory")
        check_error(await add(served, "q", "team/sql", pin=True), 422, "adapter_too_large", "path")
        assert served.engine.pinned == [] and "q" not in await listed(served) and not +served.store.leases


def refuse_all(self, ref):
    raise AdapterTooLarge("2 GiB don't fit into the adapter memory of 1 GiB")


async def test_a_load_that_fails_is_the_answer_to_a_pin(served):
    served.engine.load_errors["image-of-team/sql"] = "the checksum differs"
    response = await act(served, "team/sql", "pin")
    check_error(response, 503, "adapter_unavailable", "name", "the checksum differs")
    del served.engine.load_errors["image-of-team/sql"]
    assert (await act(served, "team/sql", "pin")).status_code == 200  # what failed once may do now


async def test_a_dead_engine_changes_nothing(served):
    served.engine.die()
    for response in (await add(served, "q", "team/sql"), await act(served, "team/sql", "pin")):
        check_error(response, 503, "engine_dead", None)
    check_error(await act(served, "team/sql", "reload"), 503, "engine_dead", None)
    assert served.store.ensured == []


# --- reload, prefetch -----------------------------------------------------------------------------------


async def test_reload_of_a_folder_compiles_what_is_there_now(served):
    old = (await add(served, "team/sql", pin=True)).json()["version"]
    (served.adapters_dir / "team/sql" / "adapter_model.safetensors").write_bytes(b"another")
    told = (await act(served, "team/sql", "reload")).json()
    assert told["version"] != old and told["disk"]["state"] == "compiled"
    assert served.store.ensured == ["team/sql"] * 2 and served.store.retried == ["team/sql"]


@pytest.fixture
async def far(served, tmp_path):
    """A remote source with the adapter "far", asked at most once an hour."""
    source = FakeSource()
    source.put("far", {"adapter_config.json": b"{}"})
    policy = NamePolicy(poll_interval_s=3600, miss_ttl_s=3600)
    catalog = served.state.catalog
    catalog.remote = RemoteTier([source], tmp_path / "cache", policy=policy)
    catalog._list_age_s = 0.0
    yield source
    await catalog.remote.close()


async def test_reload_asks_the_source_now_and_new_requests_get_it_when_it_is_compiled(served, far):
    resolve = partial(served.state.catalog.resolve, "far")
    old = await resolve()
    far.put("far", {"adapter_config.json": b"{ }"})
    assert await resolve() == old  # for an hour
    gate = served.store.gates["far"] = asyncio.Event()
    task = asyncio.create_task(act(served, "far", "reload"))
    await until(lambda: served.store.ensured)
    assert await resolve() == old
    gate.set()
    told = (await task).json()
    assert told["version"] == (await resolve()).key != old.key


async def test_a_reload_that_fails_leaves_the_old_version(served, far):
    old = await served.state.catalog.resolve("far")
    far.put("far", {"adapter_config.json": b"{ }"})
    served.store.errors["far"] = AdapterCorrupt("cut short")
    check_error(await act(served, "far", "reload"), 422, "adapter_corrupt", "name", "cut short")
    assert await served.state.catalog.resolve("far") == old
    far.go_down()
    check_error(await act(served, "far", "reload"), 503, "adapter_unavailable", "name")
    assert await served.state.catalog.resolve("far") == old


async def test_reload_finds_what_has_gone_and_what_has_come(served, far):
    await served.state.catalog.resolve("far")
    far.delete("far")
    check_error(await act(served, "far", "reload"), 404, "model_not_found", "name")
    check_error(await ask(served, "GET", "/far"), 404, "model_not_found", "name")  # remembered for an hour
    far.put("far", {"adapter_config.json": b"{ }"})
    assert (await act(served, "far", "reload")).status_code == 200
    assert (await ask(served, "GET", "/far")).status_code == 200


async def test_a_given_name_can_be_taken_while_its_source_cant_be_asked(served, tmp_path):
    source = FakeSource()
    source.put("far", {"adapter_config.json": b"{}"})
    policy = NamePolicy(poll_interval_s=0, miss_ttl_s=0, on_source_down="fail")
    served.state.catalog.remote = RemoteTier([source], tmp_path / "cache", policy=policy)
    assert (await add(served, "near", source=f"{source.source}/far", weight=2)).status_code == 201
    source.go_down()
    assert (await ask(served, "DELETE", "/near")).status_code == 200
    source.come_back()
    check_error(await ask(served, "GET", "/near"), 404, "model_not_found", "name")
    assert served.engine.weights["near"] == 1.0
    await served.state.catalog.remote.close()


async def test_a_remote_adapter_under_another_name(served, far):
    url = f"{far.source}/far"
    told = (await add(served, "near", source=url)).json()
    assert (told["root"], told["given_by"], told["disk"]["state"]) == ("far", "hand", "compiled")
    assert told["version"] != (await served.state.catalog.resolve("far")).key  # neither is a version of the other
    assert {"near", "far"} <= set(await listed(served))
    check_error(await add(served, "near", source=url), 409, "adapter_exists", "name")
    # before a folder of that name, and after it again
    assert (await add(served, "team/sql", source=url, replace=True)).json()["root"] == "far"
    assert (await listed(served))["team/sql"]["root"] == "far"
    assert (await add(served, "team/sql", "support-fr", replace=True)).json()["root"] == "support-fr"
    far.put("far", {"adapter_config.json": b"{ }"})
    assert (await act(served, "near", "reload")).json()["version"] != told["version"]
    assert (await ask(served, "DELETE", "/near")).status_code == 200
    check_error(await ask(served, "GET", "/near"), 404, "model_not_found", "name")
    for wrong in ("fake://bucket/other/far", "fake://bucket/team", "fake://bucket/team/..", "far", f"{far.source}x/y"):
        check_error(await add(served, "x", source=wrong), 400, "invalid_value", "source", "--adapter-source")
    check_error(await add(served, "x", source=f"{far.source}/nobody"), 404, "model_not_found", "source")


@pytest.mark.parametrize(
    ("tier", "where"), [("disk", []), ("host", ["host"]), ("device", ["device"]), (None, ["device"])]
)
async def test_prefetch(served, tier, where):
    body = {} if tier is None else {"json": {"tier": tier}}
    response = await act(served, "team/sql", "prefetch", **body)
    assert response.status_code == 200
    told = response.json()
    assert told["disk"]["state"] == "compiled"
    assert told["host"]["state"] == ("held" if tier == "host" else "absent")
    assert told["device"]["state"] == ("resident" if tier in ("device", None) else "absent")
    assert served.engine.prefetched == [("image-of-team/sql", tier) for tier in where]
    assert served.engine.added == [] and not +served.store.leases
    assert served.store.leased == ["image-of-team/sql"] * len(where)


async def test_a_prefetch_for_which_others_would_make_way(served, monkeypatch):
    monkeypatch.setattr(prefetch, "WAIT_S", 0.05)
    served.engine.is_crowded = True
    response = await act(served, "team/sql", "prefetch")
    assert response.status_code == 202 and response.json()["device"]["state"] == "absent"
    assert not +served.store.leases


async def test_a_prefetch_that_can_never_fit_is_no_wait_for_room(served, monkeypatch):
    ref = ref_of(await served.state.catalog.resolve("team/sql"))
    pins = Pins(served.engine, served.store, lambda refs: f"{len(refs)} is too many")
    with pytest.raises(AdapterTooLarge, match="team/sql can't come to the device: 1 is too many"):
        pins.check_alone(ref)
    monkeypatch.setattr(Pins, "check_alone", refuse_all)
    check_error(await act(served, "team/sql", "prefetch"), 422, "adapter_too_large", "name", "adapter memory")
    assert (await act(served, "team/sql", "prefetch", json={"tier": "host"})).status_code == 200
    assert [tier for _, tier in served.engine.prefetched] == ["host"] and not +served.store.leases


async def test_prefetches_that_can_come_to_nothing(served, monkeypatch):
    monkeypatch.setattr(prefetch, "WAIT_S", 0.05)
    check_error(await act(served, "team/sql", "prefetch", json={"tier": "moon"}), 400, "invalid_value", "tier")
    check_error(await act(served, "team/sql", "prefetch", json={"to": "disk"}), 400, "unknown_parameter", "to")
    served.engine.load_errors["image-of-team/sql"] = "the checksum differs"
    check_error(await act(served, "team/sql", "prefetch"), 503, "adapter_unavailable", "name", "checksum differs")
    del served.engine.load_errors["image-of-team/sql"]
    served.engine.is_crowded = True
    assert (await act(served, "team/sql", "prefetch")).status_code == 202  # an old failure says nothing of a new load
    served.engine.is_crowded = False
    assert (await act(served, "team/sql", "prefetch")).status_code == 200
    ready = as_dict(served.engine.ready)
    served.engine.ready = type(served.engine.ready)(**{**ready, "host_bytes": 0})
    response = await act(served, "team/sql", "prefetch", json={"tier": "host"})
    check_error(response, 400, "invalid_value", "tier", "--host-memory")
    assert not +served.store.leases


def as_dict(struct) -> dict[str, object]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


# --- inspect --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{"name": "team/sql"}, {"path": "team/sql"}])
async def test_inspect_says_what_an_adapter_would_be_and_changes_nothing(served, body):
    before = await listed(served)
    response = await ask(served, "POST", "/inspect", json=body)
    assert response.status_code == 200
    report = response.json()
    assert (report["object"], report["adapter"], report["is_served"]) == ("adapter.report", "team/sql", True)
    assert report["bytes"] == {"disk": 4096, "host": 4096, "device": 4096, "source": 10}
    assert (report["ranks"], report["targets"]) == ({"0": 1, "8": 2}, {"q_proj": 2})
    assert (report["warnings"], report["problems"]) == (["a warning"], [])
    assert served.store.ensured == [] and await listed(served) == before
    (version,) = served.store.inspected
    assert version.path == str(served.adapters_dir / "team/sql")


async def test_inspect_of_one_that_would_be_refused(served):
    served.store.problems = [("adapter_mismatch", "q_proj has 7 rows"), ("adapter_unsupported", "DoRA is not served")]
    response = await ask(served, "POST", "/inspect", json={"path": "team/sql"})
    error, report = response.json()["error"], response.json()["report"]
    assert response.status_code == 422 and (error["code"], error["param"]) == ("adapter_mismatch", "path")
    assert "1. q_proj has 7 rows 2. DoRA is not served" in error["message"]
    assert [problem["message"] for problem in report["problems"]] == ["q_proj has 7 rows", "DoRA is not served"]
    assert not report["is_served"]
    served.store.problems = served.store.problems[:1]
    error = (await ask(served, "POST", "/inspect", json={"path": "team/sql"})).json()["error"]
    assert error["message"] == "q_proj has 7 rows"


async def test_inspect_of_what_is_not_there(served):
    inspect = partial(ask, served, "POST", "/inspect")
    check_error(await inspect(json={}), 400, "invalid_value", "name", "either")
    check_error(await inspect(json={"name": "q", "path": "team/sql"}), 400, "invalid_value", "name", "either")
    check_error(await inspect(json={"name": "nobody"}), 404, "model_not_found", "name")
    check_error(await inspect(json={"path": "nothing"}), 404, "model_not_found", "path")
    check_error(await inspect(json={"path": "/etc"}), 400, "invalid_value", "path")
    check_error(await inspect(json={"wish": 1}), 400, "unknown_parameter", "wish")
    served.store.errors["team/sql"] = AdapterUnavailable("the compiler process died; try again")
    check_error(await inspect(json={"name": "team/sql"}), 503, "adapter_unavailable", "name", "died")


# --- who may --------------------------------------------------------------------------------------------

CHANGES = [
    ("POST", "", {"name": "q", "path": "team/sql"}),
    ("POST", "/inspect", {"name": "team/sql"}),
    ("DELETE", "/team/sql", None),
    *(("POST", f"/team/sql/{action}", None) for action in ACTIONS),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=lambda value: str(value)[:24])
async def test_who_may_change_adapters(tokenizer, adapters_dir, method, path, body):
    change = {} if body is None else {"json": body}
    async with serve(tokenizer, adapters_dir) as off:
        check_error(await ask(off, method, path, **change), 403, "forbidden", None, "--allow-runtime-loading")
        assert (await ask(off, "GET", "/team/sql")).status_code == 200
        assert off.store.ensured == [] and off.store.inspected == []
    async with serve(tokenizer, adapters_dir, may_load_adapters=True, guards_loading=True) as local:
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            check_error(await ask(local, method, path, headers=headers, **change), 403, "forbidden", None)
        assert local.store.ensured == [] and local.store.inspected == []
        assert (await ask(local, method, path, **change)).status_code in (200, 201)
    async with serve(tokenizer, adapters_dir, may_load_adapters=True) as asked_for:
        page = {"origin": "https://evil.example"}  # that can send an empty POST unasked
        check_error(await ask(asked_for, method, path, headers=page, **change), 403, "forbidden", None, "evil.example")
        assert asked_for.store.ensured == [] and asked_for.store.inspected == []
        assert (await ask(asked_for, method, path, headers={"host": "any.example"}, **change)).status_code in (200, 201)
    async with serve(tokenizer, adapters_dir, may_load_adapters=True, api_keys=("s3cret",)) as keyed:
        check_error(await ask(keyed, method, path, **change), 401, "invalid_api_key", None)
        keyed.state.door.close()
        refused = await ask(keyed, method, path, headers={"authorization": "Bearer s3cret"}, **change)
        check_error(refused, 503, "overloaded", None, "shutting down")
        assert keyed.store.ensured == []


# --- the file -------------------------------------------------------------------------------------------


async def test_names_of_the_file_are_changed_in_the_file(tokenizer, adapters_dir, tmp_path):
    path = tmp_path / "adapters.json"
    entries = [{"name": "kept", "path": "team/sql", "pin": True, "weight": 2.0}, {"name": "bad", "path": "nothing"}]
    path.write_text(json.dumps({"adapters": entries}))
    async with serve(tokenizer, adapters_dir, may_load_adapters=True, adapters_file=read_adapters_file(path)) as served:
        told = (await ask(served, "GET", "/kept")).json()  # the first request finds it
        assert (told["given_by"], told["weight"], told["device"]["pinned"]) == ("file", 2.0, True)
        for response in (
            await add(served, "kept", "support-fr", replace=True),
            await ask(served, "DELETE", "/kept"),
            await act(served, "kept", "pin"),
            await act(served, "kept", "unpin"),
        ):
            check_error(response, 409, "conflict", "name", "--adapters-file")
        async with served.http() as http:
            for route, body in (("load", {"lora_path": "support-fr", "load_inplace": True}), ("unload", {})):
                refused = await http.post(f"/v1/{route}_lora_adapter", json={"lora_name": "kept", **body})
                assert refused.status_code == 400 and "--adapters-file" in refused.json()["message"]
        for action in ("reload", "prefetch"):
            assert (await act(served, "kept", action)).status_code == 200
        state = (await ask(served, "GET")).json()["adapters_file"]
        assert (state["ok"], state["entries"], state["num_failed"]) == (True, 2, 1)
        assert state["failed"][0]["name"] == "bad" and "nothing" in state["failed"][0]["message"]
        assert "nothing" in (await listed(served))["bad"]["last_error"]["message"]
        async with served.http() as http:
            metrics = (await http.get("/metrics")).text
        assert "multilora_adapters_file_ok 1\n" in metrics and "multilora_adapters_file_failed_entries 1\n" in metrics
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("desired", "adapters file"))]


async def test_a_failed_image_of_a_managed_adapter_is_told(served):
    await add(served, "q", "team/sql")
    served.engine.residents.apply([SlotChange("image-of-q", "failed", "checksum differs")])
    assert (await ask(served, "GET", "/q")).json()["last_error"]["message"] == "checksum differs"


async def test_a_name_that_looks_like_an_action(served):
    add_adapter(served.adapters_dir, "team/pin")
    assert (await ask(served, "GET", "/team/pin")).json()["name"] == "team/pin"
    assert (await act(served, "team/pin", "pin")).json()["name"] == "team/pin"
    assert served.engine.pinned == ["image-of-team/pin"]
    assert (await act(served, "team/pin", "unpin")).status_code == 200
