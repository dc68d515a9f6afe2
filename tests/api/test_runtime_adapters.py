"""Names given and taken while the server runs: vLLM's bodies, statuses and both error forms; GET /v1/adapters."""

from __future__ import annotations

import asyncio
import json
import shutil
import time

import pytest
from msgspec.structs import replace

from adapters_store.errors import (
    AdapterCorrupt,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnsupported,
)
from adapters_store.remote_tier import RemoteTier
from server.api.door import DRAINING_RETRY_AFTER_S
from server.api.pins import Pins
from server.engine.messages import SlotChange
from tests.api.conftest import BASE, add_adapter, serve
from tests.api.doubles import ref_of
from tests.store.fake_source import FakeSource

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
async def served(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir, may_load_adapters=True) as server:
        yield server


async def load(served, name, path, **fields):
    async with served.http() as http:
        return await http.post(LOAD, json={"lora_name": name, "lora_path": str(path), **fields})


async def unload(served, name, **fields):
    async with served.http() as http:
        return await http.post(UNLOAD, json={"lora_name": name, **fields})


async def names(served) -> list[str]:
    async with served.http() as http:
        return [card["id"] for card in (await http.get("/v1/models")).json()["data"]][2:]


async def listed(served) -> dict[str, dict]:
    async with served.http() as http:
        return {entry["name"]: entry for entry in (await http.get("/v1/adapters")).json()["data"]}


def check_error(response, status: int, kind: str, *parts: str) -> None:
    """Both forms, in one body, that say the same."""
    body = response.json()
    assert response.status_code == status, body
    nested = body["error"]
    assert body["object"] == "error"
    assert nested == {"message": nested["message"], "type": kind, "param": None, "code": status}
    assert {key: body[key] for key in nested} == nested
    assert all(part in nested["message"] for part in parts), nested["message"]


# --- load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["relative", "absolute", "dotted"])
async def test_a_folder_under_another_name(served, form):
    root = served.adapters_dir
    path = {"relative": "team/sql", "absolute": root / "team" / "sql", "dotted": "team/../team/sql"}[form]
    response = await load(served, "queries", path)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'queries' added successfully.")
    assert served.store.ensured == ["queries"]  # compiled before it answers
    assert await names(served) == ["queries", "support-fr", "team/sql"]
    assert (await listed(served))["queries"]["root"].endswith("team/sql")
    assert str(root) not in str(await listed(served))


async def test_a_load_answers_when_the_adapter_is_compiled(served):
    gate = served.store.gates["queries"] = asyncio.Event()
    task = asyncio.create_task(load(served, "queries", "team/sql"))
    while not served.store.ensured:
        await asyncio.sleep(0.002)
    assert "queries" not in await names(served)  # nobody meets a name that is not ready
    assert not task.done()
    gate.set()
    assert (await task).status_code == 200
    assert "queries" in await names(served)


COMPILE_ERRORS = [
    (AdapterCorrupt("adapter_model.safetensors is cut short"), 400, "BadRequestError"),
    (AdapterMismatch("layers.0.q_proj has the wrong shape"), 400, "BadRequestError"),
    (AdapterUnsupported("DoRA is not supported"), 400, "BadRequestError"),
    (AdapterTooLarge("rank 999 is above the limit 512"), 400, "BadRequestError"),
    (AdapterUnavailable("the compiler process died; try again"), 503, "ServiceUnavailableError"),
]


@pytest.mark.parametrize(("error", "status", "kind"), COMPILE_ERRORS, ids=lambda value: str(value)[:20])
async def test_what_is_wrong_with_the_adapter_is_the_answer(served, error, status, kind):
    served.store.errors["queries"] = error
    check_error(await load(served, "queries", "team/sql"), status, kind, str(error))
    assert "queries" not in await names(served)
    del served.store.errors["queries"]
    assert (await load(served, "queries", "team/sql")).status_code == 200


async def test_a_name_is_given_once_unless_in_place(served):
    assert (await load(served, "queries", "team/sql")).status_code == 200
    again = await load(served, "queries", "support-fr")
    # the words that controllers look for
    check_error(again, 400, "InvalidUserInput", "has already been loaded", "'queries'", "load_inplace")
    assert (await listed(served))["queries"]["root"] == "team/sql"
    assert (await load(served, "queries", "support-fr", load_inplace=True)).status_code == 200
    assert (await listed(served))["queries"]["root"] == "support-fr"


async def test_a_folders_own_name(served):
    """Loading what is served anyway warms it; another folder would replace it, which must be said."""
    check_error(await load(served, "support-fr", "team/sql"), 400, "InvalidUserInput", "already been loaded")
    assert (await load(served, "support-fr", "support-fr")).status_code == 200
    check_error(await load(served, "support-fr", "support-fr"), 400, "InvalidUserInput", "already been loaded")
    assert await names(served) == ["support-fr", "team/sql"]


async def test_a_failed_replacement_leaves_the_old_one(served):
    assert (await load(served, "queries", "team/sql")).status_code == 200
    served.store.errors["queries"] = AdapterCorrupt("cut short")
    check_error(await load(served, "queries", "support-fr", load_inplace=True), 400, "BadRequestError", "cut short")
    entry = (await listed(served))["queries"]
    assert entry["root"] == "team/sql"
    assert entry["last_error"]["message"] == "cut short"


async def test_the_adapter_of_a_name_resolved_before_its_replacement_stays(served):
    """A request takes the version that was current when it came; a new one takes the new."""
    await load(served, "queries", "team/sql")
    old = await served.state.catalog.resolve("queries")
    await load(served, "queries", "support-fr", load_inplace=True)
    new = await served.state.catalog.resolve("queries")
    assert (old.path, new.path) == tuple(str(served.adapters_dir / name) for name in ("team/sql", "support-fr"))
    assert old.key != new.key
    assert served.store.lookup(old.key) is not None


async def test_two_loads_of_one_name_follow_each_other(served):
    gate = served.store.gates["queries"] = asyncio.Event()
    tasks = [asyncio.create_task(load(served, "queries", path)) for path in ("team/sql", "support-fr")]
    while not served.store.ensured:
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.02)
    assert served.store.ensured == ["queries"]
    gate.set()
    assert sorted([response.status_code for response in await asyncio.gather(*tasks)]) == [200, 400]


OUTSIDE = ["/", "/etc", "..", "../..", "team/../../outside", "../outside", "link-out", "\0", "team/sql\0"]


async def test_paths_outside_the_roots_are_refused_whether_or_not_they_exist(served, tmp_path):
    add_adapter(tmp_path, "outside")
    (served.adapters_dir / "link-out").symlink_to(tmp_path / "outside")
    for path in [*OUTSIDE, str(tmp_path / "outside"), str(tmp_path / "nothing"), f"{served.adapters_dir}-x"]:
        body = json.dumps({"lora_name": "stolen", "lora_path": path})
        async with served.http() as http:
            response = await http.post(LOAD, content=body, headers={"content-type": "application/json"})
        check_error(response, 400, "InvalidUserInput", "'lora_path'", "--adapters")
    assert served.store.ensured == []
    assert "stolen" not in await names(served)


async def test_a_folder_whose_files_lead_out_is_not_found(served, tmp_path):
    (served.adapters_dir / "sly").mkdir()
    (tmp_path / "secret").write_text("{}")
    (served.adapters_dir / "sly" / "adapter_config.json").symlink_to(tmp_path / "secret")
    check_error(await load(served, "sly", "sly"), 404, "NotFoundError")


@pytest.mark.parametrize("path", ["nothing", "team", "x" * 300, "team/sql/adapter_config.json", "s3://bucket/x"])
async def test_a_path_without_an_adapter_is_404(served, path):
    check_error(await load(served, "x", path), 404, "NotFoundError", "No adapter found")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ({}, ["Both 'lora_name' and 'lora_path' must be provided."]),
        ({"lora_name": "x"}, ["must be provided"]),
        ({"lora_path": "team/sql"}, ["must be provided"]),
        ({"lora_name": 1, "lora_path": "team/sql"}, ["lora_name"]),
        ({"lora_name": "x", "lora_path": None}, ["Both 'lora_name' and 'lora_path' must be provided."]),
        ({"lora_name": None, "lora_path": "team/sql"}, ["Both 'lora_name' and 'lora_path' must be provided."]),
        ({"lora_name": "x", "lora_path": "team/sql", "load_inplace": 1}, ["load_inplace"]),
        ({"lora_name": "x", "lora_path": "team/sql", "base_model_name": 5}, ["base_model_name"]),
        ({"lora_name": "x", "lora_path": "y", "is_3d_lora_weight": True}, ["is_3d_lora_weight"]),
        ({"lora_name": BASE, "lora_path": "team/sql"}, ["the base model's"]),
        ({"lora_name": "base-alias", "lora_path": "team/sql"}, ["the base model's"]),
        ({"lora_name": "a:b", "lora_path": "team/sql"}, ["a:b"]),
        ({"lora_name": "../x", "lora_path": "team/sql"}, ["../x"]),
        ({"lora_name": "x", "lora_path": "\ud800"}, ["lora_path"]),
        ({"lora_name": "x" * 2000, "lora_path": "team/sql"}, ["lora_name"]),
    ],
)
async def test_bad_bodies(served, body, parts):
    async with served.http() as http:
        response = await http.post(LOAD, content=json.dumps(body), headers={"content-type": "application/json"})
        check_error(response, 400, "InvalidUserInput", *parts)
    assert served.store.ensured == []


async def test_bodies_that_are_no_json(served):
    async with served.http() as http:
        for route in (LOAD, UNLOAD):
            for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
                response = await http.post(route, content=content, headers={"content-type": "application/json"})
                check_error(response, 400, "BadRequestError")
            # without the content type a page in a browser could send it
            check_error(await http.post(route, content=b"{}"), 400, "BadRequestError", "Content-Type")


async def test_the_base_may_be_named(served):
    assert (await load(served, "q", "team/sql", base_model_name=BASE, is_3d_lora_weight=False)).status_code == 200


async def test_what_other_controllers_send_is_taken(served, caplog):
    """Keys that vLLM does not know either, nulls, and a base under a name that is not ours."""
    more = {"pinned": True, "wish": [1], "load_inplace": None, "is_3d_lora_weight": None, "base_model_name": None}
    assert (await load(served, "q", "team/sql", **more)).status_code == 200
    assert caplog.messages == []
    assert (await load(served, "r", "team/sql", base_model_name="other/\nbase")).status_code == 200
    (said,) = caplog.messages
    assert "'r'" in said and "'other/\ufffdbase'" in said and BASE in said
    assert (await load(served, "q", "support-fr", load_inplace=None)).status_code == 400
    assert (await unload(served, "q", wish=1, lora_int_id=None)).status_code == 200
    check_error(await unload(served, None), 400, "InvalidUserInput", "'lora_name' needs to be provided")


async def test_a_dead_engine_loads_nothing(served):
    served.engine.die()
    check_error(await load(served, "q", "team/sql"), 503, "ServiceUnavailableError")


# --- unload ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["queries", "support-fr"])
async def test_unload_takes_the_name_away(served, name):
    """A name given by hand and one found in a folder; an image on the device goes."""
    await load(served, "queries", "team/sql")
    await load(served, "support-fr", "support-fr")
    response = await unload(served, name, lora_int_id=7)
    assert (response.status_code, response.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
    assert served.engine.dropped == [f"image-of-{name}"]
    assert name not in await names(served)
    assert name not in await listed(served)
    async with served.http() as http:
        assert (await http.get(f"/v1/models/{name}")).status_code == 404
    check_error(await unload(served, name), 404, "NotFoundError", f"'{name}' cannot be found")
    # and it can come back
    assert (await load(served, name, "team/sql")).status_code == 200
    assert name in await names(served)


async def test_unload_of_one_that_was_never_used(served):
    assert (await unload(served, "team/sql")).status_code == 200
    assert served.engine.dropped == []
    assert await names(served) == ["support-fr"]


async def test_unload_of_one_whose_folder_has_gone(served):
    await load(served, "queries", "team/sql")
    shutil.rmtree(served.adapters_dir / "team" / "sql")
    assert await names(served) == ["support-fr"]
    assert (await unload(served, "queries")).status_code == 200
    check_error(await unload(served, "queries"), 404, "NotFoundError")


async def test_unload_needs_a_name_that_is_there(served):
    check_error(await unload(served, ""), 400, "InvalidUserInput", "'lora_name' needs to be provided")
    for name in ("nobody", BASE, "../x", "a\0"):
        check_error(await unload(served, name), 404, "NotFoundError", "cannot be found")


# --- off, and guarded -----------------------------------------------------------------------------------


async def test_off_unless_allowed(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir) as served:
        check_error(await load(served, "q", "team/sql"), 403, "PermissionDeniedError", "--allow-runtime-loading")
        check_error(await unload(served, "team/sql"), 403, "PermissionDeniedError", "--allow-runtime-loading")
        assert await names(served) == ["support-fr", "team/sql"]


async def test_the_key_is_asked_for(tokenizer, adapters_dir):
    async with (
        serve(tokenizer, adapters_dir, may_load_adapters=True, api_keys=("s3cret",)) as served,
        served.http() as http,
    ):
        assert (await http.get("/v1/adapters")).status_code == 401
        for route in (LOAD, UNLOAD):
            refused = await http.post(route, json={})
            check_error(refused, 401, "AuthenticationError", "API key")
            assert refused.headers["www-authenticate"] == "Bearer"


async def test_a_draining_server_says_so_in_both_forms(served):
    served.state.door.close()
    for refused in (await load(served, "q", "team/sql"), await unload(served, "q")):
        check_error(refused, 503, "ServiceUnavailableError", "shutting down")
        assert int(refused.headers["retry-after"]) == DRAINING_RETRY_AFTER_S
    assert served.store.ensured == []


# --- the listing ----------------------------------------------------------------------------------------


async def test_the_listing_tells_where_a_remote_adapters_files_are(served, tmp_path):
    source = FakeSource()
    source.put("far", {"adapter_config.json": b"{}"})
    catalog = served.state.catalog
    tier = catalog.remote = RemoteTier([source], tmp_path / "cache")
    catalog._list_age_s = 0.0

    async def far() -> dict:
        return (await listed(served))["far"]

    async def fetch() -> None:
        async with tier.files(await catalog.resolve("far")):
            pass

    never_asked_for = await far()
    assert (never_asked_for["source"], never_asked_for["raw"]) == ({"bytes": None}, {"state": "absent"})
    assert never_asked_for["root"] == "far"
    await catalog.resolve("far")
    assert ((await far())["source"], (await far())["raw"]) == ({"bytes": 2}, {"state": "absent"})
    source.gate.clear()
    fetching = asyncio.create_task(fetch())
    while not source.at_once:
        await asyncio.sleep(0)
    assert (await far())["raw"] == {"state": "fetching"}
    source.gate.set()
    await fetching
    assert (await far())["raw"] == {"state": "held"}
    assert (await listed(served))["team/sql"]["raw"] == {"state": "absent"}
    await tier.close()


async def test_the_listing_tells_the_tiers(served):
    """Source, disk, host memory, device, each as the adapter moves on."""
    before = (await listed(served))["team/sql"]
    version = await served.state.catalog.resolve("team/sql")
    assert before["version"] == version.key
    assert before["source"] == {"bytes": 10}
    assert before["disk"] == {"state": "absent"}
    assert before["host"] == {"state": "absent"}
    assert before["device"] == {"state": "absent", "pinned": False}
    assert (before["image_key"], before["rank"], before["bytes"], before["last_used"]) == (None,) * 4
    await load(served, "team/sql", "team/sql")
    on_disk = (await listed(served))["team/sql"]
    assert on_disk["disk"] == {"state": "compiled"}
    assert (on_disk["image_key"], on_disk["rank"], on_disk["bytes"]) == ("image-of-team/sql", 8, 1)
    assert on_disk["device"]["state"] == on_disk["host"]["state"] == "absent"
    served.engine.residents.apply([SlotChange("image-of-team/sql", "hosted")])
    hosted = (await listed(served))["team/sql"]
    assert (hosted["host"]["state"], hosted["device"]["state"]) == ("held", "absent")
    served.engine.residents.apply([SlotChange("image-of-team/sql", "ready")])
    assert (await listed(served))["team/sql"]["device"]["state"] == "resident"
    served.engine.residents.apply([SlotChange("image-of-team/sql", "gone")])
    assert (await listed(served))["team/sql"]["device"]["state"] == "absent"
    served.engine.residents.apply([SlotChange("image-of-team/sql", "failed", "checksum differs")])
    assert (await listed(served))["team/sql"]["last_error"]["message"] == "checksum differs"


async def test_the_listing_counts_uses(served):
    client = served.client()
    for _ in range(3):
        await client.completions.create(model="support-fr", prompt="x")
    entry = (await listed(served))["support-fr"]
    assert entry["uses"] == 3
    assert abs(entry["last_used"] - time.time()) < 30
    assert entry["last_error"] is None
    assert (await listed(served))["team/sql"]["uses"] == 0


# --- pins -----------------------------------------------------------------------------------------------


async def test_a_pin_follows_its_name(served):
    """Replaced: the new image is pinned and the old one let go. Unloaded: let go."""
    await load(served, "queries", "team/sql")
    version = await served.state.catalog.resolve("queries")
    store = served.store
    pins = Pins(served.engine, store)
    old = ref_of(version)
    pins.add(old)
    assert served.engine.pinned == [old.image_key]
    assert store.leases[old.image_key] == 1
    pins.follow(old)
    assert served.engine.pinned == [old.image_key]
    new = replace(old, image_key="new")
    pins.follow(new)
    assert served.engine.pinned == [old.image_key, "new"]
    assert served.engine.dropped == [old.image_key]
    assert (store.leases[old.image_key], store.leases["new"]) == (0, 1)
    pins.add(replace(new, name="same-content"))
    pins.remove("queries")
    assert served.engine.dropped == [old.image_key]  # another name still pins it
    pins.remove("same-content")
    pins.remove("same-content")
    assert served.engine.dropped == [old.image_key, "new"]
    assert not +store.leases


# --- chat templates -------------------------------------------------------------------------------------


async def ask(served, model: str):
    async with served.http() as http:
        body = {"model": model, "messages": [{"role": "user", "content": "fox"}]}
        return await http.post("/v1/chat/completions", json=body)


async def test_an_adapters_own_chat_template(served):
    (served.adapters_dir / "support-fr" / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    for model, prompt in (("support-fr", "[fox]"), (BASE, "<|user|>fox<|end|><|assistant|>"), ("support-fr", "[fox]")):
        assert (await ask(served, model)).status_code == 200
        expected = served.tokenizer.encode(prompt, add_special_tokens=False)
        assert served.engine.added[-1].prompt_ids == expected
    assert served.engine.added[0].pending is not None


async def test_a_broken_template_is_the_adapters_fault(served):
    (served.adapters_dir / "support-fr" / "tokenizer_config.json").write_text('{"chat_template": 7}')
    response = await ask(served, "support-fr")
    assert response.status_code == 422
    assert "tokenizer_config.json of adapter support-fr" in response.json()["error"]["message"]
    (served.adapters_dir / "support-fr" / "chat_template.jinja").write_text("{% for %}")
    response = await ask(served, "support-fr")
    assert response.status_code == 422
    assert "chat_template.jinja of adapter support-fr" in response.json()["error"]["message"]
    assert (await ask(served, BASE)).status_code == 200
    assert served.engine.added[-1].adapter is None


async def test_a_template_that_takes_too_much_costs_its_own_request(served):
    own = "{% if messages[0].content == 'much' %}{{ 'x' * 10 ** 10 }}{% endif %}[{{ messages[0].content }}]"
    (served.adapters_dir / "support-fr" / "chat_template.jinja").write_text(own)
    async with served.http() as http:
        body = {"model": "support-fr", "messages": [{"role": "user", "content": "much"}]}
        refused = await http.post("/v1/chat/completions", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (422, "adapter_too_large", "model")
    assert "chat_template.jinja of adapter support-fr" in error["message"] and "512 MiB" in error["message"]
    assert (await ask(served, "support-fr")).status_code == 200
    assert served.engine.added[-1].prompt_ids == served.tokenizer.encode("[fox]", add_special_tokens=False)


async def test_a_template_that_makes_too_long_a_text(served):
    (served.adapters_dir / "support-fr" / "chat_template.jinja").write_text("{{ 'the ' * 10 ** 6 }}")
    response = await ask(served, "support-fr")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
