"""Names to adapters: grammar, cold starts, their status codes, leases, single flight."""

from __future__ import annotations

import asyncio

import openai
import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import (
    AdapterCorrupt,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnsupported,
)
from server.engine.messages import RequestError
from tests.api.conftest import ANSWER, BASE, add_adapter, serve

CHAT = [{"role": "user", "content": "x"}]


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("model", ["team/sql", f"{BASE}:team/sql", "base-alias:team/sql"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_by_its_names(served, model, stream):
    served.answer("the lazy dog", adapter="team/sql")
    raw = await served.client().completions.with_raw_response.create(
        model=model, prompt="x", stream=stream, max_tokens=50
    )
    assert raw.headers["x-multilora-image-key"] == "image-of-team/sql"
    answer = raw.parse()
    parts = [chunk async for chunk in answer] if stream else [answer]
    assert {part.model for part in parts} == {"team/sql"}
    assert "".join(part.choices[0].text for part in parts) == "the lazy dog"
    served.assert_quiet()


async def test_the_base_has_no_image_key(served):
    raw = await served.client().completions.with_raw_response.create(model=BASE, prompt="x")
    assert "x-multilora-image-key" not in raw.headers
    assert served.engine.added[0].adapter is None
    assert served.engine.added[0].pending is None


async def test_a_warm_adapter_is_sent_with_its_ref(served):
    client = served.client()
    await client.completions.create(model="support-fr", prompt="x")
    await client.completions.create(model="support-fr", prompt="x")
    cold, warm = served.engine.added
    assert cold.adapter is None
    assert cold.pending is not None
    assert warm.pending is None
    assert warm.adapter.image_key == "image-of-support-fr"
    assert served.store.ensured == ["support-fr"]
    assert served.store.leased == ["image-of-support-fr"] * 2
    served.assert_quiet()


async def test_a_cold_request_is_in_the_engine_before_its_adapter_is_there(served):
    """The engine owns the one queue: ageing, bounds and the waiting metrics start at arrival."""
    gate = served.store.gates["support-fr"] = asyncio.Event()
    task = asyncio.create_task(served.client().completions.create(model="support-fr", prompt="x"))
    await until(lambda: served.engine.added)
    assert served.engine.added[0].pending is not None
    assert served.engine.ready_keys == []
    assert not task.done()
    gate.set()
    await task
    assert served.engine.ready_keys == [served.engine.added[0].pending]


async def test_many_cold_requests_share_one_fetch(served):
    gate = served.store.gates["support-fr"] = asyncio.Event()
    client = served.client()
    tasks = [asyncio.create_task(client.completions.create(model="support-fr", prompt="x")) for _ in range(20)]
    await until(lambda: len(served.engine.added) == 20)
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert {answer.model for answer in answers} == {"support-fr"}
    assert served.store.ensured == ["support-fr"]
    assert len(served.store.leased) == 20
    served.assert_quiet()


async def test_requests_that_arrive_as_the_image_does(served):
    """No request falls between the lookup and the news: arrivals are spread over the moment of the news."""
    client = served.client()
    for round_number in range(5):
        served.store.on_disk.clear()
        gate = served.store.gates["support-fr"] = asyncio.Event()
        async with asyncio.timeout(5):
            tasks = []
            for index in range(16):
                if index == 8:
                    gate.set()
                tasks.append(asyncio.create_task(client.completions.create(model="support-fr", prompt="x")))
                await asyncio.sleep(0.0005 * round_number)
            await asyncio.gather(*tasks)
    served.assert_quiet()


async def test_a_slow_adapter_delays_no_other(served):
    served.store.gates["support-fr"] = asyncio.Event()
    client = served.client()
    slow = asyncio.create_task(client.completions.create(model="support-fr", prompt="x"))
    await until(lambda: served.engine.added)
    async with asyncio.timeout(2):
        assert (await client.completions.create(model="team/sql", prompt="x")).model == "team/sql"
        assert (await client.completions.create(model=BASE, prompt="x")).model == BASE
    assert not slow.done()
    served.store.gates["support-fr"].set()
    await slow


COLD_ERRORS = [
    (AdapterCorrupt("adapter_model.safetensors is cut short"), 422, "adapter_corrupt"),
    (AdapterMismatch("layers.0.q_proj has the wrong shape"), 422, "adapter_mismatch"),
    (AdapterUnsupported("DoRA is not supported"), 422, "adapter_unsupported"),
    (AdapterTooLarge("rank 999 is above the limit 512"), 422, "adapter_too_large"),
    (AdapterUnavailable("the compiler process died; try again"), 503, "adapter_unavailable"),
    (RuntimeError("a defect"), 500, "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), COLD_ERRORS, ids=lambda value: str(value)[:20])
async def test_a_cold_adapters_error_is_a_status_also_on_a_stream(served, stream, error, status, code):
    served.store.errors["support-fr"] = error
    body = {"model": "support-fr", "messages": CHAT, "stream": stream}
    async with served.http() as http:
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == status
        told = response.json()["error"]
        assert told["code"] == code
        if code != "internal_error":
            assert told["message"] == str(error)
        else:
            assert "a defect" not in response.text
        assert ("retry-after" in response.headers) == (status == 503)
        assert told["param"] == ("model" if status == 422 else None)
        # others are unaffected, and the failure is not remembered
        assert (await http.post("/v1/chat/completions", json={**body, "model": BASE})).status_code == 200
        del served.store.errors["support-fr"]
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert served.store.ensured == ["support-fr"] * 2
    served.assert_quiet()


async def test_every_waiting_request_gets_the_error(served):
    served.store.errors["support-fr"] = AdapterCorrupt("cut short")
    gate = served.store.gates["support-fr"] = asyncio.Event()
    client = served.client()
    tasks = [asyncio.create_task(client.completions.create(model="support-fr", prompt="x")) for _ in range(8)]
    await until(lambda: len(served.engine.added) == 8)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, openai.UnprocessableEntityError) for result in results), results
    served.assert_quiet()


async def test_an_image_that_the_engine_finds_damaged_is_compiled_anew(served):
    error = RequestError(422, "adapter_corrupt", "the checksum differs")
    served.answer("", adapter="support-fr", finish_reason="error", error=error)
    client = served.client()
    with pytest.raises(openai.InternalServerError) as failed:  # 503: the adapter is sound, and trying again helps
        await client.with_options(max_retries=0).completions.create(model="support-fr", prompt="x")
    assert failed.value.status_code == 503 and failed.value.code == "adapter_unavailable"
    assert failed.value.response.headers["retry-after"] == "1"
    assert served.store.discarded == ["image-of-support-fr"]
    del served.scripts["support-fr"]
    await client.completions.create(model="support-fr", prompt="x")
    assert served.store.ensured == ["support-fr"] * 2
    served.assert_quiet()


BAD_NAMES = [
    "nobody",
    "..",
    "../support-fr",
    "support-fr/..",
    "support-fr/../support-fr",
    "/support-fr",
    "support-fr/",
    "support-fr//x",
    "support-fr\0",
    "support-fr\n",
    ".hidden",
    "support-fr,team/sql",
    "support-fr@1",
    "support-fr+team/sql",
    "a:support-fr",
    f"{BASE}:",
    f"{BASE}:nobody",
    f"{BASE}:../support-fr",
    f"{BASE}:{BASE}",
    f"{BASE}:base-alias",
    "support-fr:tiny/base",
    "%2e%2e",
    "x" * 129,
    "Ünicode",
    " support-fr",
    "tiny",
]


async def test_names_that_are_no_model_are_404(served, monkeypatch):
    looked_up = []
    original = Catalog.resolve
    monkeypatch.setattr(Catalog, "resolve", lambda self, name: looked_up.append(name) or original(self, name))
    async with served.http() as http:
        for name in BAD_NAMES:
            for stream in (False, True):
                response = await http.post("/v1/completions", json={"model": name, "prompt": "x", "stream": stream})
                assert response.status_code == 404, name
                error = response.json()["error"]
                assert error["code"] == "model_not_found"
                assert error["param"] == "model"
                assert error["type"] == "invalid_request_error"
    # only what fits the grammar ever reached the catalog, let alone the disk
    assert set(looked_up) <= {"nobody", "tiny"}
    assert served.engine.added == []


async def test_an_adapter_added_while_running(served):
    client = served.client()
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="new-one", prompt="x")
    add_adapter(served.adapters_dir, "new-one")
    answer = await client.completions.create(model="new-one", prompt="x", max_tokens=100)
    assert answer.model == "new-one"
    assert answer.choices[0].text == ANSWER


async def test_a_replaced_adapter_is_another_version(served):
    client = served.client()
    await client.completions.create(model="support-fr", prompt="x")
    (served.adapters_dir / "support-fr" / "adapter_model.safetensors").write_bytes(b"another")
    await client.completions.create(model="support-fr", prompt="x")
    first, second = (request.pending for request in served.engine.added)
    assert None not in (first, second)
    assert first != second


async def test_a_shutdown_ends_fetches(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir) as served:
        served.store.gates["support-fr"] = asyncio.Event()
        task = asyncio.create_task(served.client().completions.create(model="support-fr", prompt="x"))
        await until(lambda: served.store.ensured)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: served.engine.aborted)
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if name.startswith("fetch")]
