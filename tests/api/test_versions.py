"""`model: "name@version"`: what answers, what the headers say, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging

import pytest
from msgspec.structs import replace

from adapters_store.errors import AdapterUnavailable
from adapters_store.ref import AdapterRef, SourceVersion
from server.api.pins import Pins
from server.api.service import ApiLimits
from server.api.supply import AdapterSupply, Target
from tests.api import doubles
from tests.api.conftest import BASE, serve
from tests.api.doubles import ScriptedEngine, ScriptedStore
from tests.api.test_adapters import until

ID_HEADERS = {
    "version": "x-multilora-adapter-version",
    "digest": "x-multilora-adapter-digest",
    "image_key": "x-multilora-image-key",
}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(autouse=True)
def keys_of_their_own(monkeypatch):
    """Each version has a digest and an image key as real ones are."""
    plain = doubles.ref_of
    monkeypatch.setattr(
        doubles, "ref_of", lambda v: replace(plain(v), digest=sha(f"d{v.key}"), image_key=sha(f"i{v.key}"))
    )


def rewrite(served, name: str, content: bytes) -> None:
    (served.adapters_dir / name / "adapter_model.safetensors").write_bytes(content)


async def ask(http, model: str, **fields):
    return await http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2, **fields})


async def two_versions(served, http) -> tuple[AdapterRef, AdapterRef]:
    """The refs of a former and of the current version of support-fr, both on disk."""
    assert (await ask(http, "support-fr")).status_code == 200
    rewrite(served, "support-fr", b"another")
    assert (await ask(http, "support-fr")).status_code == 200
    old, new = served.store.on_disk.values()
    assert old.version != new.version
    return old, new


async def test_former_and_current_by_each_of_their_keys(served):
    async with served.http() as http:
        for ref in await two_versions(served, http):
            for key in (ref.version, ref.digest, ref.image_key):
                for model in (f"support-fr@{key}", f"{BASE}:support-fr@{key[:8]}", f"support-fr@{key[:17].upper()}"):
                    answer = await ask(http, model)
                    assert answer.status_code == 200 and answer.json()["model"] == "support-fr"
                    assert served.engine.added[-1].adapter == ref
        assert served.store.ensured == ["support-fr"] * 2
        listed = (await http.get("/v1/adapters")).json()["data"]
        (shown,) = [entry for entry in listed if entry["name"] == "support-fr"]
        assert len(listed) == 2 and shown["uses"] == 20
        assert {name: shown[name] for name in ID_HEADERS} == {name: getattr(ref, name) for name in ID_HEADERS}
        assert (await http.get(f"/v1/models/support-fr@{ref.version[:9]}")).json()["id"] == "support-fr"
        body = {"model": f"support-fr@{ref.version[:9]}", "prompt": "the fox"}
        assert (await http.post("/tokenize", json=body)).status_code == 200
    served.assert_quiet()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_answer_says_which_version_it_is_of(served, path, stream):
    async with served.http() as http:
        refs = await two_versions(served, http)
        asked = {"max_tokens": 2, "stream": stream, **(CHAT if "chat" in path else {"prompt": "x", "n": 2})}
        for model, ref in (
            ("support-fr", refs[1]),
            (f"support-fr@{refs[0].version[:8]}", refs[0]),
            (f"support-fr@{refs[1].digest[:8]}", refs[1]),
        ):
            answer = await http.post(path, json={"model": model, **asked})
            assert answer.status_code == 200
            assert {name: answer.headers[header] for name, header in ID_HEADERS.items()} == {
                name: getattr(ref, name) for name in ID_HEADERS
            }
        answer = await http.post(path, json={"model": BASE, **asked})
        assert not [name for name in answer.headers if name.startswith("x-multilora")]


async def test_a_cold_answer_says_the_version_that_was_compiled(served):
    """Files that are replaced while they are compiled: the header has what answers, not what was looked up."""
    gate = served.store.gates["support-fr"] = asyncio.Event()
    newer: list[AdapterRef] = []

    async def ensure(version: SourceVersion) -> AdapterRef:
        await gate.wait()
        newer.append(doubles.ref_of(replace(version, path="newer")))
        return newer[0]

    served.store.ensure = ensure
    async with served.http() as http:
        plain = asyncio.create_task(ask(http, "support-fr"))
        version = await served.state.catalog.resolve("support-fr")
        exact = asyncio.create_task(ask(http, f"support-fr@{version.key}"))
        await until(lambda: len(served.engine.added) == 2)
        gate.set()
        answer, refused = await asyncio.gather(plain, exact)
    assert answer.status_code == 200
    assert answer.headers["x-multilora-adapter-version"] == newer[0].version != version.key
    told = refused.json()["error"]
    assert (refused.status_code, told["code"], told["param"]) == (404, "model_not_found", "model")
    assert version.key in told["message"]
    served.assert_quiet()


async def test_versions_that_are_not_at_hand(served):
    async with served.http() as http:
        old, new = await two_versions(served, http)
        await ask(http, "team/sql")
        other = served.store.on_disk[list(served.store.on_disk)[-1]]
        num_added = len(served.engine.added)
        for key in ("0123456789", other.version, other.digest, other.image_key):
            refused = await ask(http, f"support-fr@{key}")
            told = refused.json()["error"]
            assert (refused.status_code, told["code"], told["param"]) == (404, "model_not_found", "model"), key
            assert old.version[:12] in told["message"] and f"{new.version[:12]} (current)" in told["message"]
            assert other.version[:12] not in told["message"].replace(key, "")
        for model in (f"nobody@{old.version}", f"{BASE}@{old.version}", f"team/sql@{old.version}", f"@{old.version}"):
            assert (await ask(http, model)).status_code == 404, model
        for version in ("", "1234567", "not-hex-at-all", f"{old.version}0", "12345678@12345678", " 12345678"):
            refused = await ask(http, f"support-fr@{version}")
            assert refused.status_code == 404 and "at least 8" in refused.json()["error"]["message"], version
        assert len(served.engine.added) == num_added
    served.assert_quiet()


async def test_a_prefix_of_two_contents_is_refused(served, monkeypatch):
    plain = doubles.ref_of
    monkeypatch.setattr(doubles, "ref_of", lambda v: replace(plain(v), digest=f"abcdef012{sha(v.key)}"[:64]))
    async with served.http() as http:
        old, _ = await two_versions(served, http)
        refused = await ask(http, "support-fr@abcdef012")
        told = refused.json()["error"]
        assert (refused.status_code, told["code"], told["param"]) == (400, "ambiguous_version", "model")
        assert (await ask(http, f"support-fr@{old.digest}")).status_code == 200
        assert served.engine.added[-1].adapter == old


async def test_a_name_that_is_gone_takes_its_versions_along(served):
    async with served.http() as http:
        old, _ = await two_versions(served, http)
        served.state.catalog.remove("support-fr")
        assert (await ask(http, f"support-fr@{old.version}")).status_code == 404


async def test_the_log_has_names_without_versions(tokenizer, adapters_dir, caplog):
    logger = logging.getLogger("multilora.access")
    with caplog.at_level(logging.INFO, logger.name):
        async with (
            serve(tokenizer, adapters_dir, limits=ApiLimits(has_access_log=True)) as served,
            served.http() as http,
        ):
            old, _ = await two_versions(served, http)
            caplog.clear()
            await ask(http, f"support-fr@{old.version}")
            await ask(http, "support-fr@00000000")
            await ask(http, f"{BASE}:support-fr@oops")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == logger.name]
    assert [(line["status"], line["model"], line["adapter"]) for line in lines] == [
        (200, "support-fr", "support-fr"),
        (404, "support-fr", None),
        (404, f"{BASE}:support-fr", None),
    ]
    assert lines[0]["image_key"] == old.image_key


async def test_a_former_versions_own_chat_template(served):
    """It is used as far as it is known; another's never is."""
    template = served.adapters_dir / "support-fr" / "chat_template.jinja"
    async with served.http() as http:

        async def chat(model: str) -> tuple[int, str]:
            answer = await http.post("/v1/chat/completions", json={"model": model, "max_tokens": 1, **CHAT})
            if answer.status_code != 200:
                return answer.status_code, answer.json()["error"]["message"]
            return 200, served.tokenizer.decode(served.engine.added[-1].prompt_ids, skip_special_tokens=False)

        versions = []
        for text, is_used in (("one", True), ("two", False), ("three", False)):
            template.write_text(text)
            rewrite(served, "support-fr", text.encode())
            assert (await ask(http, "support-fr")).status_code == 200
            versions.append((await served.state.catalog.resolve("support-fr")).key)
            if is_used:
                assert await chat("support-fr") == (200, text)
        assert await chat(f"support-fr@{versions[0]}") == (200, "one")
        status, message = await chat(f"support-fr@{versions[1]}")
        assert status == 404 and versions[1] in message and "chat template" in message
        assert await chat(f"support-fr@{versions[2]}") == (200, "three")
        assert (await ask(http, f"support-fr@{versions[1]}")).status_code == 200


@pytest.mark.parametrize("is_former", [False, True])
async def test_a_template_that_can_not_be_read_now(served, monkeypatch, is_former):
    """Of the current version 503: it may be read later."""

    async def chat_template(version):
        raise AdapterUnavailable("the source is down")

    async with served.http() as http:
        old, new = await two_versions(served, http)
        monkeypatch.setattr(served.state.catalog, "chat_template", chat_template)
        model = f"support-fr@{(old if is_former else new).version}"
        answer = await http.post("/v1/chat/completions", json={"model": model, **CHAT})
        assert answer.status_code == (404 if is_former else 503)


async def test_a_pin_of_the_operator_follows_the_name_not_a_requests_version():
    """--pin keeps what the name points to; a request for a former version changes nothing of it."""
    engine, store = ScriptedEngine(300, 0, lambda request: doubles.Script([1])), ScriptedStore()
    versions = [SourceVersion("s", "fr", path, ()) for path in ("old", "new")]
    old, new = [await store.ensure(version) for version in versions]
    pins = Pins(engine, store)
    pins.add(new)
    supply = AdapterSupply(engine, None, store, [BASE], pins)
    hold = supply.hold(Target("fr", versions[0], is_exact=True, is_former=True))
    assert hold.ref == old and engine.pinned == [new.image_key]
    supply.release(hold)
    store.on_disk.clear()  # both are made anew
    for version, pinned in zip(versions, ([], [new.image_key]), strict=True):
        engine.pinned.clear()
        hold = supply.hold(Target("fr", version, is_exact=True))
        supply.fetch(hold)
        await supply._fetches[hold.pending].task
        assert hold.ref is not None and engine.pinned == pinned
        supply.release(hold)
    assert +store.leases == {new.image_key: 1}
    await engine.close()


class OneName:
    """A catalog with one name; `version` is what it points to."""

    def __init__(self, version: SourceVersion) -> None:
        self.version = version

    async def resolve(self, name: str) -> SourceVersion:
        return self.version


async def test_a_request_from_before_a_replacement_does_not_move_a_pin_back():
    engine, store = ScriptedEngine(300, 0, lambda request: doubles.Script([1])), ScriptedStore()
    first, second, third = [SourceVersion("s", "fr", path, ()) for path in ("first", "second", "third")]
    refs = {version: await store.ensure(version) for version in (first, second, third)}
    pins, catalog = Pins(engine, store), OneName(first)
    supply = AdapterSupply(engine, catalog, store, [BASE], pins)
    pins.add(refs[first])
    early = await supply.resolve("fr")
    catalog.version = second
    later = await supply.resolve("fr")
    holds = [supply.hold(later), supply.hold(early)]
    assert [hold.ref for hold in holds] == [refs[second], refs[first]] and pins.keeps(refs[second])
    pins.follow(refs[third])  # given by hand: nothing is later
    holds.append(supply.hold(later))
    assert pins.keeps(refs[third])
    store.on_disk.clear()  # made anew: the engine may have let go of a pin whose load failed
    for target, repinned in ((early, []), (dataclasses.replace(early, version=third), [refs[third].image_key])):
        engine.pinned.clear()
        holds.append(supply.hold(target))
        supply.fetch(holds[-1])
        await supply._fetches[holds[-1].pending].task
        assert engine.pinned == repinned and pins.keeps(refs[third])
    late = await supply.resolve("fr")  # the name is another one now
    holds.append(supply.hold(late))
    supply.fetch(holds[-1])
    await supply._fetches[holds[-1].pending].task
    assert pins.keeps(refs[second])
    for hold in holds:
        supply.release(hold)
    assert +store.leases == {refs[second].image_key: 1}
    await engine.close()
