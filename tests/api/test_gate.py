"""What every request passes first: ids, keys, the drain, the bounded queue, CORS, and its line in the log."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from adapters_store.errors import AdapterUnsupported
from server.api.service import ApiLimits
from server.engine.messages import StepStats
from tests.api.conftest import ANSWER, BASE, serve


async def test_request_ids(served):
    body = {"model": BASE, "prompt": "x"}
    async with served.http() as http:
        first, second = [
            await http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"}) for _ in range(2)
        ]
        assert first.headers["x-request-id"] == second.headers["x-request-id"] == "mine-1"
        # what the client sends is no key of ours
        assert first.json()["id"] != second.json()["id"]
        assert len({request.request_id for request in served.engine.added}) == 2
        made = [(await http.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        odd = await http.get("/health", headers={"x-request-id": "x" * 129})
        assert odd.headers["x-request-id"] != "x" * 129
        failed = await http.post("/v1/completions", json={}, headers={"x-request-id": "mine-2"})
        assert failed.headers["x-request-id"] == "mine-2"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "s3cret"},
        {"authorization": "Basic s3cret"},
        {"authorization": "Bearer s3cre"},
        {"authorization": "Bearer s3cret2"},
        {"authorization": "Bearer S3CRET"},
        {"api-key": "s3cret"},
        {"host": "127.0.0.1/health?"},
    ],
)
async def test_without_the_key(guarded, headers):
    async with guarded.http() as http:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/models/support-fr"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/nothing"),
        ):
            response = await http.request(method, path, headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
    assert guarded.engine.added == []


async def test_with_the_key(guarded):
    async with guarded.http() as http:
        for value in ("Bearer s3cret", "bearer s3cret"):
            assert (await http.get("/v1/models", headers={"authorization": value})).status_code == 200
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200


async def test_several_keys(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir, api_keys=("one", "two")) as server, server.http() as http:
        for key, status in (("one", 200), ("two", 200), ("one,two", 401), ("three", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await http.get("/v1/models", headers=headers)).status_code == status, key


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "caf\u00e9".encode(), "a\tb"])
async def test_an_odd_request_id_is_replaced(served, given):
    async with served.http() as http:
        response = await http.get("/health", headers={"x-request-id": given})
    assert response.headers["x-request-id"].startswith("req-")


async def test_a_closed_door_refuses_new_requests_and_lets_open_ones_end(served):
    served.answer(ANSWER, delay_s=0.02)
    async with served.http() as http:
        open_one = asyncio.create_task(http.post("/v1/completions", json={"model": BASE, "prompt": "x"}))
        while not served.engine.added:
            await asyncio.sleep(0.005)
        served.state.door.close()
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"):
            refused = await http.post(path, json={"model": BASE, "prompt": "x"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == (503 if "lora" in path else "overloaded")
        assert not open_one.done()
        assert served.state.door.num_inside == 1
        assert (await open_one).json()["choices"][0]["finish_reason"]
        await asyncio.wait_for(served.state.door.until_empty(), 5)
    served.assert_quiet()


async def test_more_than_may_wait_get_429(tokenizer, adapters_dir):
    """Of a burst, exactly as many are let in as may wait; all that were let in end well."""
    limits = ApiLimits(max_queue_len=5)
    async with serve(tokenizer, adapters_dir, limits=limits) as server, server.http() as http:
        server.answer(ANSWER, delay_s=0.02)
        asks = [http.post("/v1/completions", json={"model": BASE, "prompt": "x"}) for _ in range(12)]
        answers = await asyncio.gather(*asks)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 7
        for answer in refused:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert "5" in answer.json()["error"]["message"]
        assert {answer.status_code for answer in answers} == {200, 429}
        # who runs does not wait
        server.engine.last_stats = StepStats(num_running=20)
        answers = await asyncio.gather(
            *[http.post("/v1/completions", json={"model": BASE, "prompt": "x"}) for _ in range(12)]
        )
        assert {answer.status_code for answer in answers} == {200}
        assert server.state.door.num_inside == 0
        server.assert_quiet()


@pytest.mark.parametrize("fields", [{"n": 4}, {"prompt": ["x", "y"], "n": 2}, {"prompt": ["a", "b", "c", "d"]}])
async def test_each_choice_waits_for_itself(tokenizer, adapters_dir, fields):
    """Four choices in a request: of ten that may wait two requests are let in, and two of one choice."""
    body = {"model": BASE, "prompt": "x", **fields}
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(max_queue_len=10)) as server, server.http() as http:
        for name in ("", "support-fr"):
            server.answer("the", adapter=name, hangs=True)
        inside = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
        while len(server.engine.added) < 8:
            await asyncio.sleep(0.005)
        refused = await http.post("/v1/completions", json=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        single = {"model": BASE, "prompt": "x"}
        inside += [asyncio.create_task(http.post("/v1/completions", json=single)) for _ in range(2)]
        while len(server.engine.added) < 10:
            await asyncio.sleep(0.005)
        assert (await http.post("/v1/completions", json=single)).status_code == 429
        assert len(server.engine.added) == 10 and server.state.door.num_coming == 0
        for task in inside:
            task.cancel()
        await asyncio.gather(*inside, return_exceptions=True)
        while server.engine.num_open or server.state.door.num_inside:
            await asyncio.sleep(0.005)
        assert server.state.door.num_coming == 0
        server.assert_quiet()


async def test_choices_count_from_their_arrival_on(tokenizer, adapters_dir):
    """Also while nothing of them is in the engine: here both prompts wait for the source of the adapters."""
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(max_queue_len=10)) as server, server.http() as http:
        resolve, go_on = server.state.catalog.resolve, asyncio.Event()

        async def slow(name):
            await go_on.wait()
            return await resolve(name)

        server.state.catalog.resolve = slow
        first = asyncio.create_task(http.post("/v1/completions", json={"model": "team/sql", "prompt": "x", "n": 8}))
        while server.state.door.num_coming < 8:
            await asyncio.sleep(0.005)
        refused = await http.post("/v1/completions", json={"model": BASE, "prompt": "x", "n": 3})
        assert refused.status_code == 429 and server.engine.added == []
        assert (await http.post("/v1/completions", json={"model": BASE, "prompt": "x", "n": 2})).status_code == 200
        go_on.set()
        assert (await first).status_code == 200
        assert server.state.door.num_coming == server.state.door.num_inside == 0
        server.assert_quiet()


async def test_more_choices_than_may_ever_wait_are_a_bad_request(tokenizer, adapters_dir):
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(max_queue_len=5)) as server, server.http() as http:
        response = await http.post("/v1/completions", json={"model": BASE, "prompt": ["x", "y"], "n": 3})
        assert response.status_code == 400 and response.json()["error"]["param"] == "n"
        assert "6" in response.json()["error"]["message"] and "5" in response.json()["error"]["message"]
        assert server.engine.added == [] and server.state.door.num_coming == 0


async def test_answers_of_a_slow_reader_do_not_wait(tokenizer, adapters_dir):
    """What the engine has done is in nobody's way, read or not."""
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(max_queue_len=2)) as server, server.http() as http:
        ask = {"model": BASE, "prompt": "x", "stream": True, "n": 2}
        async with http.stream("POST", "/v1/completions", json=ask) as unread:
            assert unread.status_code == 200
            while len(server.engine.ended) < 2:
                await asyncio.sleep(0.005)
            assert (await http.post("/v1/completions", json={"model": BASE, "prompt": "x"})).status_code == 200


async def test_connections_close_while_draining(served):
    async with served.http() as http:
        assert "connection" not in (await http.get("/v1/models")).headers
        served.state.door.close()
        for path in ("/v1/models", "/health", "/v1/nothing"):
            assert (await http.get(path)).headers["connection"] == "close", path
        refused = await http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
        assert refused.status_code == 503 and refused.headers["connection"] == "close"


async def test_cors_is_off_unless_origins_are_given(served, tokenizer, tmp_path):
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with served.http() as http:
        assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=asks)).headers
    (tmp_path / "none").mkdir()
    limits = ApiLimits(allowed_origins=("https://a.example",))
    async with serve(tokenizer, tmp_path / "none", limits=limits, api_keys=("k",)) as server, server.http() as http:
        preflight = await http.options("/v1/chat/completions", headers=asks)
        assert preflight.status_code == 200  # a browser sends no key with it
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert preflight.headers["x-request-id"]
        answer = await http.get("/v1/models", headers={"origin": "https://a.example"})
        exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert answer.status_code == 401 and exposed == {
            "x-request-id",
            "x-multilora-adapter-version",
            "x-multilora-adapter-digest",
            "x-multilora-image-key",
            "retry-after",
        }
        for change in ({"origin": "https://b.example"}, {"access-control-request-method": "PUT"}):
            refused = await http.options("/v1/models", headers=asks | change | {"x-request-id": "mine"})
            assert refused.status_code == 400 and refused.headers["x-request-id"] == "mine"
            assert refused.headers["content-type"] == "application/json"
            error = refused.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["code"] == "cors_refused"
            assert ("origin" in error["message"].partition(":")[0]) is ("origin" in change)
        other = await http.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.fixture
def lines():
    """The access log's lines so far, as objects."""
    seen: list[dict] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(json.loads(record.getMessage()))

    logger, handler = logging.getLogger("multilora.access"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_one_line_for_each_request(tokenizer, adapters_dir, lines):
    secret = "brown fox lazy dog"
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(has_access_log=True)) as server, server.http() as http:
        headers = {"x-request-id": "mine-7"}
        body = {"model": "support-fr", "prompt": secret, "max_tokens": 3, "n": 2}
        answer = (await http.post("/v1/completions", json=body, headers=headers)).json()
        async with http.stream("POST", "/v1/completions", json={"model": BASE, "prompt": secret, "stream": True}) as r:
            await r.aread()
        await http.post("/v1/completions", json={"model": "nobody", "prompt": secret})
        await http.get("/health")
        server.answer("the", hangs=True)
        async with http.stream("POST", "/v1/completions", json={"model": BASE, "prompt": "x", "stream": True}) as r:
            await anext(r.aiter_lines())
        while len(lines) < 4:
            await asyncio.sleep(0.005)
    whole, streamed, missing, left = lines
    assert whole["id"] == "mine-7" and whole["route"] == "/v1/completions" and whole["status"] == 200
    assert whole["model"] == whole["adapter"] == "support-fr" and whole["image_key"] == "image-of-support-fr"
    assert whole["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert whole["output_tokens"] == answer["usage"]["completion_tokens"] == 6
    assert whole["cached_tokens"] == 0 and whole["finish_reason"] == "length"
    assert 0 <= whole["ttft_s"] <= whole["total_s"]
    assert streamed["adapter"] is None and streamed["model"] == BASE and streamed["finish_reason"] == "length"
    assert missing["status"] == 404 and missing["model"] == "nobody" and missing["adapter"] is None
    assert left["finish_reason"] == "abort"
    assert len(lines) == 4, "probes that succeed are not logged"
    for text in (*secret.split(), *ANSWER.split()):
        assert text not in json.dumps(lines)


async def test_the_name_of_a_refused_model_is_bounded_and_one_line(tokenizer, adapters_dir, lines):
    asked = ["no\x1b[31mbody\r\n", "x" * 5000, "support-fr", None]
    async with serve(tokenizer, adapters_dir, limits=ApiLimits(has_access_log=True)) as server, server.http() as http:
        server.store.errors["support-fr"] = AdapterUnsupported("no")
        for model in asked:
            await http.post("/v1/completions", json={"model": model, "prompt": "x"})
    odd, long, refused, missing = (line["model"] for line in lines)
    assert odd == "no\ufffd[31mbody\ufffd\ufffd"
    assert long.startswith("x" * 200) and len(long) < 300
    assert refused == "support-fr" and missing is None
    assert [line["status"] for line in lines] == [404, 404, 422, 400]


async def test_no_line_when_the_log_is_off(served, lines):
    async with served.http() as http:
        await http.get("/v1/models")
    assert lines == []
