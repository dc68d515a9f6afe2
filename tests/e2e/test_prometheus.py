"""A scrape under load read back as a router and a dashboard read it: through a real Prometheus where there is one.

The binary is the one on PATH, or Debian's, unpacked below the temporary folder. Without either the same
assertions run on the exposition, read by prometheus_client's parser.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.tiny_server import Load, TinyServer, World, tiny_server

MAX_RUNNING, NUM_CLIENTS = 3, 12
INTERVAL_S = 0.2
CONFIG = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs: [{job_name: multilora, static_configs: [{targets: ["%s"]}]}]
"""

Series = list[tuple[dict[str, str], float]]


class Reader(Protocol):
    """Who reads the metrics: the labels and values of all current series of a name."""

    def series(self, name: str) -> Series: ...


class Direct:
    """The exposition itself."""

    def __init__(self, server: TinyServer) -> None:
        self._url = f"{server.url}/metrics"

    def series(self, name: str) -> Series:
        families = text_string_to_metric_families(httpx.get(self._url, timeout=30).text)
        return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


class Prometheus:
    """A real one, through its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def series(self, name: str) -> Series:
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": f'{{__name__="{name}"}}'}, timeout=30).json()
        assert answer["status"] == "success", answer
        own = ("__name__", "instance", "job")
        return [
            ({k: v for k, v in found["metric"].items() if k not in own}, float(found["value"][1]))
            for found in answer["data"]["result"]
        ]


@contextmanager
def reader_of(server: TinyServer, folder: Path) -> Iterator[Reader]:
    binary = prometheus_binary()
    if binary is None:
        yield Direct(server)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (folder / "prometheus.yml").write_text(CONFIG % server.url.removeprefix("http://"))
    command = [
        *(binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address={address}", "--log.level=warn"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        reader = Prometheus(f"http://{address}")
        _until_it_scrapes(process, reader)
        yield reader
    finally:
        process.kill()
        process.wait()


def _until_it_scrapes(process: subprocess.Popen[bytes], reader: Prometheus) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "prometheus does not scrape"
        try:
            if reader.series("up") == [({}, 1.0)]:
                return
        except (httpx.TransportError, ValueError):
            pass
        time.sleep(0.1)


def prometheus_binary() -> str | None:
    """A path, or None where there is none to be had."""
    kept = Path(tempfile.gettempdir()) / f"multilora-tests-prometheus-{os.getuid()}"
    unpacked = kept / "usr" / "bin" / "prometheus"
    if found := shutil.which("prometheus"):
        return found
    if not unpacked.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        kept.mkdir(mode=0o700, exist_ok=True)
        fetch = "apt-get download prometheus || (apt-get update && apt-get download prometheus)"
        unpack = "dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb"
        subprocess.run(["sh", "-c", f"({fetch}) && {unpack}"], cwd=kept, capture_output=True, timeout=200, check=False)
    return str(unpacked) if unpacked.exists() else None


def affinity(reader: Reader, adapter: str) -> float:
    """What the llm-d router's lora-affinity-scorer makes of this server."""
    ((labels, _),) = reader.series("vllm:lora_requests_info")
    running = [name for name in labels.get("running_lora_adapters", "").split(",") if name]
    waiting = [name for name in labels.get("waiting_lora_adapters", "").split(",") if name]
    if adapter in running:
        return 1.0
    if len(running) + len(waiting) < int(labels["max_lora"]):
        return 0.8
    return 0.6 if adapter in waiting else 0.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("prometheus"), num_adapters=3)


def test_the_signals_of_a_router_and_a_dashboards_sums(world):
    flags = ("--max-num-seqs", str(MAX_RUNNING), "--max-loras", "3")
    with tiny_server(world, *flags) as server, reader_of(server, world.root) as reader:
        ((idle, _),) = reader.series("vllm:lora_requests_info")  # from the first scrape on
        assert idle.pop("max_lora") == "3" and not any(idle.values())
        assert affinity(reader, "a0") == 0.8
        load = asyncio.run(_load_with_a_pause(server, reader))
        _assert_sums(server, reader, load)


async def _load_with_a_pause(server: TinyServer, reader: Reader) -> Load:
    """In the middle the engine stands still, so that both readers must see the same."""
    load = Load(server, ["a0", "a1", "a2"], seed=5)
    load.start(NUM_CLIENTS)
    await load.until_done(NUM_CLIENTS)
    pid = server.pid("engine")
    await asyncio.to_thread(_stop_at_full_work, server, pid)
    try:
        await asyncio.to_thread(_assert_signals, server, reader)
    finally:
        os.kill(pid, signal.SIGCONT)
    await load.stop()
    return load


def _stop_at_full_work(server: TinyServer, pid: int) -> None:
    """Stop the engine at a moment of which it has told that requests run and wait."""
    for _ in range(100):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # what it had sent arrives
        if server.metric("vllm:num_requests_running") and server.metric("vllm:num_requests_waiting"):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("never both running and waiting")


def _assert_signals(server: TinyServer, reader: Reader) -> None:
    time.sleep(3 * INTERVAL_S)
    direct = Direct(server)
    signals = {}
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        ((labels, signals[name]),) = reader.series(name)
        assert labels == {"model_name": "base", "engine": "0"}
        assert reader.series(name) == direct.series(name)
    assert 0 < signals["vllm:num_requests_running"] <= MAX_RUNNING
    assert 0 < signals["vllm:num_requests_waiting"] <= NUM_CLIENTS
    assert 0 < signals["vllm:kv_cache_usage_perc"] <= 1
    ((labels, seen),) = reader.series("vllm:lora_requests_info")
    ((told, _),) = direct.series("vllm:lora_requests_info")
    assert _set(labels) == _set(told)
    assert abs(seen - time.time()) < 30
    running = labels["running_lora_adapters"].split(",")
    assert set(running) <= {"a0", "a1", "a2"} and affinity(reader, running[0]) == 1.0


def _set(labels: dict[str, str]) -> dict[str, str]:
    """Without the empty ones: to Prometheus an empty label is none."""
    return {name: value for name, value in labels.items() if value}


def _assert_sums(server: TinyServer, reader: Reader, load: Load) -> None:
    """Counters and histograms against what the clients and the access log saw."""
    time.sleep(3 * INTERVAL_S)
    assert set(load.ends) == {"done"}
    lines = [line for line in server.lines() if line["route"] == "/v1/completions"]
    assert len(lines) == load.ends["done"]
    ends = {labels["finished_reason"]: value for labels, value in reader.series("vllm:request_success_total")}
    assert ends == {"length": load.ends["done"], "stop": 0, "abort": 0, "error": 0}
    for name, field in (("prompt", "prompt_tokens"), ("generation", "output_tokens")):
        total = sum(line[field] for line in lines)
        assert [value for _, value in reader.series(f"vllm:{name}_tokens_total")] == [total]
        assert [value for _, value in reader.series(f"vllm:request_{name}_tokens_sum")] == [total]
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert [value for _, value in reader.series(f"vllm:{name}_count")] == [len(lines)]
    ((labels, requests),) = [
        (labels, value)
        for labels, value in reader.series("http_requests_total")
        if labels["handler"] == "/v1/completions"
    ]
    assert (labels, requests) == ({"handler": "/v1/completions", "method": "POST", "status": "2xx"}, len(lines))
    for name in ("request_params_n_sum", "request_max_num_generation_tokens_count"):
        assert [value for _, value in reader.series(f"vllm:{name}")] == [len(lines)]
    loads = {labels["phase"]: value for labels, value in reader.series("multilora_adapter_load_seconds_count")}
    assert loads["compile"] == loads["device"] == 3
    by_adapter = {f["adapter"]: value for f, value in reader.series("multilora_by_adapter_output_tokens_total")}
    assert {name for name, value in by_adapter.items() if value} == {line["adapter"] for line in lines} - {None}
    assert sum(by_adapter.values()) == sum(line["output_tokens"] for line in lines if line["adapter"] is not None)
    ((_, rows),) = reader.series("vllm:iteration_tokens_total_sum")
    ((_, hits),) = reader.series("vllm:prefix_cache_hits_total")
    # every token but each answer's last is a row of some step, unless it was found in the prefix cache
    assert rows + hits >= sum(line["prompt_tokens"] + line["output_tokens"] - 1 for line in lines)
