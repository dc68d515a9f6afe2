"""A whole server over a real bucket: cold, replaced under a stream, pinned, deleted, and on without the bucket.

Every answer is compared with what unmerged PEFT says for the content that its version had.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.sources.folder import CONFIG_FILE, WEIGHTS_FILE
from tests.e2e.tiny_server import TinyServer, World, tiny_server
from tests.store.s3_server import S3Server, s3_server
from tests.store.test_source_objects import use
from tests.zoo import ZooAdapter, greedy_tokens, load_oracle_base, lora_config, peft_oracle, save_adapter, tiny_base

BUCKET, PREFIX = "adapters", "team"
PROMPT = [5, 17, 99, 42, 7, 123]
SHORT = 24  # tokens, of which PEFT says what they must be
LONG = 2000  # the stream outlives a replacement
SEEN_S = 60.0
VERSION, DIGEST, IMAGE = "x-multilora-adapter-version", "x-multilora-adapter-digest", "x-multilora-image-key"


@dataclass
class Cloud:
    """The bucket, what PEFT answers for each content, and one server after another over one cache."""

    world: World
    s3: S3Server
    contents: list[ZooAdapter]
    answers: list[list[int]]
    bucket_stack: ExitStack  # closing it ends the S3 server
    server_stack: ExitStack = field(default_factory=ExitStack)
    server: TinyServer | None = None
    put_names: set[str] = field(default_factory=set)

    def start(self) -> None:
        """A server, in place of the one that runs."""
        self.server_stack.close()
        flags = ["--adapter-source", f"s3://{BUCKET}/{PREFIX}", "--adapter-source-allow-private"]
        flags += ["--adapter-poll-interval", "0.5", "--adapter-miss-ttl", "0.5"]
        self.server = self.server_stack.enter_context(tiny_server(self.world, *flags))

    def put(self, name: str, content: int) -> None:
        """All contents have one config, so a replacement is one write."""
        folder = self.contents[content].path
        files = {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
        if name in self.put_names:
            del files[CONFIG_FILE]
        self.put_names.add(name)
        self.s3.put(BUCKET, f"{PREFIX}/{name}", files)

    def delete(self, name: str) -> None:
        store = self.s3.store(BUCKET)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            store.delete(f"{PREFIX}/{name}/{file}")

    def post(self, model: str, max_tokens: int = SHORT, **headers: str) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        url = f"{self.server.url}/v1/completions"
        return httpx.post(url, json={**body, "return_token_ids": True}, headers=headers, timeout=SEEN_S)

    def ask(self, model: str, content: int | None = None, **headers: str) -> httpx.Response:
        """A right answer; of this content if one is given."""
        answer = self.post(model, **headers)
        assert answer.status_code == 200, answer.text
        if content is not None:
            assert answer.json()["choices"][0]["token_ids"] == self.answers[content]
        return answer

    def until_replaced(self, name: str, old: str, contents: tuple[int, int]) -> str:
        """Ask until another version answers; each answer is right for the version that its header names."""
        deadline = time.monotonic() + SEEN_S
        while True:
            answer = self.ask(name)
            is_new = answer.headers[VERSION] != old
            assert answer.json()["choices"][0]["token_ids"] == self.answers[contents[is_new]]
            if is_new:
                return answer.headers[VERSION]
            assert time.monotonic() < deadline, "the replacement was not seen"
            time.sleep(0.02)

    def two_versions(self, name: str, old: int, new: int) -> tuple[dict[str, str], dict[str, str]]:
        """The headers of a former version, of content `old`, and of the current one, of `new`."""
        self.put(name, old)
        before = dict(self.ask(name, old).headers)
        self.put(name, new)
        self.until_replaced(name, before[VERSION], (old, new))
        return before, dict(self.ask(name, new).headers)

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """A metric's values by the labels that differ."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=30).text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    labels = [value for key, value in sample.labels.items() if key not in ("model_name", "engine")]
                    found[tuple(labels)] = sample.value
        return found


@pytest.fixture(scope="module")
def cloud(tmp_path_factory) -> Iterator[Cloud]:
    root: Path = tmp_path_factory.mktemp("source-server")
    world = World.make(root, 0)
    (root / "adapters").mkdir()
    tiny_base(root / "base", "llama", num_hidden_layers=2, max_position_embeddings=4096)
    model = load_oracle_base(root / "base")
    contents, answers = [], []
    for index in range(4):
        content = ZooAdapter(f"c{index}", root / "contents" / f"c{index}")
        save_adapter(model, lora_config(0, 2), content.path, seed=index, scale=1.0, dtype=torch.float32)
        contents.append(content)
        with peft_oracle(model, content) as oracle:
            answers.append(greedy_tokens(oracle, PROMPT, SHORT))
    assert len({tuple(answer) for answer in [*answers, greedy_tokens(model, PROMPT, SHORT)]}) == 5
    (root / "s3").mkdir()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as bucket_stack:
        s3 = bucket_stack.enter_context(s3_server(root / "s3"))
        use(patch, s3.url)
        cloud = Cloud(world, s3, contents, answers, bucket_stack)
        try:
            cloud.start()
            yield cloud
        finally:
            cloud.server_stack.close()


def test_a_cold_adapter_by_phase(cloud):
    cloud.put("org/fr", 0)
    cold = cloud.ask("org/fr", 0, **{"x-multilora-phases": "1"})
    phases = cold.json()["usage"]["multilora"]["phases"]
    remote = {"resolve_s", "raw_queue_s", "fetch_s", "compile_queue_s", "compile_s"}
    assert phases.keys() >= remote | {"adapter_wait_s", "load_host_s", "load_device_s", "prefill_s", "ttft_s"}
    assert all(seconds >= 0 for seconds in phases.values())
    assert min(phases[name] for name in ("resolve_s", "fetch_s", "compile_s")) > 0
    assert sum(phases[name] for name in remote) < phases["ttft_s"] + 0.01
    warm = cloud.ask("org/fr", 0, **{"x-multilora-phases": "1"})
    assert not {"fetch_s", "compile_s"} & warm.json()["usage"]["multilora"]["phases"].keys()
    counts = cloud.samples("multilora_adapter_load_seconds_count")
    by_phase = {("raw", phase) for phase in ("resolve", "queue", "fetch")}
    by_phase |= {("disk", phase) for phase in ("queue", "fetch", "compile")}
    by_phase |= {("device", phase) for phase in ("queue", "header", "host", "device")}
    assert counts.keys() == by_phase and min(counts.values()) >= 1
    for name, value in (("requests_total", 2), ("output_tokens_total", 2 * SHORT), ("loads_total", 1)):
        assert cloud.samples(f"multilora_by_adapter_{name}")["org/fr",] == value, name


def test_a_replacement_is_seen_and_the_stream_in_flight_stays_with_the_old(cloud):
    cloud.put("es", 1)
    old = cloud.ask("es", 1).headers[VERSION]
    undisturbed = cloud.post("es", LONG).json()["choices"][0]["token_ids"]
    assert len(undisturbed) == LONG and undisturbed[:SHORT] == cloud.answers[1]
    body = {"model": "es", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    streamed: list[int] = []
    url = f"{cloud.server.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True, "return_token_ids": True}, timeout=SEEN_S) as stream:
        assert (stream.status_code, stream.headers[VERSION]) == (200, old)
        lines = stream.iter_lines()
        streamed += tokens_of(next(line for line in lines if line))
        cloud.put("es", 2)
        new = cloud.until_replaced("es", old, (1, 2))
        running = cloud.samples("vllm:num_requests_running")
        assert running == {(): 1}, "the stream is in flight while the new version answers"
        for line in lines:
            streamed += tokens_of(line)
    assert new != old and streamed == undisturbed


def tokens_of(line: str) -> list[int]:
    if not line.startswith("data: {"):
        return []
    return [token for choice in json.loads(line[6:])["choices"] for token in choice.get("token_ids", [])]


def test_a_request_names_its_version(cloud):
    old, new = cloud.two_versions("pin/de", 0, 1)
    for headers, content in ((old, 0), (new, 1)):
        for key in (headers[VERSION][:8], headers[DIGEST], headers[IMAGE][:12]):
            answer = cloud.ask(f"pin/de@{key}", content)
            assert {name: answer.headers[name] for name in (VERSION, DIGEST, IMAGE)} == {
                name: headers[name] for name in (VERSION, DIGEST, IMAGE)
            }
            assert answer.json()["model"] == "pin/de"
    cloud.put("pin/it", 3)
    other = cloud.ask("pin/it", 3).headers
    for key in (other[VERSION], other[DIGEST], other[IMAGE], "0123456789"):
        refused = cloud.post(f"pin/de@{key}")
        assert refused.status_code == 404 and old[VERSION][:12] in refused.json()["error"]["message"], key
    listed = httpx.get(f"{cloud.server.url}/v1/adapters", timeout=30).json()["data"]
    assert not [entry["name"] for entry in listed if "@" in entry["name"]]
    assert {line["adapter"] for line in cloud.server.lines() if line["model"] == "pin/de"} == {"pin/de", None}


def test_a_deleted_adapter_is_not_found(cloud):
    cloud.put("gone", 2)
    version = cloud.ask("gone", 2).headers[VERSION]
    cloud.delete("gone")
    deadline = time.monotonic() + SEEN_S
    while (answer := cloud.post("gone")).status_code == 200:
        assert answer.json()["choices"][0]["token_ids"] == cloud.answers[2]
        assert time.monotonic() < deadline, "the deletion was not seen"
        time.sleep(0.02)
    for model in ("gone", f"gone@{version}", "never-there"):
        refused = cloud.post(model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found"), model


def test_a_restart_without_the_bucket(cloud):
    """Last: it ends the S3 server. What was served is served, former versions too, and nothing is compiled."""
    old, new = cloud.two_versions("kept", 1, 2)
    cloud.bucket_stack.close()
    cloud.start()
    assert cloud.ask("kept", 2).headers[VERSION] == new[VERSION]
    assert cloud.ask(f"kept@{old[DIGEST][:8]}", 1).headers[VERSION] == old[VERSION]
    refused = cloud.post("never-seen")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert "retry-after" in refused.headers
    for name in ("compiles", "fetches"):
        assert cloud.server.metric(f"multilora_adapter_{name}_total") == 0, name
    assert cloud.server.metric("multilora_adapter_stale_uses_total") > 0
