"""GET /metrics: what routers and dashboards read, against what happened."""

from __future__ import annotations

import asyncio
import contextlib
import time

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.errors import AdapterCorrupt
from server.api.service import ApiLimits
from server.engine.messages import SlotChange, StepStats
from server.engine.tally import StepTally
from tests.api.conftest import ANSWER, BASE, serve


async def scrape(served) -> dict[str, dict[tuple, float]]:
    """Every sample by name and labels."""
    async with served.http() as http:
        response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            assert key not in samples.setdefault(sample.name, {}), f"{sample.name} twice"
            samples[sample.name][key] = sample.value
    return samples


def only(samples, name) -> float:
    (value,) = samples[name].values()
    return value


async def test_metrics_of_requests(served):
    client = served.client()
    first = await client.completions.create(model=BASE, prompt="the quick", max_tokens=100)
    second = await client.completions.create(model="support-fr", prompt="the", max_tokens=3)
    served.answer("the", hangs=True)
    task = asyncio.create_task(client.completions.create(model=BASE, prompt="x"))
    while len(served.engine.added) < 3:
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    while not served.engine.aborted:
        await asyncio.sleep(0.005)
    samples = await scrape(served)
    assert only(samples, "vllm:prompt_tokens_total") >= first.usage.prompt_tokens + second.usage.prompt_tokens
    generated = first.usage.completion_tokens + second.usage.completion_tokens
    assert only(samples, "vllm:generation_tokens_total") >= generated
    reasons = {dict(key)["finished_reason"]: value for key, value in samples["vllm:request_success_total"].items()}
    assert reasons == {"stop": 1, "length": 1, "abort": 1, "error": 0}
    assert only(samples, "vllm:time_to_first_token_seconds_count") == 3
    assert only(samples, "vllm:e2e_request_latency_seconds_count") == 3
    labels = dict(next(iter(samples["vllm:prompt_tokens_total"])))
    assert labels == {"model_name": BASE, "engine": "0"}


async def test_metrics_of_the_engine(served):
    served.engine.last_stats = StepStats(
        num_running=3,
        num_waiting=2,
        running_adapters=("support-fr", "team/sql"),
        waiting_adapters=("x",),
        kv_usage=0.25,
        rows=17,
        adapter_rows=9,
        distinct_adapters=2,
        prefix_queries=100,
        prefix_hits=40,
        preemptions=5,
        adapter_loads=7,
        adapter_acquires=20,
        host_hits=3,
    )
    samples = await scrape(served)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:gpu_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 100,
        "vllm:prefix_cache_hits_total": 40,
        "vllm:gpu_prefix_cache_queries_total": 100,
        "vllm:gpu_prefix_cache_hits_total": 40,
        "vllm:num_preemptions_total": 5,
        "multilora_step_rows": 17,
        "multilora_step_adapter_rows": 9,
        "multilora_step_adapters": 2,
        "multilora_adapter_loads_total": 7,
        "multilora_adapter_acquires_total": 20,
        "multilora_adapter_host_hits_total": 3,
        "multilora_adapter_capacity_bytes": 1 << 20,
    }
    assert {name: only(samples, name) for name in expected} == expected
    info = dict(next(iter(samples["vllm:cache_config_info"])))
    assert (info["block_size"], info["num_gpu_blocks"]) == ("16", "100")


async def test_metrics_of_the_tiers(served):
    await served.client().completions.create(model="support-fr", prompt="x", max_tokens=1)
    loads = StepTally()
    loads.load({"host": 0.375, "device": 0.25})
    loads.load({"host": 0.125})
    served.engine.last_stats = StepStats(
        resident_adapters=3,
        adapter_bytes_used=12345,
        adapter_evictions=4,
        host_images=5,
        host_bytes_used=777,
        host_evictions=6,
        load_seconds=loads.load_seconds,
    )
    samples = await scrape(served)
    assert by_label(samples, "multilora_tier_adapters", "tier") == {"raw": 0, "disk": 1, "host": 5, "device": 3}
    assert by_label(samples, "multilora_tier_bytes", "tier") == {"raw": 0, "disk": 1000, "host": 777, "device": 12345}
    assert by_label(samples, "multilora_tier_evictions_total", "tier") == {"raw": 0, "disk": 2, "host": 6, "device": 4}
    for gauge in ("multilora_tier_leases", "multilora_tier_under_way"):
        assert by_label(samples, gauge, "tier") == {"raw": 0, "disk": 0}
    sums = samples["multilora_adapter_load_seconds_sum"].items()
    seconds = {(dict(key)["tier"], dict(key)["phase"]): value for key, value in sums}
    assert seconds == {("disk", "compile"): 1.5, ("device", "host"): 0.5, ("device", "device"): 0.25}
    counts = by_label(samples, "multilora_adapter_load_seconds_count", "phase")
    assert counts == {"compile": 1, "host": 2, "device": 1}
    host = {
        dict(key)["le"]: value
        for key, value in samples["multilora_adapter_load_seconds_bucket"].items()
        if dict(key)["phase"] == "host"
    }
    assert (host["0.1"], host["0.5"], host["+Inf"]) == (0, 2, 2)
    assert only(samples, "multilora_adapter_compiles_total") == 1
    assert only(samples, "multilora_adapter_disk_hits_total") == 6


async def test_histograms_of_steps(served):
    tally = StepTally()
    steps = [(1, 0), (1, 1), (8, 1), (9, 3), (20_000, 500)]
    for rows, adapters in steps:
        tally.step(rows, adapters)
    served.engine.last_stats = StepStats(
        steps_by_rows=tally.rows.counts,
        rows_total=tally.rows.total,
        steps_by_adapters=tally.adapters.counts,
        adapters_total=tally.adapters.total,
    )
    samples = await scrape(served)
    for name, values in (
        ("vllm:iteration_tokens_total", [rows for rows, _ in steps]),
        ("multilora_adapters_per_step", [adapters for _, adapters in steps]),
    ):
        assert only(samples, f"{name}_count") == len(values)
        assert only(samples, f"{name}_sum") == sum(values)
        buckets = by_label(samples, f"{name}_bucket", "le")
        assert {bound: sum(value <= float(bound) for value in values) for bound in buckets} == buckets


async def test_times_of_a_request_add_up(served):
    """The scripted engine tells queue 0.25 s, adapter 0.5 s, prefill 0.125 s."""
    served.answer("the quick brown fox", delay_s=0.01)
    answer = await served.client().completions.create(model=BASE, prompt="the quick", max_tokens=100)
    samples = await scrape(served)
    total = {name: only(samples, f"vllm:request_{name}_seconds_sum") for name in ("queue_time", "prefill_time")}
    assert total == {"queue_time": 0.75, "prefill_time": 0.125}
    decode, gaps = (
        only(samples, f"vllm:{name}_seconds_sum") for name in ("request_decode_time", "inter_token_latency")
    )
    num_output = answer.usage.completion_tokens
    assert decode == pytest.approx(gaps, abs=1e-3) and decode >= 0.01 * (num_output - 1)
    assert only(samples, "vllm:request_inference_time_seconds_sum") == pytest.approx(decode + 0.125)
    assert only(samples, "vllm:inter_token_latency_seconds_count") == num_output - 1
    per_token = only(samples, "vllm:request_time_per_output_token_seconds_sum")
    assert per_token == pytest.approx(decode / (num_output - 1))
    assert only(samples, "vllm:request_prompt_tokens_sum") == answer.usage.prompt_tokens
    assert only(samples, "vllm:request_generation_tokens_sum") == num_output
    assert only(samples, "vllm:request_params_max_tokens_sum") == 100
    for part in ("bucket", "count", "sum"):  # the old name shows the same
        old, new = (samples[f"vllm:{name}_seconds_{part}"] for name in ("time_per_output_token", "inter_token_latency"))
        assert old == new


async def test_a_prompt_with_several_choices_is_counted_once_when_all_have_ended(served):
    served.answer("the", choice=0)
    served.answer("the quick brown fox", choice=1)
    served.answer("a", choice=2)
    served.answer("x", choice=3)
    await served.client().completions.create(model=BASE, prompt=["the quick", "a"], n=2, max_tokens=100)
    lengths = [len(served.choices[index].token_ids) for index in range(4)]
    samples = await scrape(served)
    assert only(samples, "vllm:request_params_n_count") == 2 and only(samples, "vllm:request_params_n_sum") == 4
    assert only(samples, "vllm:request_max_num_generation_tokens_count") == 2
    assert only(samples, "vllm:request_max_num_generation_tokens_sum") <= max(lengths[:2]) + max(lengths[2:])
    assert only(samples, "vllm:request_max_num_generation_tokens_sum") > max(lengths)


async def test_http_requests_by_route(served):
    """The labels are the route's template, a known method and the status' class, whatever clients send."""
    async with served.http() as http:
        for path in ("/v1/models/support-fr", "/v1/models/team/sql", "/v1/models/nobody", "/wp-admin/7", "/wp-admin/8"):
            await http.get(path)
        await http.request("PROPFIND", "/v1/models")
        await http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
        await http.post("/v1/completions", json={})
        served.state.door.close()
        await http.post("/v1/completions", json={"model": BASE, "prompt": "x"})  # refused before the router
    samples = await scrape(served)
    total = {
        tuple(dict(key)[label] for label in ("method", "handler", "status")): value
        for key, value in samples["http_requests_total"].items()
    }
    assert total == {
        ("GET", "/v1/models/{model}", "2xx"): 2,
        ("GET", "/v1/models/{model}", "4xx"): 1,
        ("GET", "none", "4xx"): 2,
        ("other", "/v1/models", "4xx"): 1,
        ("POST", "/v1/completions", "2xx"): 1,
        ("POST", "/v1/completions", "4xx"): 1,
        ("POST", "/v1/completions", "5xx"): 1,
    }
    counts = samples["http_request_duration_seconds_count"]
    durations = {(dict(key)["method"], dict(key)["handler"]): value for key, value in counts.items()}
    assert durations[("POST", "/v1/completions")] == 3
    assert sum(durations.values()) == sum(total.values())


async def test_one_series_of_lora_info_from_the_first_scrape_on(served):
    seen = []
    for running in ((), ("support-fr",), ("support-fr", "team/sql"), ()):
        served.engine.last_stats = StepStats(running_adapters=running)
        ((key, value),) = (await scrape(served))["vllm:lora_requests_info"].items()
        assert dict(key).keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
        assert abs(value - time.time()) < 10
        seen.append(dict(key)["running_lora_adapters"])
    assert seen == ["", "support-fr", "support-fr,team/sql", ""]
    assert dict(key)["max_lora"] == "64"


async def test_a_scrape_has_no_series_that_clients_name(served):
    """Adapter names are in one label of one series, and in those that are bounded; others, and versions, nowhere."""
    for model in ("support-fr", "nobody", "support-fr@0123456789"):
        with contextlib.suppress(openai.NotFoundError):
            await served.client().completions.create(model=model, prompt="x")
    text = (await served_text(served)).decode()
    assert ANSWER not in text and "nobody" not in text and "0123456789" not in text
    named = [line for line in text.splitlines() if "support-fr" in line]
    assert all(line.startswith(("vllm:lora_requests_info{", "multilora_by_adapter_")) for line in named)
    assert len(text) < 40_000


async def served_text(served) -> bytes:
    async with served.http() as http:
        return (await http.get("/metrics")).content


def by_label(samples, name: str, label: str) -> dict[str, float]:
    return {dict(key)[label]: value for key, value in samples[name].items()}


async def test_metrics_by_adapter(tokenizer, adapters_dir):
    """Requests, tokens, errors, first tokens and loads of each; the base's are not among them."""
    limits = ApiLimits(adapter_metrics_top=1)
    async with serve(tokenizer, adapters_dir, limits=limits) as served:
        client = served.client()
        first = await client.completions.create(model="support-fr", prompt="the quick", max_tokens=100, n=2)
        served.store.errors["team/sql"] = AdapterCorrupt("cut short")
        with pytest.raises(openai.UnprocessableEntityError):
            await client.completions.create(model="team/sql", prompt="the")
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nobody", prompt="the")
        await client.completions.create(model=BASE, prompt="the")
        for image_key in ("image-of-support-fr", "image-of-support-fr", "of nobody yet"):
            served.engine.residents.apply([SlotChange(image_key, "ready")])
        samples = await scrape(served)
        plain = await scrape(served)
    names = [name for name in samples if "by_adapter" in name]
    told = {name.removeprefix("multilora_by_adapter_"): by_label(samples, name, "adapter") for name in names}
    expected = {
        "requests_total": {"support-fr": 2, "other": 1},
        "errors_total": {"support-fr": 0, "other": 1},
        "prompt_tokens_total": {"support-fr": 2 * first.usage.prompt_tokens, "other": 0},
        "output_tokens_total": {"support-fr": first.usage.completion_tokens, "other": 0},
        "loads_total": {"support-fr": 2, "other": 1},
        "ttft_seconds_count": {"support-fr": 2, "other": 0},
    }
    assert {name: told[name] for name in expected} == expected
    assert 0 < told["ttft_seconds_sum"]["support-fr"] < 10 and told["ttft_seconds_sum"]["other"] == 0
    assert plain.keys() == samples.keys()
